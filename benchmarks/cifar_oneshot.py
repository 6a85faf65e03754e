"""One-shot pruning of pretrained CIFAR-10 ResNets: which criterion keeps the accuracy, without any training.

Every cell: block-internal channels (those of verified groups), a budget in MACs that is met exactly, batch norm
recalibrated on the images the criterion saw, top-1 on the test images. Random and magnitude run under the same
protocol; a spread is over draws of the images. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from cifar import BLOCKS, Batches, Cifar10, network
from common import FOLLOWED, Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from host_criteria import Fixed, accumulate_gradients, nni_metrics
from torch import nn

from tp_importance import Budget, BudgetPruner, CATROImportance, count_ops, prunable_groups
from tp_importance.allocation.curves import value_curves
from tp_importance.graph.groups import PrunableGroups

Make = Callable[[nn.Module, Batches, list[str]], Any]
BOTH = ("uniform", "greedy")


@dataclass(frozen=True)
class Criterion:
    """How to get the importance: ``make(model, batches, pruned layers)``, and the allocators it runs under."""

    make: Make
    allocators: tuple[str, ...] = BOTH


def _plain(importance: Callable[[], Any]) -> Make:
    return lambda model, batches, layers: importance()


def _with_gradients(importance: Callable[[], Any]) -> Make:
    def make(model: nn.Module, batches: Batches, layers: list[str]) -> Any:
        accumulate_gradients(model, batches)
        return importance()

    return make


def _nni(kind: str) -> Make:
    return lambda model, batches, layers: Fixed(model, nni_metrics(kind, model, batches, layers))


def _catro(**options: Any) -> Criterion:
    return Criterion(_plain(lambda: CATROImportance(**options)))


imp = tp.importance
CRITERIA: dict[str, Criterion] = {  # normalizer=None: raw scores, so that "greedy" ranks them across groups
    "random": Criterion(_plain(imp.RandomImportance)),
    "L1": Criterion(_plain(lambda: imp.MagnitudeImportance(p=1, normalizer=None))),
    "L2": Criterion(_plain(lambda: imp.MagnitudeImportance(p=2, normalizer=None))),
    "FPGM": Criterion(_plain(lambda: imp.FPGMImportance(normalizer=None))),
    "BN scale": Criterion(_plain(lambda: imp.BNScaleImportance(normalizer=None))),
    "Taylor": Criterion(_with_gradients(lambda: imp.TaylorImportance(normalizer=None))),
    "Taylor, multivariable": Criterion(
        _with_gradients(lambda: imp.TaylorImportance(normalizer=None, multivariable=True))
    ),
    "NNI L1": Criterion(_nni("l1"), ("uniform",)),
    "NNI FPGM": Criterion(_nni("fpgm"), ("uniform",)),
    "NNI Taylor": Criterion(_nni("taylor")),
    "CATRO channel, pooled": _catro(space="channel", pool=True),
    "CATRO channel, maps": _catro(space="channel", pool=False),
    "CATRO consumer": _catro(space="consumer"),
    "CATRO consumer, S_b only": _catro(space="consumer", class_weight=1.0),
    "CATRO consumer, S_w only": _catro(space="consumer", class_weight=0.0),
}


class Network:
    """A pretrained network and what may be pruned in it; groups are found and verified once."""

    def __init__(self, root: Any, name: str, device: str) -> None:
        self.root, self.name, self.device = root, name, device
        self.inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        self.model = self.fresh()
        self.groups = prunable_groups(self.model, self.inputs)
        self.layers = [m.name for g in self.groups for m in g.producers]
        counted = (nn.Conv2d, nn.Linear)
        self.ignored = [n for n, m in self.model.named_modules() if isinstance(m, counted) and n not in self.layers]

    def fresh(self) -> nn.Module:
        return network(self.root, self.name).to(self.device)

    def copy(self) -> tuple[nn.Module, PrunableGroups]:
        """A fresh model and its groups, the verified ones."""
        model = self.fresh()
        ignored = [model.get_submodule(n) for n in self.ignored]
        return model, prunable_groups(model, self.inputs, ignored, verify=False)


def run(net: Network, criterion: str, allocator: str, draw: int, args: Any, data: Cifar10) -> dict[str, Any]:
    """One cell of the table."""
    model, batches = net.fresh(), data.draw(draw, args.images)
    batches = [(x.to(args.device), y.to(args.device)) for x, y in batches]
    torch.manual_seed(draw)  # RandomImportance
    pruner = BudgetPruner(
        model,
        net.inputs,
        batches,
        importance=None,
        budget=Budget(macs=args.macs),
        allocator=allocator,
        ignored_layers=[model.get_submodule(n) for n in net.ignored],
        verify=False,  # done once in Network
    )
    start = _now(args.device)
    pruner.importance = _score(CRITERIA[criterion].make(model, batches, net.layers), model, net, batches, pruner.groups)
    scoring = _now(args.device) - start
    model.zero_grad()
    report = pruner.step(refit="batchnorm")
    return {
        "top1": round(data.accuracy(model, args.n_test, args.device), 3),
        "macs": report.cost.macs,
        "params": report.cost.params,
        "scoring_s": round(scoring, 4),
        "widths": [row.after for row in report.rows],
    }


class _Scored:
    """Curves that are there already: so that scoring is timed apart from allocation and surgery."""

    def __init__(self, curves: dict[str, Any]) -> None:
        self._curves = curves

    def curves(self, groups: PrunableGroups) -> dict[str, Any]:
        return self._curves


def _score(importance: Any, model: nn.Module, net: Network, batches: Batches, groups: PrunableGroups) -> _Scored:
    if isinstance(importance, CATROImportance):
        importance.collect(model, net.inputs, batches, groups=groups)
    return _Scored(value_curves(importance, groups))


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over draws, per network, criterion and allocator."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in map(flat, results["cells"]):
        rows.setdefault(tuple(cell[k] for k in ("network", "criterion", "allocator")), []).append(cell)
    lines = []
    for key, cells in sorted(rows.items(), key=lambda item: _order(item[0])):
        top1, seconds = ([c[k] for c in cells] for k in ("top1", "scoring_s"))
        spread = f" ± {np.std(top1, ddof=1):.2f}" if len(top1) > 1 else ""
        macs, params = (f"{np.mean([c[k] for c in cells]) / 1e6:.3f} M" for k in ("macs", "params"))
        lines.append([*key, f"{np.mean(top1):.2f}{spread}", len(top1), macs, params, f"{np.median(seconds):.2f}"])
    missing = {(c["key"]["network"], c["key"]["criterion"], c["reason"]) for c in results["left_out"]}
    notes = [f"\n{network}, {criterion}: left out, {reason}" for network, criterion, reason in sorted(missing)]
    header = ["network", "criterion", "widths", "top-1", "draws", "MACs", "params", "scoring s"]
    return markdown(header, lines) + "\n".join(notes)


def _order(key: tuple[str, ...]) -> tuple[Any, ...]:
    known = list(CRITERIA)
    return key[0], known.index(key[1]) if key[1] in known else -1, BOTH.index(key[2]) if key[2] in BOTH else -1


def main() -> None:
    p = parser(__doc__, "cifar_oneshot.json")
    add_data_arguments(p)
    p.add_argument("--networks", nargs="+", choices=BLOCKS, default=["resnet20", "resnet56"])
    p.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    p.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="seeds of the images the criteria see")
    p.add_argument("--images", type=int, default=500, help="images per draw")
    p.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs that is kept at most")
    p.add_argument("--n-test", type=int, default=10_000)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        settings = {"macs": args.macs, "images": args.images, "n_test": args.n_test}
        cells = Cells(args.out, settings | FOLLOWED, environment(args.device, args.date))
        data = Cifar10.load(args.data_root, args.npz)
        for name in args.networks:
            net = Network(args.data_root, name, args.device)
            dense = {"network": name, "criterion": "dense", "allocator": "", "draw": 0}
            cells.fill(dense, partial(_dense, net, args, data))
            for criterion in args.criteria:
                for allocator in CRITERIA[criterion].allocators:
                    for draw in args.draws:
                        key = {"network": name, "criterion": criterion, "allocator": allocator, "draw": draw}
                        cells.fill(key, partial(run, net, criterion, allocator, draw, args, data))
    print(table(read_results(args.out)))


def _dense(net: Network, args: Any, data: Cifar10) -> dict[str, Any]:
    model = net.fresh()
    macs, params = count_ops(model, net.inputs)
    return {
        "top1": round(data.accuracy(model, args.n_test, args.device), 3),
        "macs": macs,
        "params": params,
        "scoring_s": 0.0,
        "groups": net.groups.widths,
        "excluded": {e.name: e.reason for e in net.groups.excluded},
    }


if __name__ == "__main__":
    main()
