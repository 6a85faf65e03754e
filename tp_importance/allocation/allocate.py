"""Widths by any allocator under any limits, predicted ones too."""

from __future__ import annotations

from ..core.types import Ints
from ..graph.cost import LATENCY, CostModel
from .curves import Curves
from .greedy import greedy
from .limits import Limits, require_reachable
from .proportional import uniform
from .registry import Allocator
from .space import WidthSpace
from .walk import fill_up

__all__ = ["allocate"]

_PRICES_LATENCY = (greedy, uniform)
"""Allocators that take a limit of ``latency_ms`` as it is."""

_BISECTIONS = 16


def allocate(allocator: Allocator, curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """Widths by any allocator under any limits.

    Greedy and uniform know predicted latency. All other allocators know counts only; they are given the largest
    limit of MACs (by bisection) at which what they return also keeps the latency, and the rest of the budget is filled
    by gain per cost.

    Args:
        allocator: the allocator.
        curves: curve per group name.
        cost: the cost model.
        space: admissible widths.
        limits: upper limit per cost field, and of ``latency_ms``.

    Returns:
        units per group, shape (G,): with a latency limit within every limit, and no further step fits; else what the
        allocator returns.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
    """
    if LATENCY not in limits or allocator in _PRICES_LATENCY:
        return allocator(curves, cost, space, limits)
    require_reachable(cost, space, limits)
    counts = {f: v for f, v in limits.items() if f != LATENCY}
    low, high = (int(cost.spent(u, ["macs"])["macs"]) for u in (space.floor, space.full))
    high = min(high, int(counts.get("macs", high)))

    def under(macs: int) -> Ints:
        return allocator(curves, cost, space, {**counts, "macs": macs})

    if not cost.within(units := under(high), limits):
        units = space.floor
        for _ in range(_BISECTIONS):
            if high - low < 2:
                break
            middle = (low + high) // 2
            if cost.within(found := under(middle), limits):
                low, units = middle, found
            else:
                high = middle
        under(low)  # what the allocator says of its last widths is of these
    return fill_up(curves, cost, space, limits, units)
