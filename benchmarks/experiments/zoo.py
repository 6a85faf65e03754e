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
from torch import nn
from torchvision import models

from benchmarks.cells import ROOT
from benchmarks.data import load_module
from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, listing
from tp_importance import Budget, BudgetPruner, count_ops, prunable_groups
from tp_importance.allocation.curves import curve_from_scores
from tp_importance.allocation.registry import ALLOCATORS
from tp_importance.allocation.space import WidthSpace
from tp_importance.graph.cost import CostModel
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed, sample_units
from tp_importance.testing.networks import randomise_batchnorm

networks = load_module(ROOT / "tests" / "helpers" / "networks.py")
Build = Callable[[], nn.Module]
LARGER: dict[str, Build] = {
    "densenet121": models.densenet121,
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
    randomise_batchnorm(model, x)
    return model, x


def examine(name: str, run: Run) -> dict[str, Any]:
    """All checks on one network."""
    model, x = build(name)
    spent: dict[str, float] = {}
    last = [time.process_time()]

    def clock(name: str) -> None:
        """Processor seconds since the last call."""
        now = time.process_time()
        spent[name], last[0] = round(now - last[0], 2), now

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
        "shifts_caught": shifts_caught(groups, x, run.shifts),
    }
    clock("oracle_s")
    result["cost_exact"] = sum(cost_is_exact(groups, model, x, seed) for seed in range(run.draws))
    clock("surgeries_s")
    result["budgets"] = {a: budgets_met(groups, cost, a, run.budgets) for a in ALLOCATORS}
    clock("budgets_s")
    result["step"] = one_step(model, x, groups, cost)
    clock("step_s")
    return {**result, "seconds": spent}


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


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    try:
        return examine(key["network"], run)
    except Exception as error:  # a broken network must not hide the others
        return {"error": f"{type(error).__name__}: {error}"}


COLUMNS: dict[str, Any] = {
    "network": "{network}",
    "groups": "{groups}",
    "left out": lambda r: "; ".join(f"{n} {k}" for k, n in Counter(map(_kind, r["excluded"].values())).items()),
    "masked = removed": lambda r: r["masked_is_removed"] or "yes",
    "shifts caught": "{shifts_caught[0]}/{shifts_caught[1]}",
    "costs exact": "{cost_exact}",
    "budgets met": lambda r: " ".join(f"{a} {met}/{n}" for a, (met, n) in r["budgets"].items()),
    "step: MACs": "{step[reached]:.4f} of {step[budget]} (floor {step[floor]:.3f})",
    "groups s": "{seconds[verified_groups_s]}",
    "step s": "{seconds[step_s]}",
}


def by_network(rows: Rows) -> str:
    whole = listing([r for r in rows if "error" not in r], COLUMNS)
    return "\n".join([whole, *(f"| {r['network']} | {r['error']} |" for r in rows if "error" in r)])


def _kind(reason: str) -> str:
    for known in ("network's output", "mixes the channels", "not masking", "several groups", "smallest width"):
        if known in reason:
            return known
    return reason


EXPERIMENTS = (
    Experiment(
        "zoo",
        "prune the torchvision zoo",
        {"network": list(ZOO)},
        cell,
        settings={"shifts": 6, "draws": 3, "budgets": 20},
        show={"by-network": by_network},
        dense=False,
        smoke={"network": ["resnet18"], "shifts": 1, "draws": 1, "budgets": 2},
        threads=1,
        device="cpu",
    ),
)
