"""Widths in given proportions, equal ones say."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..core.types import Floats, Ints
from ..graph.cost import CostModel
from .curves import Curves
from .limits import Limits, require_reachable
from .space import WidthSpace, round_down
from .walk import fill_up

__all__ = ["proportional", "uniform"]


def uniform(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """The largest common kept fraction that fits, widths rounded down, then filled by gain per cost.

    Args and returns as :func:`~tp_importance.allocation.greedy.greedy`.
    """
    return proportional(curves, cost, space, limits, space.full)


def proportional(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits, shape: ArrayLike) -> Ints:
    """Widths in given proportions: the largest multiple of ``shape`` that fits, then filled by gain per cost.

    Args:
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths; floors and ceilings hold whatever the shape.
        limits: upper limit per cost field.
        shape: units, only their proportions count, shape (G,); all 0 is as all equal.

    Returns:
        units per group, shape (G,): within every limit, and no further step fits.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
        ValueError: if ``shape`` has another length, or a value is negative or not finite.
    """
    require_reachable(cost, space, limits)
    goal, full = np.asarray(shape, np.float64), space.full.astype(np.float64)
    if goal.shape != full.shape or not np.isfinite(goal).all() or (goal < 0).any():
        raise ValueError(f"shape {goal.tolist()} must be {len(full)} finite numbers >= 0")
    goal = goal if goal.any() else full
    most = float((full[goal > 0] / goal[goal > 0]).max())

    def scaled(factor: float) -> Floats:
        return np.minimum(factor * goal, full)

    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.within(round_down(space, scaled(middle)), limits) else (low, middle)
    factor = most if cost.within(round_down(space, scaled(most)), limits) else low
    return fill_up(curves, cost, space, limits, scaled(factor))
