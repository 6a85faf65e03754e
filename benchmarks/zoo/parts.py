"""What is measured on a network of the zoo; every part by itself, so that one that hangs takes no other with it."""

from __future__ import annotations

import copy
import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.zoo.embedding import difference, in_precision
from benchmarks.zoo.entry import Network
from benchmarks.zoo.host import pruned_alone, said
from benchmarks.zoo.planted import planted
from tp_importance import Budget, BudgetError, BudgetPruner, count_ops, prunable_groups, prune
from tp_importance.allocation.curves import curve_from_scores
from tp_importance.allocation.registry import ALLOCATORS
from tp_importance.allocation.space import WidthSpace
from tp_importance.core.batches import tensors_in
from tp_importance.graph.cost import CostModel
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed, sample_units
from tp_importance.pruning.registry import find_importance

ENOUGH_S = 30.0
"""What takes longer is not repeated."""
PACKAGES = {"timm": "timm", "ultralytics": "ultralytics-opencv-headless", "transformers": "transformers"}
"""Where the networks of a family come from, beside torchvision."""
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


def best(work: Callable[[], Any], repeats: int) -> tuple[float, int, Any]:
    """Least of the seconds of some repetitions, their number, and the last result."""
    spent: list[float] = []
    while len(spent) < repeats and sum(spent) < ENOUGH_S:
        start = time.perf_counter()
        result = work()
        spent.append(time.perf_counter() - start)
    return round(min(spent), 4), len(spent), result


class Examination:
    """One network under examination; ``known`` holds the values of parts that are done."""

    def __init__(self, network: Network, known: Mapping[str, Any], repeats: int) -> None:
        self.network, self.known, self.repeats = network, known, repeats
        self.model, self.inputs = network.ready()

    @cached_property
    def groups(self) -> PrunableGroups:
        return self.find(True)

    def find(self, verify: bool) -> PrunableGroups:
        return prunable_groups(self.model, self.inputs, forward_fn=self.network.forward_fn, verify=verify)

    @property
    def output_layers(self) -> list[str]:
        found = self.known.get("verified", self.known.get("discovery", {}))
        return found.get("output_layers", [])


def forward(exam: Examination) -> dict[str, Any]:
    with torch.no_grad():
        exam.network.run(exam.model, exam.inputs)  # allocates what it needs
        seconds, _, _ = best(lambda: exam.network.run(exam.model, exam.inputs), exam.repeats)
    macs, params = count_ops(exam.model, exam.inputs, forward_fn=exam.network.forward_fn)
    shapes = [list(t.shape) for t in tensors_in(exam.inputs)]
    package = PACKAGES.get(exam.network.family)
    version = {"package": f"{package} {importlib.metadata.version(package)}"} if package else {}
    return {"s": seconds, "macs": macs, "params": params, "inputs": shapes, **version}


def discovery(exam: Examination) -> dict[str, Any]:
    seconds, runs, groups = best(lambda: exam.find(False), exam.repeats)
    return {"s": seconds, "runs": runs, "groups": len(groups), "output_layers": output_layers(groups)}


def verified(exam: Examination) -> dict[str, Any]:
    seconds, runs, groups = best(lambda: exam.find(True), exam.repeats)
    exam.groups = groups
    result: dict[str, Any] = {
        "s": seconds,
        "runs": runs,
        "groups": len(groups),
        "excluded": dict(Counter(e.kind for e in groups.excluded)),
        "reasons": {e.name: [e.kind, e.reason[:160]] for e in groups.excluded if e.kind not in ("output", "ignored")},
        "output_layers": output_layers(groups),
        "reach": within_reach(groups),
    }
    return {**result, "floor": floor(groups)} if len(groups) else result


def output_layers(groups: PrunableGroups) -> list[str]:
    return [name for e in groups.excluded if e.kind == "output" for name in e.layers]


def within_reach(groups: PrunableGroups) -> float:
    """MACs of convolutions and linear layers with at least one side in a group, over those of all such layers."""
    modules = dict(groups.trace.model.named_modules())
    members = {m.name for g in groups for m in g.members}
    macs: Counter[str] = Counter()
    for call in groups.trace.calls:
        if isinstance(modules[call.name], LAYERS):
            macs[call.name] += call.macs
    for name, count in groups.trace.functional.items():  # of weights that functions read
        owner = modules[name.rpartition(".")[0]]
        if not isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
            macs[name] += count
    reached = sum(count for name, count in macs.items() if _touched(name, members))
    return round(reached / max(macs.total(), 1), 4)


def _touched(name: str, members: set[str]) -> bool:
    owner = name.rpartition(".")[0]
    return name in members or owner in members or any(m.startswith(f"{name}.") for m in members)


def floor(groups: PrunableGroups) -> float:
    """Fraction of the MACs that is left with all groups at their least width."""
    cost = CostModel.from_groups(groups)
    return round(int(cost.evaluate(WidthSpace.of(groups.groups).floor)[0]) / cost.dense.macs, 4)


def half(exam: Examination) -> dict[str, Any]:
    """Prune to half of the MACs by L2, or halfway to the least that can be reached if that is more."""
    try:
        return {**pruned(exam, 0.5), "budget": 0.5}
    except BudgetError as error:
        reason = said(error)
    budget = round((1 + floor(exam.groups)) / 2, 3)
    return {**pruned(exam, budget), "budget": budget, "reason": reason, "met": False}


def pruned(exam: Examination, budget: float) -> dict[str, Any]:
    twin, forward_fn = copy.deepcopy(exam.model), exam.network.forward_fn
    start = time.perf_counter()
    result = prune(
        *(twin, exam.inputs, [exam.inputs]),
        budget=Budget(macs=budget),
        method="l2",
        refit=None,
        samples=None,
        forward_fn=forward_fn,
    )
    seconds = time.perf_counter() - start
    cost, dense = result.report.cost, count_ops(exam.model, exam.inputs, forward_fn=forward_fn)[0]
    counted = count_ops(twin, exam.inputs, forward_fn=forward_fn)
    return {
        "s": round(seconds, 4),
        "met": counted == (cost.macs, cost.params) and cost.macs <= budget * dense,
        "reached": round(cost.macs / dense, 4),
        "differs": difference(exam.model, twin, lambda m: exam.network.run(m, in_precision(exam.inputs, m))),
    }


def oracle(exam: Examination) -> dict[str, Any]:
    """Masked = removed with other channels than the verification used, errors that must be noticed, exact costs."""
    groups, inputs = exam.groups, exam.inputs
    groups.require_some()
    plan = _plan(exam)
    return {
        "masked_is_removed": masked_equals_removed(groups, inputs, sample_units(groups, seed=1)),
        "planned": plan and masked_equals_removed(groups, inputs, plan),
        "shifts_caught": shifts_caught(groups, inputs, 6),
        "costs_exact": sum(cost_is_exact(exam, seed) for seed in range(2)),
        "budgets": {a: budgets_met(groups, a, 20) for a in ("greedy", "uniform")},
    }


def _plan(exam: Examination) -> dict[str, list[int]] | None:
    """Units that L2 removes at half of the MACs; None if that is out of reach."""
    pruner = BudgetPruner(
        *(exam.model, exam.inputs),
        importance=find_importance("l2"),
        budget=Budget(macs=0.5),
        forward_fn=exam.network.forward_fn,
    )
    try:
        return pruner.plan().removed
    except BudgetError:
        return None


def shifts_caught(groups: PrunableGroups, inputs: Any, most: int) -> list[int]:
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
        caught += masked_equals_removed(alone, inputs, {name: removed[name]}, gated=gated) is not None
    return [caught, len(chosen)]


def cost_is_exact(exam: Examination, seed: int) -> bool:
    """Prune a copy to random widths and count what is left."""
    rng, groups, forward_fn = np.random.default_rng(seed), exam.groups, exam.network.forward_fn
    units = {g.name: int(rng.integers(g.min_units, g.n_units + 1)) for g in groups}
    removed = {g.name: rng.permutation(g.n_units)[units[g.name] :].tolist() for g in groups}
    twin = copy.deepcopy(exam.model)
    remove_units(groups, removed, model=twin)
    predicted = CostModel.from_groups(groups).cost({g.name: units[g.name] * g.unit_size for g in groups})
    return (predicted.macs, predicted.params) == tuple(count_ops(twin, exam.inputs, forward_fn=forward_fn))


def budgets_met(groups: PrunableGroups, allocator: str, n: int) -> list[int]:
    """[met, tried]: never above the budget, and not one more admissible step fits."""
    rng, cost = np.random.default_rng(0), CostModel.from_groups(groups)
    curves = {g.name: curve_from_scores(rng.random(g.n_units) * rng.random()) for g in groups}
    space, met = WidthSpace.of(groups.groups), 0
    least = int(cost.evaluate(space.floor)[0])
    for limit in np.linspace(least, cost.dense.macs, n).astype(int):
        units = ALLOCATORS[allocator](curves, cost, space, {"macs": int(limit)})
        spent, step = int(cost.evaluate(units)[0]), (units < cost.full).astype(int)
        more = cost.marginal(units, step)[0][step > 0]
        met += spent <= limit and bool((spent + more > limit).all())
    return [met, n]


def torch_pruning(exam: Examination) -> dict[str, Any]:
    return pruned_alone(exam.network, exam.model, exam.inputs, exam.output_layers)


def dead_channels(exam: Examination) -> dict[str, Any]:
    return planted(exam.network, exam.model, exam.inputs)


PARTS: dict[str, Callable[[Examination], dict[str, Any]]] = {
    "forward": forward,
    "discovery": discovery,
    "verified": verified,
    "half": half,
    "oracle": oracle,
    "planted": dead_channels,
    "torch_pruning": torch_pruning,
}
"""In order: Torch-Pruning comes last, for it is told which layers make the outputs."""
NEEDS_GROUPS = ("verified", "half", "oracle", "planted")
"""Parts that cannot end where the discovery does not."""


def parts_of(network: Network) -> list[str]:
    """Parts that are measured on a network."""
    return [name for name in PARTS if name != "planted" or network.planted]
