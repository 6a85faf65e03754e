from itertools import pairwise, product

import numpy as np
import pytest

from helpers.allocation_cases import assert_filled, fits, limits_of, random_curves
from helpers.group_cases import zoo
from helpers.networks import ZOO
from tp_importance import Budget, BudgetError
from tp_importance.allocation.curves import Curve, convex_envelope, curve_from_scores
from tp_importance.allocation.greedy import greedy, greedy_path
from tp_importance.allocation.proportional import uniform
from tp_importance.allocation.registry import ALLOCATORS, find_allocator
from tp_importance.allocation.space import WidthSpace
from tp_importance.allocation.walk import fill_up
from tp_importance.graph.cost import COST_FIELDS, CostModel
from tp_importance.testing import TOPOLOGIES, make_network, topology

BOTH = sorted(ALLOCATORS)


def check_budgets(groups, space, fractions, seed=0):
    cost = CostModel.from_groups(groups)
    curves = random_curves(groups, seed)
    for fraction, name, kind in product(fractions, BOTH, ("macs", "params", "both")):
        limits = limits_of(cost, space, kind, fraction)
        assert_filled(ALLOCATORS[name](curves, cost, space, limits), cost, space, limits)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_budget_is_met_and_used(name):
    groups = topology(name).groups
    check_budgets(groups, WidthSpace.of(groups.groups), np.linspace(0, 1, 8))


@pytest.mark.parametrize("name", ZOO)
def test_budget_is_met_and_used_on_the_zoo(name):
    groups = zoo(name).groups
    check_budgets(groups, WidthSpace.of(groups.groups, round_to=8), [0.5])


@pytest.mark.parametrize("name", ["residual", "grouped", "split", "dense"])
@pytest.mark.parametrize("round_to", [None, 4])
@pytest.mark.parametrize("max_pruning_ratio", [1.0, 0.5])
def test_budget_with_rounding_and_floors(name, round_to, max_pruning_ratio):
    groups = topology(name).groups
    space = WidthSpace.of(groups.groups, round_to=round_to, max_pruning_ratio=max_pruning_ratio)
    for group, levels in zip(groups, space.levels, strict=True):
        widths = levels * group.unit_size
        assert widths[-1] == group.width and (np.diff(widths) > 0).all()
        assert all(w % (round_to or 1) == 0 or w == group.width for w in widths)
        assert widths[0] >= group.width * (1 - max_pruning_ratio) and levels[0] >= group.min_units
    check_budgets(groups, space, np.linspace(0, 1, 5), seed=1)


def test_levels():
    groups = topology("grouped").groups  # 12×1, twice 4 units of 4 (at least 2), 24×1
    levels = [lv.tolist() for lv in WidthSpace.of(groups.groups, round_to=8).levels]
    assert levels == [[8, 12], [2, 4], [2, 4], [8, 16, 24]]
    assert [lv[0] for lv in WidthSpace.of(groups.groups).levels] == [1, 2, 2, 1]
    assert [lv[0] for lv in WidthSpace.of(groups.groups, max_pruning_ratio=0.7).levels] == [4, 2, 2, 8]
    later = WidthSpace.of(groups.groups, max_pruning_ratio=0.5, initial_widths={"0.0": 24, "1.body.0.0": 16})
    assert [lv[0] for lv in later.levels] == [12, 2, 2, 12]  # relative to what there was at first
    assert WidthSpace.of(groups.groups, max_pruning_ratio=0.0).floor.tolist() == [12, 4, 4, 24]
    nothing = WidthSpace.of(groups.groups, round_to=32)
    assert nothing.floor.tolist() == nothing.full.tolist() == [12, 4, 4, 24]


def test_floors_ceilings_and_ratios_by_name():
    groups = topology("grouped").groups.groups

    def levels(**options):
        return [lv.tolist() for lv in WidthSpace.of(groups, **options).levels]

    assert levels(max_pruning_ratio={"1.body.0.0": 0.5, "2.0": 0.25})[1:] == [[2, 3, 4], [2, 3, 4], list(range(18, 25))]
    assert levels(min_widths={"0.0": 10, "1.body.0.0": 9})[:2] == [[10, 11, 12], [3, 4]]
    assert levels(max_widths={"0.0": 3}, round_to=2)[0] == [2]  # the present width is above the ceiling
    assert levels(min_widths={"0.0": 3}, max_widths={"0.0": 8}, round_to=4)[0] == [4, 8]
    for options in (
        {"min_widths": {"0.0": 13}},
        {"max_widths": {"1.body.1.0": 4}},  # the graph needs two units
        {"min_widths": {"0.0": 5}, "max_widths": {"0.0": 7}, "round_to": 4},
    ):
        with pytest.raises(ValueError, match="no admissible width"):
            WidthSpace.of(groups, **options)
    with pytest.raises(ValueError, match="max_pruning_ratio"):
        WidthSpace.of(groups, max_pruning_ratio={"2.0": 1.5})


@pytest.mark.parametrize("name", ["residual", "grouped", "split"])
def test_any_target_is_rounded_down_and_filled_up(name):
    groups = topology(name).groups
    cost, curves = CostModel.from_groups(groups), random_curves(groups, 4)
    rng = np.random.default_rng(4)
    for round_to, fraction in product((None, 4), np.linspace(0, 1, 6)):
        space = WidthSpace.of(groups.groups, round_to=round_to)
        limits = limits_of(cost, space, "both", fraction)
        for target in (cost.full * rng.random(len(cost.full)), cost.full * 2.0, -cost.full, space.floor):
            assert_filled(fill_up(curves, cost, space, limits, target), cost, space, limits)


def test_max_pruning_ratio_is_not_a_matter_of_rounding_errors():
    groups = topology("flatten").groups
    for ratio, least in [(0.1, 22), (0.3, 17), (0.7, 8), (0.9, 3), (2 / 3, 8), (0.25, 18)]:
        assert WidthSpace.of(groups.groups, max_pruning_ratio=ratio).floor[2] == least, ratio


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "8"])
def test_round_to_refuses(bad):
    with pytest.raises(ValueError, match="round_to"):
        WidthSpace.of(topology("plain").groups.groups, round_to=bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, True, float("nan")])
def test_max_pruning_ratio_refuses(bad):
    with pytest.raises(ValueError, match="max_pruning_ratio"):
        WidthSpace.of(topology("plain").groups.groups, max_pruning_ratio=bad)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("field", COST_FIELDS)
def test_least_reachable_cost_is_named_and_reachable(name, field):
    groups = topology("residual").groups
    cost, space = CostModel.from_groups(groups), WidthSpace.of(groups.groups, round_to=4)
    least = int(cost.evaluate(space.floor)[COST_FIELDS.index(field)])
    with pytest.raises(BudgetError, match=rf"\b{least}\b"):
        ALLOCATORS[name](random_curves(groups), cost, space, {field: least - 1})
    units = ALLOCATORS[name](random_curves(groups), cost, space, {field: least})
    assert units.tolist() == space.floor.tolist()
    with pytest.raises(BudgetError, match=field):
        ALLOCATORS[name](random_curves(groups), cost, space, {"macs": 10**9, "params": 10**9, field: 1})


@pytest.mark.parametrize("name", BOTH)
def test_a_loose_budget_keeps_everything(name):
    groups = topology("residual").groups
    cost, space = CostModel.from_groups(groups), WidthSpace.of(groups.groups, round_to=8)
    for limits in (Budget(macs=1.0).limits(cost.dense), {"macs": 10**9, "params": 10**9}):
        assert np.array_equal(ALLOCATORS[name](random_curves(groups), cost, space, limits), cost.full)


@pytest.mark.parametrize("name", ["plain", "dense", "se", "grouped"])
def test_path_is_one_sequence_for_every_budget(name):
    groups = topology(name).groups
    cost, space, curves = CostModel.from_groups(groups), WidthSpace.of(groups.groups), random_curves(groups, 2)
    path = list(greedy_path(curves, cost, space))
    assert path == list(greedy_path(curves, cost, space))
    assert len(path) == sum(len(lv) - 1 for lv in space.levels)
    states = [space.floor]
    for g, units in path:
        state = states[-1].copy()
        assert units > state[g]
        state[g] = units
        states.append(state)
    assert np.array_equal(states[-1], cost.full)
    costs = [int(cost.evaluate(s)[0]) for s in states]
    assert costs == sorted(costs)
    for fraction in np.linspace(0, 1, 9):
        limits = limits_of(cost, space, "macs", fraction)
        followed = max(i for i, c in enumerate(costs) if c <= limits["macs"])  # the budget's prefix of the path
        assert (greedy(curves, cost, space, limits) >= states[followed]).all()


def test_path_takes_the_largest_gain_per_true_marginal_cost():
    groups = topology("residual").groups
    cost, space, curves = (
        CostModel.from_groups(groups),
        WidthSpace.of(groups.groups, round_to=4),
        random_curves(groups, 3),
    )
    for fields in (("macs",), ("params",), ("macs", "params")):
        at = space.floor
        for g, units in greedy_path(curves, cost, space, fields):
            scores = []
            for h, levels in enumerate(space.levels):
                higher = levels[levels > at[h]]
                if not len(higher):
                    scores.append(-np.inf)
                    continue
                envelope = convex_envelope(curves[cost.names[h]].loss)
                moved = at.copy()
                moved[h] = higher[0]
                extra = (cost.evaluate(moved) - cost.evaluate(at)) / cost.evaluate(cost.full)
                price = sum(extra[COST_FIELDS.index(f)] for f in fields)
                scores.append((envelope[at[h]] - envelope[higher[0]]) / price)
            assert scores[g] == pytest.approx(max(scores))
            at[g] = units


def test_uniform_keeps_the_same_fraction_everywhere():
    groups = topology("residual").groups
    cost, space, curves = CostModel.from_groups(groups), WidthSpace.of(groups.groups), random_curves(groups)
    for fraction in (0.2, 0.5, 0.8):
        limits = limits_of(cost, space, "macs", fraction)
        units = uniform(curves, cost, space, limits)
        # the largest common fraction that fits, found by trying them all
        common = [np.maximum(np.floor(cost.full * k / 1000 + 1e-9), space.floor).astype(int) for k in range(1001)]
        best = [c for c in common if fits(cost, c, limits)][-1]
        assert (units >= best).all()


# --- how good ---------------------------------------------------------------------------------------------------------


def model(linear, quadratic=None, sizes=None):
    """A cost of MACs only."""
    n = len(linear)
    both = np.stack([np.asarray(linear), np.zeros(n, int)])
    square = np.zeros((2, n, n), np.int64)
    if quadratic is not None:
        square[0] = np.triu(quadratic)
    full = np.asarray(sizes, np.int64)
    return CostModel(tuple(map(str, range(n))), np.ones(n, np.int64), full, np.zeros(2, np.int64), both, square)


def total(curves, units):
    return sum(curves[str(g)].loss[u] for g, u in enumerate(units))


def space_of(sizes):
    return WidthSpace(tuple(np.arange(1, s + 1) for s in sizes))


def optimum(curves, cost, space, limits):
    return min(total(curves, u) for u in product(*space.levels) if fits(cost, np.array(u), limits))


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("name", BOTH)
def test_never_better_than_the_optimum(name, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 8, rng.integers(1, 4))
    quadratic = rng.integers(0, 5, (len(sizes), len(sizes)))
    cost, space = model(rng.integers(1, 9, len(sizes)), quadratic, sizes), space_of(sizes)
    curves = {}
    for g, size in enumerate(sizes):
        curves[str(g)] = curve_from_scores(rng.exponential(size=size))
    for fraction in (0.1, 0.4, 0.7, 1.0):
        limits = limits_of(cost, space, "macs", fraction)
        units = ALLOCATORS[name](curves, cost, space, limits)
        assert_filled(units, cost, space, limits)
        assert total(curves, units) >= optimum(curves, cost, space, limits) - 1e-12


@pytest.mark.parametrize("seed", range(25))
def test_greedy_is_optimal_where_theory_says_so(seed):
    """Separable cost, equal steps, diminishing returns: greedy is the optimum, and the Lagrangian bound has no gap."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 7, 3)
    cost, space = model([7, 7, 7], sizes=sizes), space_of(sizes)
    curves = {str(g): curve_from_scores(rng.exponential(size=size)) for g, size in enumerate(sizes)}
    for budget in range(21, 7 * sizes.sum() + 1, 7):
        limits = {"macs": int(budget) + int(rng.integers(0, 7))}
        loss = total(curves, greedy(curves, cost, space, limits))
        assert loss == pytest.approx(optimum(curves, cost, space, limits))
        bound = -np.inf  # max over μ of min over widths, the inner minimum exact because the cost is separable
        gains = {g for c in curves.values() for g in -np.diff(c.loss)}
        for mu in [0.0, *(g / 7 for g in gains)]:
            inner = sum(min(curves[str(g)].loss[u] + mu * 7 * u for u in lv) for g, lv in enumerate(space.levels))
            bound = max(bound, inner - mu * budget)
        assert loss == pytest.approx(bound)


def test_greedy_looks_behind_a_bump():
    """A group whose first steps gain nothing, and then everything."""
    curves = {
        "0": Curve(np.array([10.0, 10.0, 10.0, 0.0]), np.arange(3)),
        "1": Curve(np.array([3.0, 2.0, 1.0, 0.0]), np.arange(3)),
    }
    cost, space = model([1, 1], sizes=[3, 3]), space_of([3, 3])
    assert greedy(curves, cost, space, {"macs": 4}).tolist() == [3, 1]


def test_room_that_the_best_step_leaves_is_filled():
    curves = {str(g): Curve(np.array([v, v, 0.0]), np.arange(2)) for g, v in enumerate((100.0, 1.0))}
    cost, space = model([50, 3], sizes=[2, 2]), space_of([2, 2])
    assert greedy(curves, cost, space, {"macs": 60}).tolist() == [1, 2]  # 53 is there, 100 does not fit


def test_steps_that_cost_nothing_are_taken():
    curves = {str(g): Curve(np.array([1.0, 0.5, 0.0]), np.arange(2)) for g in range(2)}
    cost, space = model([0, 5], sizes=[2, 2]), space_of([2, 2])
    for allocate in ALLOCATORS.values():
        assert allocate(curves, cost, space, {"macs": 5}).tolist() == [2, 1]


@pytest.mark.parametrize("name", BOTH)
def test_a_larger_budget_never_loses_on_equal_steps(name):
    rng = np.random.default_rng(0)
    sizes = [5, 6, 4]
    cost, space = model([3, 3, 3], sizes=sizes), space_of(sizes)
    curves = {str(g): curve_from_scores(rng.exponential(size=size)) for g, size in enumerate(sizes)}
    units = [ALLOCATORS[name](curves, cost, space, {"macs": b}) for b in range(9, 46)]
    assert all(cost.evaluate(a)[0] <= cost.evaluate(b)[0] for a, b in pairwise(units))
    if name == "greedy":
        losses = [total(curves, u) for u in units]
        assert losses == sorted(losses, reverse=True)


def test_units_do_not_depend_on_the_scale_of_all_losses():
    groups = topology("dense").groups
    cost, space, curves = CostModel.from_groups(groups), WidthSpace.of(groups.groups), random_curves(groups, 5)
    scaled = {n: Curve(c.loss * 1e6, c.order) for n, c in curves.items()}
    limits = limits_of(cost, space, "both", 0.5)
    assert np.array_equal(greedy(curves, cost, space, limits), greedy(scaled, cost, space, limits))


def test_allocators_by_name():
    assert find_allocator("greedy") is greedy and find_allocator("uniform") is uniform
    assert find_allocator(test_levels) is test_levels
    with pytest.raises(ValueError, match="unknown allocator 'best'"):
        find_allocator("best")


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_envelope_is_the_largest_convex_function_below(seed):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=rng.integers(1, 9))
    envelope = convex_envelope(y)
    assert (envelope <= y + 1e-12).all() and (np.diff(envelope, 2) >= -1e-9).all()
    for i in range(len(y)):  # every point lies on the lowest chord over it
        chords = [
            y[i] if a == b else y[a] + (y[b] - y[a]) * (i - a) / (b - a) for a in range(i + 1) for b in range(i, len(y))
        ]
        assert envelope[i] == pytest.approx(min(chords))


def test_curve_of_scores():
    curve = curve_from_scores([3.0, 1.0, 2.0, 1.0])
    assert curve.order.tolist() == [1, 3, 2, 0]
    assert curve.loss.tolist() == [7.0, 4.0, 2.0, 1.0, 0.0]
    for left in range(5):
        removed = curve.removed(left)
        assert removed == sorted(curve.order[: 4 - left].tolist())
        assert curve.loss[left] == pytest.approx(np.array([3.0, 1.0, 2.0, 1.0])[removed].sum())


def test_curves_with_sets_that_are_not_nested():
    curve = Curve(np.array([3.0, 2.0, 1.0, 0.0]), np.array([0, 1, 2]), {1: np.array([0]), 2: np.array([1, 2])})
    assert curve.removed(1) == [1, 2] and curve.removed(2) == [0] and curve.removed(0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("loss", "order"),
    [
        ([1.0, 0.0], [0, 1]),
        ([1.0, np.nan, 0.0], [0, 1]),
        ([np.inf, 1.0, 0.0], [0, 1]),
        ([2.0, 1.0, 0.0], [0, 0]),
        ([2.0, 1.0, 0.0], [1, 2]),
    ],
)
def test_curves_refuse(loss, order):
    with pytest.raises(ValueError):
        Curve(np.array(loss), np.array(order))


def test_unknown_group_in_max_pruning_ratio():
    import torch_pruning as tp

    from tp_importance import BudgetPruner

    model, x = make_network("plain")
    with pytest.raises(ValueError, match="typo"):
        BudgetPruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(),
            budget=Budget(macs=0.5),
            max_pruning_ratio={"typo": 0.1},
        )
