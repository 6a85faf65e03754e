r"""Structured optimal brain surgeon: the elimination order that counts the refit of the consumers.

A consumer with weight W (O × d, rows scaled by the gain g of the batch norm behind) sees inputs of covariance P. When
the features R go and the others are refitted (with ridge ε, see :mod:`.least_squares`), the output changes by

.. math:: L(R) = \operatorname{tr}\bigl(W_R\,[(\hat P^{-1})_{RR}]^{-1} W_R^\top\bigr), \qquad \hat P = P + \varepsilon I

the ridge term :math:`\varepsilon \|\Delta W\|^2` included (:mod:`.elimination_state` has the formulas). Greedy would
remove the unit of least price, refit, and price all others anew. That is done here for many units at a time: of the
cheapest sixteenth, those go together that are no dearer than all others once the ones before them in this round are
gone; so of two copies one stays. The losses count all interactions and are those of a direct refit; only the order
differs a little from that of single steps (docs/methods/obs.md has what was measured).

Large consumers are worked on in float32. The loss of the half that goes first is then checked in float64, and
everything repeated in float64 if it differs. Sources: optimal brain surgeon (Hassibi and Stork 1993), its structured
form in ZipLM (arXiv 2302.04089); the sum over consumers and the rounds are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .elimination_state import Features, ImpreciseError, ReadUnits, State, stacked
from .moments import Elimination

__all__ = ["ReadUnits", "eliminate_with_refit"]

RIDGE = 1e-3
"""Ridge relative to the mean variance of a consumer's features."""

ROUND = 16
"""One round considers the cheapest of so many units; up to that many units are left, they go one at a time."""

DOUBLE = 512
"""Features of a consumer up to which everything is done in float64."""

AGREEMENT = 1e-3
"""Fraction by which losses in float32 may differ from those in float64."""

SAME = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Prices that differ by less than this fraction of the largest are alike."""


def eliminate_with_refit(
    consumers: Sequence[ReadUnits],
    n_units: int,
    *,
    ridge: float = RIDGE,
    first: Sequence[int] = (),
    tie_break: NDArray[np.float64] | None = None,
) -> Elimination:
    r"""Remove units, least increase of :math:`\sum_r f_r L_r(R)` first, consumers refitted after each round.

    O(m³) per consumer with m features of the group, one m × m matrix; no loop over units.

    Args:
        consumers: who reads the units.
        n_units: U.
        ridge: ε relative to the mean of diag P, > 0.
        first: units that go first at no loss, in this order: those that do not vary.
        tie_break: second key, e.g. weight norms; the smaller goes first. Shape (U,).

    Returns:
        order and loss with c units left, shapes (U,) and (U + 1,); every loss is that of a direct refit.

    Raises:
        ValueError: if ``ridge`` is not positive, or a covariance is not positive semi-definite.

    Example:
        Unit 1 is twice unit 0, so either goes for (nearly) nothing; unit 2 has energy 1.

        >>> x = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> u = torch.stack([x[:, 0], 2 * x[:, 0], x[:, 1]], 1)
        >>> read = ReadUnits(torch.cov(u.T), torch.eye(3, dtype=torch.float64), torch.arange(3))
        >>> e = eliminate_with_refit([read], 3, ridge=1e-9)
        >>> bool(e.loss[2] < 1e-6), bool(e.loss[1] > 0.5)
        (True, True)
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge!r} must be above 0, e.g. {RIDGE}")
    alive = np.ones(n_units, bool)
    alive[list(first)] = False
    found = [f for f in (Features.of(c, alive, ridge) for c in consumers) if f is not None]
    preference = np.arange(n_units) if tie_break is None else np.lexsort((np.arange(n_units), tie_break)).argsort()
    large = any(f.size > DOUBLE for f in found)
    for dtype in (torch.float32, torch.float64) if large else (torch.float64,):
        try:
            order, steps = _in_rounds(stacked(found, dtype), alive, preference, SAME[dtype])
            loss = np.concatenate([np.cumsum(steps)[::-1], np.zeros(len(first) + 1)])
            if dtype == torch.float64 or _checks(found, order, loss):
                break
        except ImpreciseError as error:
            if dtype == torch.float64:
                raise ValueError(f"{error}; raise ridge={ridge}") from error
    return Elimination(np.concatenate([np.asarray(first, np.int64), order]), loss)


def _in_rounds(
    states: Sequence[State], alive: NDArray[np.bool_], preference: NDArray[np.int64], same: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Units in the order they go, and what each one costs by then."""
    left, order, costs, tolerance = np.flatnonzero(alive), [np.zeros(0, np.int64)], [np.zeros(0)], 0.0
    while len(left):
        price = np.zeros(len(alive))
        for state in states:
            price[state.units] += state.prices()
        if not np.isfinite(price[left]).all():
            raise ImpreciseError("the loss of a unit is not finite")
        tolerance = max(tolerance, same * float(price[left].max()))
        ranked = _ranked(price, left, preference, tolerance)
        n = max(1, len(left) // ROUND)
        going, cost = _together(states, ranked[:n], price[ranked[n]] if n < len(left) else np.inf, len(alive))
        order.append(going)
        costs.append(cost)
        left = left[~np.isin(left, going)]
    return np.concatenate(order), np.concatenate(costs)


def _ranked(
    price: NDArray[np.float64], left: NDArray[np.int64], preference: NDArray[np.int64], tolerance: float
) -> NDArray[np.int64]:
    """Units that are left, the cheapest first; of those alike, the preferred."""
    cheapest = left[np.argsort(price[left], kind="stable")]
    level = np.concatenate([[0], np.cumsum(np.diff(price[cheapest]) > tolerance)])
    return cheapest[np.lexsort((preference[cheapest], level))]


def _together(
    states: Sequence[State], units: NDArray[np.int64], limit: float, n_units: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Remove those of ``units`` that cost at most ``limit`` after the ones before; gives them and their costs."""
    while True:
        steps = [state.without(units) for state in states]
        cost = np.zeros(n_units)
        for step in steps:
            if step is not None:
                cost[step.units] += step.costs
        keep = cost[units] <= limit
        keep[0] = True
        if keep.all():
            break
        units = units[keep]
    for state, step in zip(states, steps, strict=True):
        if step is not None:
            state.remove(step)
    return units, cost[units]


def _checks(found: Sequence[Features], order: NDArray[np.int64], loss: NDArray[np.float64]) -> bool:
    """Whether the loss of the first half, found in float32, is that in float64."""
    half = len(order) // 2
    direct = sum(f.loss_without(order[:half]) for f in found)
    return abs(loss[len(order) - half] - direct) <= AGREEMENT * direct + 1e-6 * float(loss[0])
