"""A depthwise ImageNet network pruned to ten of its classes in one shot: class-aware against class-blind criteria.

EfficientNet-Lite0, the ten classes of Imagenette, 100 training images of each, no training. *Subtask*: the classifier
is cut to the ten classes first, so that only what they need counts. *Blind*: it has 1,000 outputs while channels
are valued and refitted, and is cut afterwards. Batch norms are re-estimated where nothing is refitted. Top-1 among
the ten on 1,000 validation images. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from cifar_compensation import by_outputs
from common import FOLLOWED, Cells, add_data_arguments, environment, flat, markdown, parser, read_results
from imagenette import CLASSES, Batches, Imagenette, efficientnet_lite0
from torch import nn

from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    OBSImportance,
    Refit,
    count_ops,
    slice_classifier,
)

imp = tp.importance


def _taylor(model: nn.Module, batches: Batches) -> Any:
    """Gradients of the ten-way loss; a network that is not cut yet is judged by its ten outputs."""
    for x, y in batches:
        output = model(x)
        output = output[:, list(CLASSES)] if output.shape[1] > len(CLASSES) else output
        F.cross_entropy(output, y, reduction="sum").backward()
    return imp.TaylorImportance(normalizer=None)


ARMS: dict[str, tuple[Callable[[nn.Module, Batches], Any], str, bool]] = {
    "L1, uniform": (lambda model, batches: imp.MagnitudeImportance(p=1), "uniform", True),
    "Taylor, greedy": (_taylor, "greedy", True),
    "CATRO blind": (lambda model, batches: CATROImportance(), "greedy", False),
    "CATRO subtask": (lambda model, batches: CATROImportance(), "greedy", True),
    "OBS blind": (lambda model, batches: OBSImportance(), "greedy", False),
    "OBS subtask": (lambda model, batches: OBSImportance(), "greedy", True),
    "OBS subtask, by outputs": (lambda model, batches: OBSImportance(), "greedy", True),
    "OBS subtask, θ = 0.8": (lambda model, batches: OBSImportance(class_weight=0.8), "greedy", True),
}
"""Importance, allocator, and whether the classifier is cut before."""
MODES = ("none", "parallel", "sequential")


def run(arm: str, mode: str, macs: float, args: Any, data: Imagenette) -> dict[str, Any]:
    """One cell of the table."""
    make, allocator, first = ARMS[arm]
    model = efficientnet_lite0().to(args.device)
    if first:
        slice_classifier(model, CLASSES)
    batches = [(x.to(args.device), y.to(args.device)) for x, y in data.train]
    x = batches[0][0][:1]
    start = time.perf_counter()
    budget = Budget(macs=macs if first else _equal_share(macs, x))
    importance = make(model, batches)
    pruner = BudgetPruner(model, x, batches, importance=importance, budget=budget, allocator=allocator)
    with by_outputs() if "by outputs" in arm else nullcontext():
        plan = pruner.plan()
    model.zero_grad()
    how = None if mode == "none" else Refit(mode, memory_limit=args.memory << 30)
    if mode == "sequential":
        pruner.loader = batches[: -(-args.refit_images // len(batches[0][0]))]
    pruner.apply(plan, refit=how)
    seconds = time.perf_counter() - start
    if not first:
        slice_classifier(model, CLASSES)
    cost = count_ops(model, x)
    return {
        "top1": round(data.accuracy(model, args.device), 2),
        "macs": cost[0],
        "params": cost[1],
        "pruning_s": round(seconds, 1),
        "widths": plan.widths,
    }


def _equal_share(macs: float, x: Any) -> int:
    """Budget of the whole network at which, the classifier cut afterwards, no more is left than of a cut one."""
    whole, cut = efficientnet_lite0(), slice_classifier(efficientnet_lite0(), CLASSES)
    dense = [count_ops(m.to(x.device), x)[0] for m in (whole, cut)]
    return int(macs * dense[1])


def _dense(args: Any, data: Imagenette) -> dict[str, Any]:
    model = slice_classifier(efficientnet_lite0(), CLASSES)
    macs, params = count_ops(model, data.val[0][0][:1])
    return {"top1": round(data.accuracy(model, args.device), 2), "macs": macs, "params": params}


def table(results: dict[str, Any]) -> str:
    """Top-1 by arm and refit, per budget."""
    cells = [flat(c) for c in results["cells"]]
    dense = next(c["top1"] for c in cells if c["arm"] == "dense")
    parts = []
    for macs in sorted({c["macs_kept"] for c in cells if c["arm"] != "dense"}, reverse=True):
        rows = []
        for arm in ARMS:
            mine = {c["mode"]: c["top1"] for c in cells if c["arm"] == arm and c["macs_kept"] == macs}
            rows += [[arm, *(f"{mine[m]:.1f}" if m in mine else "" for m in MODES)]] if mine else []
        parts.append(markdown([f"{macs:g} of the MACs (dense {dense:.1f})", "no refit", *MODES[1:]], rows))
    return "\n\n".join(parts)


def main() -> None:
    p = parser(__doc__, "imagenette_subtask.json")
    add_data_arguments(p)
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    p.add_argument("--modes", nargs="+", choices=MODES, default=["none", "sequential"])
    p.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.7], help="fractions of the MACs that are kept")
    p.add_argument("--refit-images", type=int, default=250, help="images of a sequential refit")
    p.add_argument("--memory", type=int, default=10, help="GiB that a sequential refit may take")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        data = Imagenette.load(args.data_root)
        cells = Cells(args.out, {"refit_images": args.refit_images} | FOLLOWED, environment(args.device, args.date))
        cells.fill({"arm": "dense", "mode": "", "macs_kept": 1.0}, partial(_dense, args, data))
        for macs in args.macs:
            for mode in args.modes:
                for arm in args.arms:
                    key = {"arm": arm, "mode": mode, "macs_kept": macs}
                    cells.fill(key, partial(run, arm, mode, macs, args, data))
    print(table(read_results(args.out)))


if __name__ == "__main__":
    main()
