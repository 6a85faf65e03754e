"""Widths by any allocator under any limits, predicted ones too."""

from __future__ import annotations

import numpy as np

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
        units per group, shape (G,), within every limit; with a latency limit no further step fits.

    Raises:
        BudgetError: if the floor exceeds a limit; names the least reachable cost.
        ValueError: if the allocator gives widths that are not admissible, or do not keep the limits.
    """
    if LATENCY not in limits or allocator in _PRICES_LATENCY:
        return _checked(allocator(curves, cost, space, limits), cost, space, limits)
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


def _checked(units: Ints, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """What an allocator gave, if it keeps its promise."""
    found = np.asarray(units)
    if found.shape != (len(cost.names),):
        raise ValueError(f"the allocator gives units of shape {found.shape}; one number per group, {len(cost.names)}")
    for name, levels, u in zip(cost.names, space.levels, found, strict=True):
        if u not in levels:
            raise ValueError(f"the allocator gives group {name} {u} units; admissible are {levels.tolist()}")
    whole = found.astype(np.int64)
    if not cost.within(whole, limits):
        spent = cost.cost(cost.widths(whole))
        raise ValueError(f"the allocator gives widths that cost {spent}, above the limits {dict(limits)}")
    return whole
