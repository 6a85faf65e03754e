"""Masks of whole units on their way to a budget: how many units of each group are masked, which, and which never.

Knows groups and costs, but neither gates nor a training; see
:class:`~tp_importance.methods.psap.soft_pruning.SoftPruning`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal

import numpy as np

from ...allocation.greedy import WidthSpace, require_reachable
from ...budget import Cost
from ...core.types import Bools, Floats, Ints
from ...graph.cost import COST_FIELDS, CostModel
from ...graph.groups import ChannelGroup, PrunableGroups
from ...statistics.group_weights import GroupWeights, ParametersOf, own_parameters
from .history import GroupStep, PruneStep, PSAPHistory
from .sparsity import adaptive_widths, cubic_target, relative_norms, select_masked, weight_sparsity

__all__ = ["Ratios", "SoftMasks"]

Ratios = Literal["adaptive", "uniform"]

FOREVER = 2**31


class SoftMasks:
    """Masks that follow the weights, one prune step after the other.

    Args:
        groups: groups of the model, which keeps its shapes meanwhile.
        cost: their cost model.
        space: admissible widths.
        limits: cost to end with, by field.
        threshold: a in τ = a·RMS.
        ratios: ``"adaptive"`` by weight sparsity, or ``"uniform"`` (all sparsities taken as equal).
        protect_steps: prune steps during which a restored unit cannot be masked; ``None``: all that follow.
        parameters_of: parameters of a module by leaf name, where they are not in the module itself.

    Attributes:
        masked: per group a mask of shape (U,).
        history: what every prune step did.

    Raises:
        BudgetError: if the limits cannot be reached.
        ValueError: for bad options, or a group without filters of its own.
    """

    def __init__(
        self,
        groups: PrunableGroups,
        cost: CostModel,
        space: WidthSpace,
        limits: Mapping[str, int],
        *,
        threshold: float = 0.25,
        ratios: Ratios = "adaptive",
        protect_steps: int | None = 1,
        parameters_of: ParametersOf = own_parameters,
    ) -> None:
        if ratios not in ("adaptive", "uniform"):
            raise ValueError(f"ratios={ratios!r} must be 'adaptive' or 'uniform'")
        if protect_steps is not None and (not isinstance(protect_steps, Integral) or protect_steps < 0):
            raise ValueError(f"protect_steps={protect_steps!r} must be a non-negative integer, or None for all to come")
        weight_sparsity([], threshold)  # checks it
        for group in groups:
            if not group.producers:
                raise ValueError(f"group {group.name} has no filters whose weights could be ranked; ignore its layers")
        require_reachable(cost, space, limits)
        self.groups, self.cost_model, self.space, self.limits = groups, cost, space, dict(limits)
        self.threshold, self.ratios, self.protect_steps = threshold, ratios, protect_steps
        self.history = PSAPHistory()
        self.masked: dict[str, Bools] = {g.name: np.zeros(g.n_units, bool) for g in groups}
        self._weights = GroupWeights(groups, parameters_of)
        self._until = {g.name: np.zeros(g.n_units, np.int64) for g in groups}  # last prune step of the protection
        self._strength = {g.name: np.zeros(g.n_units) for g in groups}  # G with which a unit was restored
        self._step = 0

    @property
    def cost(self) -> Cost:
        """Cost of the network with the present masks removed."""
        return self.cost_model.cost({g.name: self._left(g) * g.unit_size for g in self.groups})

    @property
    def removed(self) -> dict[str, list[int]]:
        """Masked units per group."""
        return {name: np.flatnonzero(mask).tolist() for name, mask in self.masked.items()}

    def require_unchanged(self) -> None:
        """Raise ``StaleStatisticsError`` if the layers are not those the groups were built from."""
        self._weights.require_unchanged()

    # -- one prune step

    def _mask(self, steps: int, iteration: int) -> None:
        """The masks of prune step ``self._step`` of ``steps``, after ``iteration`` optimizer steps."""
        limits = self._limits_at(self._step, steps)
        sparsity = {
            g.name: weight_sparsity([f for f, _ in self._weights.filters(g, ~self.masked[g.name])], self.threshold)
            for g in self.groups
        }
        yielded = self._yield_protection(limits)
        protected = {g.name: self._protected(g.name) for g in self.groups}
        levels = self._levels(protected)
        values = list(sparsity.values()) if self.ratios == "adaptive" else [0.5] * len(self.groups)
        units, kappa = adaptive_widths(values, levels, self.cost_model.full, lambda u: self._fits(u, limits))
        for g, left in zip(self.groups, units.tolist(), strict=True):
            norms = relative_norms(self._weights.filters(g), g.n_units)
            self.masked[g.name] = select_masked(norms, self.masked[g.name], protected[g.name], g.n_units - left)
        hangs_on = -self.cost_model.marginal(units, -units)[COST_FIELDS.index("macs")]
        rows = tuple(
            GroupStep(
                group=g.name,
                sparsity=sparsity[g.name],
                ratio=float(self.masked[g.name].mean()),
                width=self._left(g) * g.unit_size,
                protected=_tuple(np.flatnonzero(protected[g.name])),
                macs=int(macs),
                yielded=yielded[g.name],
            )
            for g, macs in zip(self.groups, hangs_on, strict=True)
        )
        self.history.steps.append(PruneStep(self._step, iteration, limits, self.cost.as_dict(), float(kappa), rows))

    def _limits_at(self, step: int, steps: int) -> dict[str, int]:
        share = cubic_target(1.0, step, steps)
        dense = self.cost_model.dense.as_dict()
        return {f: dense[f] - math.ceil(share * max(dense[f] - limit, 0)) for f, limit in self.limits.items()}

    def _fits(self, units: Ints, limits: Mapping[str, int]) -> bool:
        return self.cost_model.within(units, limits)

    def _levels(self, protected: Mapping[str, Bools]) -> list[Ints]:
        """Admissible widths that leave room for the protected units."""
        pairs = zip(self.groups, self.space.levels, strict=True)
        return [lv[lv >= protected[g.name].sum()] for g, lv in pairs]

    def _yield_protection(self, limits: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Give up protections, those restored for the weakest gradient first, until the limits can be kept."""
        given_up: dict[str, list[int]] = {g.name: [] for g in self.groups}
        while True:
            protected = {g.name: self._protected(g.name) for g in self.groups}
            if self._fits(np.array([lv[0] for lv in self._levels(protected)], np.int64), limits):
                return {name: tuple(units) for name, units in given_up.items()}
            name, unit = min(
                ((n, int(u)) for n, mask in protected.items() for u in np.flatnonzero(mask)),
                key=lambda at: self._strength[at[0]][at[1]],
            )
            self._until[name][unit] = 0
            given_up[name].append(unit)

    def _protected(self, name: str) -> Bools:
        return self._until[name] >= max(self._step, 1)

    def _left(self, group: ChannelGroup) -> int:
        return int((~self.masked[group.name]).sum())

    # -- after a pulse

    def _restore(self, group: ChannelGroup, found: Ints, strength: Floats, last: bool) -> dict[str, tuple[int, ...]]:
        """Unmask ``found``; after the last step mask as many others of the group, for the budget's sake."""
        masked, change = self.masked[group.name], {}
        if last:
            norms = relative_norms(self._weights.filters(group), group.n_units)
            free = np.flatnonzero(~masked & ~self._protected(group.name))
            free = free[np.lexsort((norms[free], self._strength[group.name][free] > 0))]  # once restored: last
            found, kept_out = found[: len(free)], found[len(free) :]
            masked[free[: len(found)]] = True
            change = {"exchanged": _tuple(free[: len(found)]), "yielded": _tuple(kept_out)}
        masked[found] = False
        self._strength[group.name][found] = strength[found]
        self._until[group.name][found] = FOREVER if self.protect_steps is None else self._step + self.protect_steps
        return {"restored": _tuple(found), **change}


def _tuple(units: Any) -> tuple[int, ...]:
    return tuple(int(u) for u in units)
