"""Does pruning work on every network? Groups, the masked = removed oracle, exact costs, budgets and one real step.

Random weights: nothing here depends on what a network has learned. The oracle is asked with other channels than those
`prunable_groups` itself verifies with, and must object when a consumer's channels are shifted by one.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from common import ROOT, Cells, environment, flat, load_module, markdown, parser, read_results
from torch import nn
from torchvision import models

from tp_importance import Budget, BudgetPruner, count_ops, prunable_groups
from tp_importance.allocation.curves import curve_from_scores
from tp_importance.allocation.registry import ALLOCATORS
from tp_importance.allocation.space import WidthSpace
from tp_importance.graph.cost import CostModel
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed, sample_units

networks = load_module(ROOT / "tests" / "networks.py")
Build = Callable[[], nn.Module]
LARGER: dict[str, Build] = {
    "mobilenet_v3_large": models.mobilenet_v3_large,
    "resnext50_32x4d": models.resnext50_32x4d,
    "squeezenet1_1": models.squeezenet1_1,
    "shufflenet_v2_x1_0": models.shufflenet_v2_x1_0,
    "mnasnet1_0": models.mnasnet1_0,
    "convnext_tiny": models.convnext_tiny,
    "vit_b_16": partial(models.vit_b_16, image_size=64),
    "inception_v3": partial(models.inception_v3, aux_logits=False, init_weights=False, transform_input=False),
}
ZOO: dict[str, Build] = {**networks.ZOO, **LARGER}
SIZE = {"inception_v3": 96}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, size = ZOO[name](), SIZE.get(name, 64)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    networks.randomise_batchnorm(model, x)
    return model, x


def examine(name: str, args: Any) -> dict[str, Any]:
    """All checks on one network."""
    model, x = build(name)
    clock = _Clock()
    found = prunable_groups(model, x, verify=False)
    clock("trace_s")
    groups = prunable_groups(model, x)
    clock("verified_groups_s")
    cost = CostModel.from_groups(groups)
    result = {
        "groups": len(groups),
        "excluded": {e.name: e.reason for e in groups.excluded},
        "unsafe": [e.name for e in groups.excluded if e.name in found.names],
        "dense": cost.dense.as_dict(),
        "count_ops": list(count_ops(model, x)),
        "masked_is_removed": masked_equals_removed(groups, x, sample_units(groups, seed=1)),
        "shifts_caught": shifts_caught(groups, x, args.shifts),
    }
    clock("oracle_s")
    result["cost_exact"] = sum(cost_is_exact(groups, model, x, seed) for seed in range(args.draws))
    clock("surgeries_s")
    result["budgets"] = {a: budgets_met(groups, cost, a, args.budgets) for a in ALLOCATORS}
    clock("budgets_s")
    result["step"] = one_step(model, x, groups, cost)
    clock("step_s")
    return {**result, "seconds": clock.spent}


def shifts_caught(groups: PrunableGroups, x: torch.Tensor, most: int) -> list[int]:
    """[caught, tried]: shift one consumer of a group by one unit in the gates, as a wrong index map would."""
    removed, caught = sample_units(groups, seed=2), 0
    chosen = [groups.names[i] for i in np.unique(np.linspace(0, len(groups) - 1, most).astype(int))]
    for name in chosen:
        group = groups[name]
        consumer = group.consumers[-1]
        wrong = replace(consumer, units=(consumer.units + 1) % group.n_units)
        shifted = replace(group, members=tuple(wrong if m is consumer else m for m in group.members))
        gated = PrunableGroups([shifted], [], groups.trace, groups.options)
        alone = PrunableGroups([group], [], groups.trace, groups.options)
        caught += masked_equals_removed(alone, x, {name: removed[name]}, gated=gated) is not None
    return [caught, len(chosen)]


def cost_is_exact(groups: PrunableGroups, model: nn.Module, x: torch.Tensor, seed: int) -> bool:
    """Prune a copy to random widths and count what is left."""
    rng = np.random.default_rng(seed)
    units = {g.name: int(rng.integers(g.min_units, g.n_units + 1)) for g in groups}
    widths = {g.name: units[g.name] * g.unit_size for g in groups}
    removed = {g.name: rng.permutation(g.n_units)[units[g.name] :].tolist() for g in groups}
    twin = copy.deepcopy(model)
    again = prunable_groups(twin, x, verify=False)
    again = again.exclude({n: "unsafe" for n in again.names if n not in removed})
    remove_units(again, removed)
    predicted = CostModel.from_groups(groups).cost(widths)
    return (predicted.macs, predicted.params) == tuple(count_ops(twin, x))


def budgets_met(groups: PrunableGroups, cost: CostModel, allocator: str, n: int) -> list[int]:
    """[met, tried]: never above the budget, and not one more admissible step fits."""
    rng = np.random.default_rng(0)
    curves = {g.name: curve_from_scores(rng.random(g.n_units) * rng.random()) for g in groups}
    space, met = WidthSpace.of(groups.groups), 0
    floor = int(cost.evaluate(space.floor)[0])
    for limit in np.linspace(floor, cost.dense.macs, n).astype(int):
        units = ALLOCATORS[allocator](curves, cost, space, {"macs": int(limit)})
        spent, step = int(cost.evaluate(units)[0]), (units < cost.full).astype(int)
        more = cost.marginal(units, step)[0][step > 0]
        met += spent <= limit and bool((spent + more > limit).all())
    return [met, n]


def one_step(model: nn.Module, x: torch.Tensor, groups: PrunableGroups, cost: CostModel) -> dict[str, Any]:
    """Prune to half of the MACs, or halfway to the floor if that is out of reach."""
    floor = int(cost.evaluate(WidthSpace.of(groups.groups).floor)[0]) / cost.dense.macs
    target = 0.5 if floor <= 0.5 else round((1 + floor) / 2, 3)
    importance = tp.importance.MagnitudeImportance(p=2)
    report = BudgetPruner(model, x, importance=importance, budget=Budget(macs=target)).step()
    with torch.no_grad():
        out = model.eval()(x)
    return {
        "budget": target,
        "floor": round(floor, 4),
        "macs": report.cost.macs,
        "reached": round(report.cost.macs / cost.dense.macs, 4),
        "finite": bool(torch.isfinite(out).all()),
        "shape": list(out.shape),
    }


class _Clock:
    """Processor seconds since the last call, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._last = time.process_time()

    def __call__(self, name: str) -> None:
        now = time.process_time()
        self.spent[name], self._last = round(now - self._last, 2), now


def table(results: dict[str, Any]) -> str:
    rows = []
    for cell in map(flat, results["cells"]):
        if "error" in cell:
            rows.append([cell["network"], cell["error"]])
            continue
        caught, shifted = cell["shifts_caught"]
        exact = cell["cost_exact"]
        budgets = " ".join(f"{a} {met}/{n}" for a, (met, n) in cell["budgets"].items())
        step = cell["step"]
        reasons = Counter(_kind(r) for r in cell["excluded"].values())
        rows.append(
            [
                cell["network"],
                cell["groups"],
                "; ".join(f"{n} {r}" for r, n in reasons.items()),
                cell["masked_is_removed"] or "yes",
                f"{caught}/{shifted}",
                exact,
                budgets,
                f"{step['reached']:.4f} of {step['budget']} (floor {step['floor']:.3f})",
                cell["seconds"]["verified_groups_s"],
                cell["seconds"]["step_s"],
            ]
        )
    header = ["network", "groups", "left out", "masked = removed", "shifts caught", "costs exact", "budgets met"]
    return markdown([*header, "step: MACs", "groups s", "step s"], rows)


def _kind(reason: str) -> str:
    for known in ("network's output", "mixes the channels", "not masking", "several groups", "smallest width"):
        if known in reason:
            return known
    return reason


def main() -> None:
    p = parser(__doc__, "zoo.json")
    p.set_defaults(threads=1)
    p.add_argument("--networks", nargs="+", choices=ZOO, default=list(ZOO))
    p.add_argument("--shifts", type=int, default=6, help="groups to plant a shifted index in")
    p.add_argument("--draws", type=int, default=3, help="random width vectors to prune to")
    p.add_argument("--budgets", type=int, default=20, help="budgets from the floor to the whole network")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        settings = {"shifts": args.shifts, "draws": args.draws, "budgets": args.budgets}
        cells = Cells(args.out, settings, environment("cpu", args.date))
        for name in args.networks:
            cells.fill({"network": name}, partial(_or_error, name, args))
    print(table(read_results(args.out)))


def _or_error(name: str, args: Any) -> dict[str, Any]:
    try:
        return examine(name, args)
    except Exception as error:  # a broken network must not hide the others
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
