"""Widths by one multiplier on the exact cost, with a lower bound where one can be had."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..core.types import Floats, Ints
from ..graph.cost import COST_FIELDS, CostModel
from .curves import Curves
from .greedy import greedy
from .limits import Limits, require_reachable
from .space import WidthSpace
from .walk import Walk

__all__ = ["LagrangeAllocator", "lagrange"]

HALVINGS = 40
"""Bisections of the multiplier, on a logarithmic scale."""

SWEEPS = 50
"""Most rounds over the groups for one multiplier, and most rounds of exchanges."""


class LagrangeAllocator:
    r"""Widths of least total loss: one multiplier, then exchanges of single steps.

    .. math:: \min_c \sum_g L_g(c_g) + \mu \sum_f \mathrm{cost}_f(c) / \mathrm{cost}_f(\text{full})

    is solved group by group, each over all its admissible widths with the others fixed, until nothing moves; μ is
    bisected until the limits are kept. Where the cost is linear the minimisers are the vertices of the convex
    envelopes. What is left of the budget is filled, then every group is tried one step lower if what that frees buys
    more elsewhere. The greedy widths go through the same exchanges, and the better result is returned: never worse
    than :func:`~tp_importance.allocation.greedy.greedy`. Unlike it, it minimises the losses themselves, not their
    envelopes.

    Attributes:
        certificate: of the last solve: the ``loss`` reached and, where no limit multiplies widths of different
            groups, its ``bound``: no admissible widths within the limits lose less. The bound is the Lagrangian dual;
            with products of widths the inner minimum is only local and proves nothing, so none is given.

    Example:
        >>> import torch, torch_pruning as tp
        >>> from torch import nn
        >>> from tp_importance import Budget, BudgetPruner
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> pruner = BudgetPruner(net, torch.randn(1, 3, 12, 12), budget=Budget(macs=0.5),
        ...                       importance=tp.importance.MagnitudeImportance(p=1), allocator=LagrangeAllocator())
        >>> sorted(pruner.plan().certificate)  # both groups meet in a layer: no bound
        ['loss']
    """

    def __init__(self) -> None:
        self.certificate: dict[str, float] = {}

    def __call__(self, curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
        """Units per group, as any :data:`~tp_importance.allocation.registry.Allocator`.

        Raises:
            BudgetError: if the floor exceeds a limit; names the least reachable cost.
        """
        require_reachable(cost, space, limits)
        problem = _Problem(curves, cost, space, limits)
        found, bound = [greedy(curves, cost, space, limits)], -np.inf
        for multiplier, units in problem.path():
            if problem.fits(units):
                found.append(problem.fill(units))
            bound = max(bound, problem.dual(multiplier, units))
        best = min({tuple(u): u for u in found}.values(), key=problem.loss)
        best = min((problem.exchange(u) for u in (found[0], best)), key=problem.loss)
        self.certificate = {"loss": problem.loss(best)} | ({"bound": bound} if problem.separable else {})
        return best


def lagrange(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """:class:`LagrangeAllocator` without its certificate; args and returns as for ``greedy``."""
    return LagrangeAllocator()(curves, cost, space, limits)


class _Problem:
    """Losses at admissible widths, and one price: the sum of the limited costs relative to the full ones."""

    def __init__(self, curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> None:
        self.curves, self.cost, self.space, self.limits = curves, cost, space, limits
        self.losses: list[Floats] = [curves[n].loss[lv] for n, lv in zip(cost.names, space.levels, strict=True)]
        self.walk = Walk(curves, cost, space, tuple(limits))
        self.rows = [COST_FIELDS.index(f) for f in limits]
        self.most = np.array(list(limits.values()), np.int64)
        self.scale = np.maximum(cost.evaluate(cost.full)[self.rows], 1).astype(np.float64)
        self.linear = (cost.linear[self.rows] / self.scale[:, None]).sum(0)
        quadratic = (cost.quadratic[self.rows] / self.scale[:, None, None]).sum(0)
        self.diagonal = quadratic.diagonal().copy()
        self.coupling = quadratic + quadratic.T
        np.fill_diagonal(self.coupling, 0.0)
        self.separable = not self.coupling.any()

    def loss(self, units: Ints) -> float:
        """Sum of the losses of all groups."""
        return float(sum(self.curves[n].loss[u] for n, u in zip(self.cost.names, units, strict=True)))

    def fits(self, units: Ints) -> bool:
        """Whether every limit is kept."""
        return self.cost.within(units, self.limits)

    def fill(self, units: Ints) -> Ints:
        """Steps from ``units`` that fit, by gain per cost."""
        self.walk.jump(units)
        return self.walk.fill(self.limits)

    def minimise(self, multiplier: float, units: Ints) -> Ints:
        """Group by group, all others fixed, until nothing moves; the global minimum if separable."""
        units = units.copy()
        for _ in range(SWEEPS):
            before = units.copy()
            for g, levels in enumerate(self.space.levels):
                slope = self.linear[g] + self.coupling[g] @ units
                value = self.losses[g] + multiplier * levels * (slope + self.diagonal[g] * levels)
                units[g] = levels[int(value.argmin())]
            if (units == before).all():
                break
        return units

    def path(self) -> Iterator[tuple[float, Ints]]:
        """Multipliers by bisection towards the limits, and their widths."""
        full, floor = self.space.full, self.space.floor
        spread = sum(float(np.ptp(v)) for v in self.losses)
        if self.fits(full) or not spread > 0:
            yield 0.0, self.minimise(0.0, full)
            return
        low, high = np.log(spread) - 30.0, np.log(spread) + 30.0
        above, below = full, floor
        for _ in range(HALVINGS):
            multiplier = float(np.exp((low + high) / 2))
            starts = [above] if self.separable else [above, below]
            units = min((self.minimise(multiplier, s) for s in starts), key=lambda u: self._lagrangian(multiplier, u))
            yield multiplier, units
            if self.fits(units):
                high, below = (low + high) / 2, units
            else:
                low, above = (low + high) / 2, units

    def dual(self, multiplier: float, units: Ints) -> float:
        """Value of the dual at ``multiplier``, if ``units`` is the inner minimum."""
        values = self.cost.evaluate(units)[self.rows]
        excess = (values - self.most) / self.scale
        return self.loss(units) + multiplier * float(excess.sum())

    def exchange(self, units: Ints) -> Ints:
        """One group a step lower, what that frees to the others: as long as the loss falls."""
        best = units
        for _ in range(SWEEPS):
            before = best
            for g, levels in enumerate(self.space.levels):
                level = int(np.searchsorted(levels, best[g]))
                if level == 0:
                    continue
                lower = best.copy()
                lower[g] = levels[level - 1]
                self.walk.jump(lower)
                self.walk.fill(self.limits, frozen=g)
                other = self.walk.fill(self.limits)
                if self.loss(other) < self.loss(best) * (1 - 1e-12):
                    best = other
            if best is before:
                break
        return best

    def _lagrangian(self, multiplier: float, units: Ints) -> float:
        price = self.cost.evaluate(units)[self.rows] / self.scale
        return self.loss(units) + multiplier * float(price.sum())
