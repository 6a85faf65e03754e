"""Networks traced once, and what the contract asks of them, of masks and of pruners."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tp_importance import Budget, count_ops, prunable_groups
from tp_importance.budget import Cost
from tp_importance.core.guards import HOOKS
from tp_importance.graph.cost import CostModel
from tp_importance.graph.groups import PrunableGroups
from tp_importance.pruning.plan import Plan
from tp_importance.testing import class_loader, make_network, same_values

from .. import ImportancePruner, speedup
from ..config import Config, Masks

__all__ = [
    "BUDGETS",
    "HALF",
    "LEFT_OUT",
    "Case",
    "assert_budget_rule",
    "assert_masked_is_removed",
    "assert_same_masks",
    "case",
    "hooks",
    "output",
    "plan_of",
    "relative_error",
    "removed_filters",
    "threads",
    "warns_of_what_is_left_out",
    "wrappers",
]

HALF: Config = [{"op_types": ["Conv2d", "ConvTranspose2d", "Linear"], "sparse_ratio": 0.5}]
"""Half of every layer."""

BUDGETS = {
    "macs": Budget(macs=0.5),
    "params": Budget(params=0.5),
    "both": Budget(macs=0.6, params=0.55),
}
"""Budgets of each kind."""

LEFT_OUT = {"padded_shortcut": {"features.2.body.1.0", "features.3.body.1.0"}}
"""Groups that cannot be pruned exactly: normalised over channels, or meeting padding."""


@dataclass(frozen=True)
class Case:
    """A network, its inputs, data, groups and cost; shared between tests: prune a copy."""

    model: nn.Module
    x: Tensor
    loader: list[tuple[Tensor, Tensor]]
    groups: PrunableGroups
    cost: CostModel


@cache
def case(name: str) -> Case:
    """A network of :data:`tp_importance.testing.TOPOLOGIES`; the same object whenever it is asked for."""
    model, x = make_network(name)
    groups = prunable_groups(model, x)
    return Case(model, x, class_loader(shape=tuple(x.shape[1:])), groups, CostModel.from_groups(groups))


@contextmanager
def warns_of_what_is_left_out(name: str) -> Iterator[None]:
    """A warning is demanded where a network has groups that cannot be pruned, and is an error elsewhere."""
    if name in LEFT_OUT:
        with pytest.warns(UserWarning, match="left alone, though selected"):
            yield
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads within PyTorch's operations, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """What the model computes, without gradients."""
    return model(x)


def relative_error(masked: Tensor, small: Tensor) -> float:
    """Largest difference, over the largest value of the first."""
    return float((masked - small).abs().max() / masked.abs().max())


def hooks(model: nn.Module) -> int:
    """Number of hooks on all modules."""
    return sum(len(getattr(module, key)) for module in model.modules() for key in HOOKS)


def wrappers(model: nn.Module) -> list[str]:
    """Names of NNI's wrappers in the model."""
    return [name for name, _ in model.named_modules() if name.endswith("_nni_wrapper")]


def assert_same_masks(one: Masks, other: Masks) -> None:
    """The same targets of the same modules, and equal masks."""
    assert one.keys() == other.keys()
    for name, targets in one.items():
        assert targets.keys() == other[name].keys()
        for target, mask in targets.items():
            same = mask is other[name][target] if mask is None else torch.equal(mask, other[name][target])
            assert same, f"{name}.{target}"


def removed_filters(masks: Masks, name: str) -> int:
    """How many filters of a layer are masked completely."""
    return int((masks[name]["weight"].flatten(1) == 0).all(1).sum())


def plan_of(pruner: ImportancePruner) -> Plan:
    """What the pruner's masks remove; it must have some by now."""
    assert pruner.plan is not None, "no masks yet"
    return pruner.plan


def assert_budget_rule(pruner: ImportancePruner, budget: Budget, this: Case) -> None:
    """The cost keeps every limit, and not one more unit of any group would fit."""
    limits = budget.limits(this.cost.dense)
    assert all(getattr(plan_of(pruner).cost, f) <= limit for f, limit in limits.items())
    assert plan_of(pruner).cost == this.cost.cost(plan_of(pruner).widths)
    for group in this.groups:
        if plan_of(pruner).widths[group.name] < group.width:
            more = {**plan_of(pruner).widths, group.name: plan_of(pruner).widths[group.name] + group.unit_size}
            assert any(getattr(this.cost.cost(more), f) > limit for f, limit in limits.items()), group.name


def assert_masked_is_removed(
    pruner: ImportancePruner, masks: Masks, this: Case, wrapped_by: Any = None, *, engines: bool = False
) -> None:
    """The masked model, sped up, computes the same and costs what was planned.

    Args:
        pruner: has made the masks.
        masks: its masks.
        this: what the model was copied from.
        wrapped_by: the compressor whose wrappers are to go, if it is another one.
        engines: whether to try that both engines give one network, too: where the masks are from changes nothing there.
    """
    model = pruner.bound_model.eval()
    masked = output(model, this.x)
    (wrapped_by or pruner).unwrap_model()
    twin = copy.deepcopy(model) if engines else None
    speedup(model, this.x, masks)
    assert twin is None or same_values(model, speedup(twin, this.x, masks, engine="groups"))
    assert relative_error(masked, output(model, this.x)) <= 1e-5
    assert Cost(*count_ops(model, this.x)) == plan_of(pruner).cost
    assert plan_of(pruner).cost.macs < this.cost.dense.macs and plan_of(pruner).cost.params < this.cost.dense.params
