"""Steps upwards from given widths, best first, as long as they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core.types import Ints
from ..graph.cost import COST_FIELDS, LATENCY, CostModel, headroom
from .curves import Curves, convex_envelope
from .limits import Limits, require_reachable
from .space import WidthSpace, round_down

__all__ = ["Walk", "fill_up"]

Prices = dict[str, NDArray[Any]]


class Walk:
    """Widths on their way up from the floor, with gains and prices of the next step of every group."""

    def __init__(self, curves: Curves, cost: CostModel, space: WidthSpace, fields: Sequence[str]):
        self.cost, self.space = cost, space
        self.level = np.zeros(len(space.levels), np.int64)
        self.units = space.floor
        self.counted = {f: COST_FIELDS.index(f) for f in fields if f != LATENCY}
        self.timed = cost.timed if LATENCY in fields else None
        self.scale = {f: max(v, 1e-9) for f, v in cost.spent(cost.full, fields).items()}
        envelopes = [convex_envelope(curves[n].loss) for n in cost.names]
        self.gains = [e[lv[:-1]] - e[lv[1:]] for e, lv in zip(envelopes, space.levels, strict=True)]
        self.steps = [np.diff(lv) for lv in space.levels]
        self.gain = np.array([g[0] if len(g) else -np.inf for g in self.gains])
        self.step = np.array([s[0] if len(s) else 0 for s in self.steps], np.int64)
        self.present = cost.spent(self.units, self.scale)
        # D + Dᵀ once: one row of it updates all marginal costs after a step
        self.coupling = cost.quadratic + cost.quadratic.transpose(0, 2, 1)
        self.diagonal = np.einsum("fgg->fg", cost.quadratic)
        self.slope = cost.linear + np.einsum("fgh,h->fg", self.coupling, self.units)

    @property
    def marginal(self) -> Prices:
        """Cost of the next step of every group by field, each of shape (G,)."""
        counts = self.step * (self.slope + self.diagonal * self.step)
        prices: Prices = {f: counts[row] for f, row in self.counted.items()}
        if self.timed is not None:
            prices[LATENCY] = self.timed.marginal(self.units, self.step)
        return prices

    def best(self, marginal: Prices, allowed: NDArray[np.bool_]) -> int:
        """Group with the largest gain per relative cost among ``allowed``."""
        price = sum(marginal[f] / self.scale[f] for f in marginal)
        ratio = np.where(allowed, self.gain / np.maximum(price, 1e-300), -np.inf)
        ratio[allowed & (price < 1e-12)] = np.inf  # costs nothing
        return int(ratio.argmax())

    def open(self) -> NDArray[np.bool_]:
        """Groups below their full width."""
        return self.step > 0

    def advance(self, g: int, marginal: Prices) -> None:
        """Take the next step of group ``g``."""
        step = self.step[g]
        self.present = {f: v + marginal[f][g] for f, v in self.present.items()}
        self.units[g] += step
        self.slope = self.slope + self.coupling[:, g] * step
        self.level[g] += 1
        more = self.level[g] < len(self.steps[g])
        self.gain[g] = self.gains[g][self.level[g]] if more else -np.inf
        self.step[g] = self.steps[g][self.level[g]] if more else 0

    def jump(self, units: Ints) -> None:
        """Go to admissible ``units`` at once."""
        self.level = np.array([np.searchsorted(lv, u) for lv, u in zip(self.space.levels, units, strict=True)])
        self.units = units.copy()
        self.present = self.cost.spent(units, self.scale)
        self.slope = self.cost.linear + np.einsum("fgh,h->fg", self.coupling, units)
        for g, level in enumerate(self.level):
            more = level < len(self.steps[g])
            self.gain[g] = self.gains[g][level] if more else -np.inf
            self.step[g] = self.steps[g][level] if more else 0

    def fits(self, marginal: Prices, limits: Limits) -> NDArray[np.bool_]:
        """Groups whose next step keeps every limit."""
        room = headroom(self.present, limits)
        return self.open() & np.all([marginal[f] <= room[f] for f in limits], axis=0)

    def fill(self, limits: Limits, frozen: int | None = None) -> Ints:
        """Take steps that fit, best first, until none fits (one that does not fit never will: costs only grow).

        Group ``frozen`` takes none.
        """
        while True:
            allowed = self.fits(marginal := self.marginal, limits)
            if frozen is not None:
                allowed[frozen] = False
            if not allowed.any():
                return self.units.copy()
            self.advance(self.best(marginal, allowed), marginal)


def fill_up(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits, target: ArrayLike) -> Ints:
    """Round any units down to admissible ones that keep the limits, and fill what is left by gain per cost.

    Args:
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths.
        limits: upper limit per cost field.
        target: units, need not be integer or admissible, shape (G,).

    Returns:
        units per group, shape (G,): within every limit, and no further step fits.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
    """
    require_reachable(cost, space, limits)
    goal, shrink = np.asarray(target, np.float64), 1e-9
    while not cost.within(units := round_down(space, goal), limits):  # it costs a rounding error too much
        goal, shrink = goal * (1 - shrink), 2 * shrink
    walk = Walk(curves, cost, space, tuple(limits))
    walk.jump(units)
    return walk.fill(limits)
