"""What must hold for every network that is drawn."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo.drawn.program import Program
from benchmarks.zoo.embedding import difference, in_precision
from tp_importance import Budget, BudgetError, BudgetPruner, count_ops, prunable_groups, prune
from tp_importance.budget import Cost
from tp_importance.graph.cost import CostModel
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.history import PruningHistory, repeat
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed

__all__ = ["examine", "examine_network"]


def examine(program: Program) -> dict[str, Any]:
    """Examine the network of a program, see :func:`examine_network`."""
    return examine_network(*program.network())


def examine_network(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Find the groups of a network, prune copies of it, and compare with what was promised.

    Args:
        model: the network, in eval mode, with values that are distinct within each of its tensors.
        x: example inputs.

    Returns:
        What was found: groups, kinds of those left out, whether a budget was met.

    Raises:
        AssertionError: if a promise is not kept.
        Exception: what the package raises.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = prunable_groups(model, x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "the network has changed"
    failed = [f"{e.name}: {e.reason}" for e in groups.excluded if e.kind == "unverified"]
    assert not failed or getattr(model, "fixes_sizes", False), (
        f"labels offered what verification refused: {'; '.join(failed)}"
    )
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"groups": len(groups), "excluded": sorted({e.kind for e in groups.excluded})}
    if not len(groups):
        return result
    for _ in range(2):
        units = {g.name: int(rng.integers(g.min_units, g.n_units + 1)) for g in groups}
        removed = {g.name: sorted(rng.permutation(g.n_units)[units[g.name] :].tolist()) for g in groups}
        _surgery(model, x, groups, removed)
    return {**result, **_budget(model, x, groups, float(rng.choice([0.3, 0.5, 0.8])))}


def _surgery(model: nn.Module, x: Tensor, groups: PrunableGroups, removed: Mapping[str, list[int]]) -> None:
    """Cost, values, history and names after one removal."""
    problem = masked_equals_removed(groups, x, dict(removed))
    assert problem is None, f"masked is not removed: {problem}"
    twin = copy.deepcopy(model)
    cuts = remove_units(groups, removed, model=twin)
    sizes = {g.name: g.width - len(removed[g.name]) * g.unit_size for g in groups}
    predicted = CostModel.from_groups(groups).cost(sizes)
    counted = tuple(count_ops(twin, x))
    assert (predicted.macs, predicted.params) == counted, f"predicted {predicted}, counted {counted}"
    _same_output(model, twin, x)
    history = PruningHistory.of(groups, removed, cuts)
    for direct in (True, False):
        fresh = copy.deepcopy(model)
        repeat(history.entries(direct=direct), prunable_groups(fresh, x))
        _equal(twin, fresh, f"the history (direct={direct})")
    _names_stay(groups, twin, x, sizes)


def _same_output(model: nn.Module, pruned: nn.Module, x: Tensor) -> None:
    """As the judge sees it that knows no groups; where it cannot tell places by values it says nothing."""
    problem = difference(model, pruned, lambda m: m(in_precision(x, m)))
    assert problem is None, f"it is not what is left of the network: {problem}"


def _equal(expected: nn.Module, found: nn.Module, what: str) -> None:
    a, b = expected.state_dict(), found.state_dict()
    assert a.keys() == b.keys()
    wrong = [k for k in a if a[k].shape != b[k].shape or not torch.equal(a[k], b[k])]
    assert not wrong, f"{what} gives other tensors: {', '.join(wrong[:4])}"


def _names_stay(groups: PrunableGroups, twin: nn.Module, x: Tensor, sizes: Mapping[str, int]) -> None:
    """Every group that could lose more is found again in the pruned network, at its new width, and there is no other.

    Where two channels are left of which code makes two groups of one, labels do not see that it fixes their number; the
    verification does.
    """
    least = {g.name: g.min_units * g.unit_size for g in groups}
    expected = {name: size for name, size in sizes.items() if size > least[name]}
    found = prunable_groups(twin, x, verify=False).widths
    if found != expected:
        found = prunable_groups(twin, x).widths
    assert found == expected, f"groups of the pruned network are {found} instead of {expected}"


def _budget(model: nn.Module, x: Tensor, groups: PrunableGroups, fraction: float) -> dict[str, Any]:
    """Met twice, to the operation, or refused with the cost of all groups at their least width."""
    cost = CostModel.from_groups(groups)
    limit, dense = fraction * cost.dense.macs, cost.dense.macs
    least = cost.cost({g.name: g.min_units * g.unit_size for g in groups}).macs
    twin = copy.deepcopy(model)
    try:
        done = prune(twin, x, [x], budget=Budget(macs=fraction), method="l2", refit=None, samples=None)
    except BudgetError as error:
        named = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", str(error))]
        assert least > limit and least in named, f"refused though {least} of {limit} MACs can be reached: {error}"
        smallest = copy.deepcopy(model)
        remove_units(groups, {g.name: list(range(g.min_units, g.n_units)) for g in groups}, model=smallest)
        assert count_ops(smallest, x)[0] == least, "the least cost is not that of all groups at their least width"
        _equal(model, twin, "a refused budget")
        return {"budget": "refused", "least": round(least / dense, 4)}
    spent = done.report.cost
    assert least <= spent.macs <= limit, f"{spent.macs} MACs for a budget of {limit}, {least} at least"
    _pruned_rightly(model, twin, x, done.pruner, spent)
    if not len(done.pruner.groups):
        return {"budget": "met", "reached": round(spent.macs / dense, 4)}
    try:
        again = done.pruner.step(Budget(macs=fraction * spent.macs / dense))
    except BudgetError:
        pass
    else:
        assert again.cost.macs <= fraction * spent.macs, "the second step misses its budget"
        _pruned_rightly(model, done.pruner.model, x, done.pruner, again.cost)
    return {"budget": "met", "reached": round(spent.macs / dense, 4)}


def _pruned_rightly(model: nn.Module, twin: nn.Module, x: Tensor, pruner: BudgetPruner, spent: Cost) -> None:
    """Cost, values, history and groups of a pruner after a step."""
    assert (spent.macs, spent.params) == tuple(count_ops(twin, x)), "the report names another cost"
    _same_output(model, twin, x)
    for direct in (True, False):
        fresh = copy.deepcopy(model)
        repeat(pruner.pruning_history(direct=direct), prunable_groups(fresh, x))
        _equal(twin, fresh, f"pruning_history(direct={direct})")
