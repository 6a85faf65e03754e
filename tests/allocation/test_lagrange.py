from itertools import product

import numpy as np
import pytest
import torch_pruning as tp

from helpers.allocation_cases import assert_filled, fits, limits_of, random_curves
from tp_importance import Budget, BudgetPruner
from tp_importance.allocation.curves import Curve, curve_from_scores
from tp_importance.allocation.greedy import greedy
from tp_importance.allocation.lagrange import LagrangeAllocator
from tp_importance.allocation.space import WidthSpace
from tp_importance.graph.cost import COST_FIELDS, CostModel
from tp_importance.testing import make_network, topology


def made_up(seed, groups=4, units=6, coupled=False, convex=True):
    """A cost model of its own and random curves."""
    rng = np.random.default_rng(seed)
    size = (len(COST_FIELDS), groups)
    quadratic = np.zeros((*size, groups), np.int64)
    if coupled:  # a chain
        for g in range(groups - 1):
            quadratic[:, g, g + 1] = rng.integers(1, 20, len(COST_FIELDS))
    names = tuple("abcdefgh"[:groups])
    one = np.ones(groups, np.int64)
    cost = CostModel(names, one, units * one, np.array([5, 3]), rng.integers(1, 30, size), quadratic)
    curves = {}
    for n in names:
        steps = rng.exponential(size=units)
        steps = np.sort(steps) if convex else steps  # units go in this order
        curves[n] = Curve(np.concatenate([np.cumsum(steps)[::-1], [0.0]]), np.arange(units))
    space = WidthSpace(tuple(np.arange(1, units + 1) for _ in names))
    return curves, cost, space


def loss_of(curves, cost, units):
    return sum(curves[n].loss[u] for n, u in zip(cost.names, units, strict=True))


def brute_force(curves, cost, space, limits):
    return min(loss_of(curves, cost, u) for u in product(*space.levels) if fits(cost, np.array(u), limits))


@pytest.mark.parametrize("kind", ["macs", "both"])
@pytest.mark.parametrize("convex", [True, False])
def test_optimal_up_to_a_step_and_bounded_where_the_cost_is_linear(convex, kind):
    exact = 0
    for seed in range(12):
        curves, cost, space = made_up(seed, convex=convex)
        limits = limits_of(cost, space, kind, 0.3 + 0.05 * (seed % 6))
        allocate = LagrangeAllocator()
        units = allocate(curves, cost, space, limits)
        assert_filled(units, cost, space, limits)
        best, found = brute_force(curves, cost, space, limits), loss_of(curves, cost, units)
        assert allocate.certificate["loss"] == pytest.approx(found)
        assert allocate.certificate["bound"] <= best * (1 + 1e-9) <= found * (1 + 2e-9)
        steps = [np.abs(np.diff(curves[n].loss)).max() for n in cost.names]
        assert found - best <= max(steps)
        exact += found <= best * (1 + 1e-9)
    assert exact >= 8


def test_bound_is_tight_where_a_vertex_uses_the_budget():
    curves, cost, space = made_up(0)
    multiplier = 0.05

    def lagrangian(units):
        return loss_of(curves, cost, units) + multiplier * cost.evaluate(units)[0]

    vertex = np.array(min(product(*space.levels), key=lambda u: lagrangian(np.array(u))))
    assert (vertex > 1).any() and (vertex < 6).any()
    allocate = LagrangeAllocator()
    units = allocate(curves, cost, space, {"macs": int(cost.evaluate(vertex)[0])})
    assert units.tolist() == vertex.tolist()
    assert allocate.certificate["bound"] == pytest.approx(allocate.certificate["loss"])
    assert allocate(curves, cost, space, {"macs": int(cost.evaluate(cost.full)[0])}).tolist() == cost.full.tolist()
    assert allocate.certificate == {"loss": 0.0, "bound": pytest.approx(0.0)}


@pytest.mark.parametrize("convex", [True, False])
def test_products_of_widths_give_no_bound_and_little_loss(convex):
    worst = 1.0
    for seed in range(12):
        curves, cost, space = made_up(seed, coupled=True, convex=convex)
        limits = limits_of(cost, space, "macs", 0.4)
        allocate = LagrangeAllocator()
        units = allocate(curves, cost, space, limits)
        assert_filled(units, cost, space, limits)
        assert "bound" not in allocate.certificate
        worst = max(worst, loss_of(curves, cost, units) / brute_force(curves, cost, space, limits))
    assert worst < 1.25


def test_never_worse_than_greedy_and_sometimes_better():
    better = 0
    for name, seed, fraction in product(("residual", "grouped", "concat", "flatten"), range(3), (0.2, 0.5, 0.8)):
        groups = topology(name).groups
        cost, space = CostModel.from_groups(groups), WidthSpace.of(groups.groups)
        curves, limits = random_curves(groups, seed), limits_of(cost, space, "macs", fraction)
        ours, theirs = (loss_of(curves, cost, a(curves, cost, space, limits)) for a in (LagrangeAllocator(), greedy))
        assert ours <= theirs * (1 + 1e-9)
        better += ours < theirs * (1 - 1e-3)
    assert better


def test_jumps_over_a_bump():
    """Worth nothing until three units are there: greedy on the envelope stops half-way, exchanges do not."""
    curves, cost, space = made_up(1, groups=2)
    cost.linear[0] = 10
    curves = {
        "a": Curve(np.array([5.0, 5.0, 5.0, 5.0, 0.0, 0.0, 0.0]), np.arange(6)),
        "b": curve_from_scores([1.0] * 6),
    }
    limits = {"macs": 5 + 10 * 5}
    assert LagrangeAllocator()(curves, cost, space, limits).tolist() == [4, 1]


def test_by_name_and_in_the_plan():
    model, x = make_network("residual")
    importance = tp.importance.MagnitudeImportance(p=1)
    by_name, by_object = (
        BudgetPruner(model, x, budget=Budget(macs=0.5), importance=importance, allocator=a).plan()
        for a in ("lagrange", LagrangeAllocator())
    )
    assert by_name.widths == by_object.widths and by_object.certificate["loss"] > 0
