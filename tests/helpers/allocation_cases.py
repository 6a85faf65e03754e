"""Loss curves and limits for allocators, and what every allocator keeps."""

import numpy as np

from tp_importance.allocation.curves import Curve
from tp_importance.graph.cost import COST_FIELDS


def random_curves(groups, seed=0):
    """Convex, bumpy and flat ones, with values of any size."""
    rng = np.random.default_rng(seed)
    curves = {}
    for i, g in enumerate(groups):
        steps = rng.exponential(size=g.n_units) * 10.0 ** rng.uniform(-2, 2)
        if i % 3 == 0:
            steps = np.sort(steps)[::-1]  # diminishing returns
        if i % 4 == 3:
            steps = np.zeros_like(steps)
        loss = np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]])
        curves[g.name] = Curve(loss, rng.permutation(g.n_units))
    return curves


def limits_of(cost, space, kind, fraction):
    """Limits between the floor's cost (0) and the dense one (1)."""
    low, high = cost.evaluate(space.floor), cost.evaluate(cost.full)
    limits = dict(zip(COST_FIELDS, (low + (high - low) * fraction).astype(int).tolist(), strict=True))
    return limits if kind == "both" else {kind: limits[kind]}


def fits(cost, units, limits):
    values = dict(zip(COST_FIELDS, cost.evaluate(units), strict=True))
    return all(values[f] <= limit for f, limit in limits.items())


def assert_filled(units, cost, space, limits):
    """Within every limit, on admissible widths, and not one more step fits."""
    assert fits(cost, units, limits)
    for g, levels in enumerate(space.levels):
        assert units[g] in levels
        for higher in levels[levels > units[g]][:1]:
            more = units.copy()
            more[g] = higher
            assert not fits(cost, more, limits), f"{cost.names[g]} could grow to {higher}"
