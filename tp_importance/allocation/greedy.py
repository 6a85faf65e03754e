"""Widths by the largest gain per cost, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..core.types import Ints
from ..graph.cost import LATENCY, CostModel
from .curves import Curves
from .limits import Limits, require_reachable
from .space import WidthSpace
from .walk import Walk, fill_up

__all__ = ["greedy", "greedy_path"]


def greedy_path(
    curves: Curves, cost: CostModel, space: WidthSpace, fields: Sequence[str] = ("macs",)
) -> Iterator[tuple[int, int]]:
    r"""One sequence of steps from the floor to the full network, the same for every budget.

    Each step takes the group with the largest

    .. math:: \frac{L_g(c_g) - L_g(c_g^+)}{\sum_f \Delta cost_f / cost_f(\text{full})}

    where L is the convex envelope of the group's loss, :math:`c^+` its next admissible width and Δ the true
    marginal cost at the present widths.

    Args:
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths.
        fields: which costs make the price.

    Yields:
        ``(group index, units after the step)``.
    """
    walk = Walk(curves, cost, space, fields)
    while walk.open().any():
        marginal = walk.marginal
        g = walk.best(marginal, walk.open())
        walk.advance(g, marginal)
        yield g, int(walk.units[g])


def greedy(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """Follow :func:`greedy_path` to the first step that does not fit, then fill what is left of the budget.

    Under a limit of ``latency_ms`` a step is priced by the latency it is predicted to cost, and goes up a whole stair.

    Two stages, as in CATRO's greedy allocation; no constant-factor guarantee holds for products of widths. Source:
    ours (the paper's own two-stage procedure is known by its abstract only).

    Args:
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths.
        limits: upper limit per cost field.

    Returns:
        units per group, shape (G,): within every limit, and no further step fits.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
    """
    require_reachable(cost, space, limits)
    walk = Walk(curves, cost, _stair_tops(cost, space) if LATENCY in limits else space, tuple(limits))
    while walk.open().any():
        marginal = walk.marginal
        g = walk.best(marginal, walk.open())
        if not walk.fits(marginal, limits)[g]:
            break
        walk.advance(g, marginal)
    return fill_up(curves, cost, space, limits, walk.fill(limits))


def _stair_tops(cost: CostModel, space: WidthSpace) -> WidthSpace:
    """The widths, of every group by itself, beyond which one more unit costs latency.

    Latency is a staircase: the first channel of a block pays for all of it. So greedy takes a block as one step.
    """
    longest = max((len(lv) for lv in space.levels), default=0)
    full = space.full
    at = [[lv[min(k, len(lv) - 1)] for lv in space.levels] for k in range(longest)]
    ms = np.array([cost.timed.marginal(full, np.array(units, np.int64) - full) for units in at])
    least = 1e-9 * cost.timed.predict(full)
    levels = []
    for g, lv in enumerate(space.levels):
        rises = np.diff(ms[: len(lv), g]) > least
        levels.append(lv[np.concatenate([[True], rises[1:], [True]]) if len(lv) > 1 else [True]])
    return WidthSpace(tuple(levels))
