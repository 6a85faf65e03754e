"""What to do with batch norms after pruning: leave them, re-estimate them, or move them by the change that was seen.

Every cell prunes once, in one shot and without training, and then gives the same network statistics by each rule:
*left* (untouched), *re-estimated* (those of the images), *shifted* (mean + m_p − m_d, variance × v_p/v_d) and
*followed* (mean m_p + r (μ − m_d), the package's rule). m, v are mean and variance on the images, of the pruned (p)
and the dense network (d). The rule is chosen on one half of the test images, ``select``, and reported on the other,
``top1``. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch_pruning as tp
from cifar import BLOCKS, Cifar10
from cifar_compensation import ARMS
from cifar_oneshot import Network
from common import Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from imagenette import CLASSES, Imagenette, efficientnet_lite0
from torch import Tensor, nn

from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    OBSImportance,
    Refit,
    prunable_groups,
    recalibrate_batchnorm,
    slice_classifier,
)
from tp_importance.maths.batchnorm import ChannelMoments as Moments
from tp_importance.statistics import batchnorm as calibrate
from tp_importance.statistics.dense_reference import DenseReference

RULES = ("left", "re-estimated", "shifted", "followed")
EFFICIENTNET = "efficientnet-lite0"
CRITERIA = {"L1": "L1, uniform", "Taylor": "Taylor, greedy", "CATRO": "CATRO consumer, greedy", "OBS": "OBS, greedy"}


def shifted(mean: Tensor, var: Tensor, dense: Moments, pruned: Moments) -> tuple[Tensor, Tensor]:
    """The rival: the mean moves by the difference, whatever the scale."""
    excited = dense.variance > 1e-4 * var
    ratio = torch.where(excited, pruned.variance / torch.where(excited, dense.variance, 1.0), 1.0)
    return mean.to(dense.mean) + pruned.mean - dense.mean, var.to(dense.mean) * ratio


def by_rule(rule: str, model: nn.Module, batches: Any, reference: DenseReference) -> nn.Module:
    """The network with statistics by a rule; ``model`` is not changed."""
    model = copy.deepcopy(model)
    if rule == "re-estimated":
        return recalibrate_batchnorm(model, batches)
    if rule == "shifted":
        with mock.patch.object(calibrate, "follow_change", shifted):
            return recalibrate_batchnorm(model, batches, reference=reference)
    return model if rule == "left" else recalibrate_batchnorm(model, batches, reference=reference)


class Cifar:
    """CIFAR ResNets: how they are pruned and judged."""

    def __init__(self, name: str, args: Any) -> None:
        self.net, self.data, self.n = Network(args.data_root, name, "cpu"), Cifar10.load(args.data_root), args.n_test

    def dense(self) -> nn.Module:
        return self.net.fresh()

    def pruner(self, model: nn.Module, criterion: str, macs: float, draw: int) -> tuple[BudgetPruner, Any]:
        batches = self.data.draw(draw, 500)
        ignored = [model.get_submodule(n) for n in self.net.ignored]
        options = {"budget": Budget(macs=macs), "ignored_layers": ignored, "verify": False}  # verified once in Network
        torch.manual_seed(draw)
        return ARMS[CRITERIA[criterion]](model, self.net.inputs, batches, self.net.layers, **options), batches

    def judged(self, model: nn.Module) -> dict[str, float]:
        return {
            "top1": round(self.data.accuracy(model, self.n), 3),
            "select": round(self.data.accuracy(model, self.n, start=10_000 - self.n), 3),
        }


class EfficientNet:
    """EfficientNet-Lite0 cut to ten classes, likewise; draws are 500 of the 1,000 training images."""

    def __init__(self, name: str, args: Any) -> None:
        self.data = Imagenette.load(args.data_root)
        self.x, self.y = (torch.cat(part) for part in zip(*self.data.train, strict=True))
        self.groups = prunable_groups(self.dense(), self.x[:2])

    def dense(self) -> nn.Module:
        return slice_classifier(efficientnet_lite0(), CLASSES)

    def pruner(self, model: nn.Module, criterion: str, macs: float, draw: int) -> tuple[BudgetPruner, Any]:
        chosen = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(draw))[:500]
        batches = list(zip(self.x[chosen].split(50), self.y[chosen].split(50), strict=True))
        importance, allocator = {
            "L1": (lambda: tp.importance.MagnitudeImportance(p=1), "uniform"),
            "CATRO": (CATROImportance, "greedy"),
            "OBS": (OBSImportance, "greedy"),
        }[criterion]
        reasons = {e.name: e.reason for e in self.groups.excluded}
        options = {"budget": Budget(macs=macs), "verify": lambda groups, _x: reasons, "allocator": allocator}
        return BudgetPruner(model, self.x[:2], batches, importance=importance(), **options), batches

    def judged(self, model: nn.Module) -> dict[str, float]:
        half = len(self.data.val) // 2
        parts = {"top1": self.data.val[:half], "select": self.data.val[half:]}
        return {key: round(Imagenette(self.data.train, val).accuracy(model), 3) for key, val in parts.items()}


def run(case: Any, cells: Cells, key: dict[str, Any]) -> None:
    """All cells that differ in the rule only."""
    missing = [rule for rule in RULES if {**key, "rule": rule} not in cells]
    if not missing:
        return
    model, refit = case.dense(), None if key["refit"] == "none" else key["refit"]
    dense = copy.deepcopy(model)
    pruner, batches = case.pruner(model, key["criterion"], key["macs_kept"], key["draw"])
    pruner.step(refit=None if refit is None else Refit(refit, recalibrate=False))
    model.zero_grad()
    reference = DenseReference.matched(dense, model)
    for rule in missing:
        cells.fill({**key, "rule": rule}, lambda rule=rule: case.judged(by_rule(rule, model, batches, reference)))


def table(results: dict[str, Any], column: str) -> str:
    """Mean ± standard deviation over draws of one half of the images."""
    cells = [flat(c) for c in results["cells"]]
    pruned = [c for c in cells if c["rule"] != "dense"]
    keys = dict.fromkeys((c["network"], c["refit"], c["macs_kept"], c["criterion"]) for c in pruned)
    dense = {c["network"]: c[column] for c in cells if c["rule"] == "dense"}
    rows = []
    for name, refit, macs, criterion in keys:
        row = [f"{name} ({dense[name]:.1f})", refit, f"{macs:g}", criterion]
        for rule in RULES:
            wanted = {"network": name, "refit": refit, "macs_kept": macs, "criterion": criterion, "rule": rule}
            found = [c[column] for c in cells if wanted.items() <= c.items()]
            spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
            row.append(f"{np.mean(found):.1f}{spread}" if found else "")
        rows.append(row)
    return markdown(["network (dense)", "refit", "MACs kept", "criterion", *RULES], rows)


def main() -> None:
    p = parser(__doc__, "batchnorm_rules.json")
    add_data_arguments(p)
    names = ["resnet20", "resnet32", "resnet56"]
    p.add_argument("--networks", nargs="+", choices=[*BLOCKS, EFFICIENTNET], default=names)
    p.add_argument("--criteria", nargs="+", choices=CRITERIA, default=["L1", "CATRO", "OBS"])
    p.add_argument(
        "--macs", type=float, nargs="+", default=[0.95, 0.7, 0.5], help="fractions of the MACs that are kept"
    )
    p.add_argument("--refits", nargs="+", choices=["none", "parallel"], default=["none", "parallel"])
    p.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="seeds of the images")
    p.add_argument("--n-test", type=int, default=1_000, help="test images of each half; EfficientNet: 500")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        cells = Cells(args.out, {"images": 500, "n_test": args.n_test}, environment("cpu", args.date))
        for name in args.networks:
            case = (EfficientNet if name == EFFICIENTNET else Cifar)(name, args)
            cells.fill({"network": name, "rule": "dense"}, lambda case=case: case.judged(case.dense()))
            for refit, macs, criterion, draw in product(args.refits, args.macs, args.criteria, args.draws):
                key = {"network": name, "refit": refit, "macs_kept": macs, "criterion": criterion, "draw": draw}
                run(case, cells, key)
    for column in ("select", "top1"):
        print(f"{column}:\n\n{table(read_results(args.out), column)}\n")


if __name__ == "__main__":
    main()
