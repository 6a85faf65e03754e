import itertools
import math

import numpy as np
import pytest
import torch

from tp_importance.methods.psap.sparsity import (
    adaptive_widths,
    cubic_target,
    outliers,
    select_masked,
    weight_sparsity,
)
from tp_importance.methods.psap.sparsity import (
    relative_norms as filter_norms,
)


@pytest.mark.parametrize("a", [0.05, 0.25, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_gaussian_weights_have_sparsity_erf(a, scale):
    """τ = a·RMS and RMS → σ: P(|w| ≤ aσ) = erf(a/√2), at any scale."""
    n = 400_000
    w = scale * torch.randn(n, generator=torch.Generator().manual_seed(0))
    p = math.erf(a / math.sqrt(2))
    assert weight_sparsity([w], a) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_uniform_weights():
    """On [-1, 1] the RMS is 1/√3, so P(|w| ≤ a/√3) = a/√3."""
    assert weight_sparsity([torch.linspace(-1, 1, 100_001)], 0.3) == pytest.approx(0.3 / math.sqrt(3), abs=1e-4)


def test_counts_are_pooled_over_layers_and_thresholds_are_not():
    small, large = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0.0] * 6 + [100.0, 100.0])
    assert weight_sparsity([small]) == 1 / 4 and weight_sparsity([large]) == 6 / 8
    assert weight_sparsity([small, large]) == 7 / 12  # not the mean of the ratios, and not one τ for both
    assert weight_sparsity([small, 1e6 * large, torch.zeros(0)]) == 7 / 12


def test_degenerate_weights():
    assert weight_sparsity([torch.zeros(5)]) == 1.0
    assert weight_sparsity([torch.ones(5)]) == 0.0
    assert weight_sparsity([]) == 0.0
    with pytest.raises(ValueError, match="positive"):
        weight_sparsity([torch.ones(2)], 0.0)
    with pytest.raises(ValueError, match="not finite"):
        weight_sparsity([torch.tensor([1.0, float("nan")])])


def test_schedule():
    targets = [cubic_target(0.7, t, 10) for t in range(15)]
    assert targets[0] == 0 and targets[10:] == [0.7] * 5
    gains = np.diff(targets[:11])
    assert (gains > 0).all() and (np.diff(gains) < 0).all()
    assert targets[5] == pytest.approx(0.7 * (1 - 0.5**3))
    with pytest.raises(ValueError):
        cubic_target(0.5, 1, 0)


def problem(seed, n=4, most=9):
    """A chain of layers with products of neighbouring widths, and a limit part of the way down."""
    rng = np.random.default_rng(seed)
    full = rng.integers(2, most, n)
    linear, cross = rng.integers(1, 20, n), rng.integers(0, 9, n - 1)

    def cost(u):
        return int(linear @ u + (cross * u[:-1] * u[1:]).sum())

    levels = [np.arange(1, f + 1) for f in full]
    limit = int(cost(np.ones(n, int)) + rng.random() * (cost(full) - cost(np.ones(n, int))))
    return rng.random(n), levels, full, cost, limit


@pytest.mark.parametrize("seed", range(60))
def test_widths_keep_the_limit_and_no_further_level_fits(seed):
    wsr, levels, full, cost, limit = problem(seed)
    units, kappa = adaptive_widths(wsr, levels, full, lambda u: cost(u) <= limit)
    assert cost(units) <= limit and kappa >= 0
    for g in range(len(full)):
        if units[g] < full[g]:
            more = units.copy()
            more[g] += 1
            assert cost(more) > limit


@pytest.mark.parametrize("seed", range(20))
def test_kappa_is_the_least_one_that_fits(seed):
    wsr, levels, full, cost, limit = problem(seed)
    _, kappa = adaptive_widths(wsr, levels, full, lambda u: cost(u) <= limit)

    def at(k):
        return cost(np.maximum(np.floor(full * (1 - np.minimum(k * wsr, 1)) + 1e-9), 1).astype(int))

    assert at(kappa) <= limit
    if kappa:
        assert at(kappa * (1 - 1e-9)) > limit
        grid = np.linspace(0, kappa, 2000, endpoint=False)
        assert all(at(k) > limit for k in grid)


def test_ratios_follow_the_sparsities():
    levels = [np.arange(1, 1001)] * 3
    units, kappa = adaptive_widths([0.1, 0.2, 0.3], levels, [1000] * 3, lambda u: u.sum() <= 2400)
    np.testing.assert_allclose(1 - units / 1000, kappa * np.array([0.1, 0.2, 0.3]), atol=1.01e-3)
    assert units.sum() == 2400


def test_equal_sparsities_do_not_jump_over_the_limit():
    """κ alone would take five units at once."""
    levels = [np.arange(1, 11)] * 5
    for limit in range(5, 51):
        units, _ = adaptive_widths([0.2] * 5, levels, [10] * 5, lambda u, limit=limit: u.sum() <= limit)
        assert units.sum() == limit and units.max() - units.min() <= 1


def test_units_come_back_by_fractional_part():
    # ratios .31 and .35 of 10: 6.9 and 6.5 units; the first has the larger rest and gets the unit that fits
    levels = [np.arange(1, 11)] * 2
    units, _ = adaptive_widths([0.31, 0.35], levels, [10, 10], lambda u: u.sum() <= 13)
    assert units.tolist() == [7, 6]


def test_largest_ratio_and_floors():
    levels = [np.arange(1, 101), np.arange(50, 101)]
    fits = lambda u: u.sum() <= 90  # noqa: E731
    units, _ = adaptive_widths([0.1, 0.9], levels, [100, 100], fits)
    assert units.tolist() == [40, 50]  # the second is at its floor, the first makes it up
    with pytest.raises(ValueError, match="cannot be kept"):
        adaptive_widths([0.1, 0.9], levels, [100, 100], lambda u: u.sum() <= 50)


def test_groups_without_sparsity_go_last():
    levels = [np.arange(1, 11)] * 2
    assert adaptive_widths([0.0, 0.5], levels, [10, 10], lambda u: u.sum() <= 12)[0].tolist() == [10, 2]
    assert adaptive_widths([0.0, 0.5], levels, [10, 10], lambda u: u.sum() <= 5)[0].tolist() == [4, 1]


def test_admissible_levels_only():
    levels = [np.array([4, 8, 12, 16]), np.array([1, 2, 8])]
    units, _ = adaptive_widths([0.3, 0.3], levels, [16, 8], lambda u: u.sum() <= 15)
    assert units.tolist() in ([12, 2], [4, 8]) and units[0] in levels[0] and units[1] in levels[1]


def test_nothing_to_remove_and_bad_input():
    levels = [np.arange(1, 5)]
    units, kappa = adaptive_widths([0.5], levels, [4], lambda u: True)
    assert units.tolist() == [4] and kappa == 0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        adaptive_widths([1.5], levels, [4], lambda u: True)


def test_filter_norms_are_relative_to_their_layer():
    rows = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 15.0]])
    units = torch.tensor([0, 1, 2])
    expected = np.array([0.5, 1.0, 1.5])
    np.testing.assert_allclose(filter_norms([(rows, units)], 3), expected)
    np.testing.assert_allclose(filter_norms([(1e3 * rows, units), (rows, units)], 3), expected)
    two = filter_norms([(rows, units), (rows.flip(0), units)], 3)  # the mean over producers
    np.testing.assert_allclose(two, [1.0, 1.0, 1.0])
    pairs = filter_norms([(torch.cat([rows, rows]), torch.tensor([0, 1, 2, 0, 1, 2]))], 3)  # units of two channels
    np.testing.assert_allclose(pairs, expected)
    assert filter_norms([(torch.zeros(3, 2), units)], 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_selection_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    norms, protected = rng.random(8), rng.random(8) < 0.3
    count = int(rng.integers(0, (~protected).sum() + 1))
    chosen = select_masked(norms, np.zeros(8, bool), protected, count)
    assert chosen.sum() == count and not (chosen & protected).any()
    best = min(itertools.combinations(np.flatnonzero(~protected), count), key=lambda s: norms[list(s)].sum())
    assert set(best) == set(np.flatnonzero(chosen))


def test_masked_units_stay_until_the_ratio_falls():
    norms = np.array([1.0, 2.0, 3.0, 4.0])
    masked = np.array([False, False, True, True])
    free = np.zeros(4, bool)
    assert select_masked(norms, masked, free, 3).tolist() == [True, False, True, True]
    assert select_masked(norms, masked, free, 1).tolist() == [False, False, True, False]  # the larger one comes back
    assert select_masked(norms, masked, np.array([0, 0, 1, 0], bool), 2).tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="unprotected"):
        select_masked(norms, masked, np.ones(4, bool), 1)


def naive_outliers(g, masked):
    values = [x for x, m in zip(g, masked, strict=True) if m]
    if not values:
        return []
    reference = values if len(values) > 2 else list(g)
    median = np.median(reference)
    limit = 3 * median if len(values) < 5 else median + 3 * 1.4826 * np.median([abs(v - median) for v in values])
    found = [i for i in range(len(g)) if masked[i] and g[i] > limit]
    return sorted(found, key=lambda i: -g[i])[: max(1, math.floor(0.1 * len(g)))]


@pytest.mark.parametrize("seed", range(50))
def test_outliers_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    g = rng.lognormal(0, 1.5, n)
    masked = rng.random(n) < rng.random()
    assert outliers(g, masked).tolist() == naive_outliers(g, masked)


def test_outliers_in_corner_cases():
    none = np.zeros(4, bool)
    assert outliers([1.0, 2.0, 3.0, 4.0], none).tolist() == []
    assert outliers([0.0] * 6, np.ones(6, bool)).tolist() == []
    assert outliers([1.0] * 6, np.ones(6, bool)).tolist() == []
    one = np.array([True, False, False, False])
    assert outliers([9.0, 1.0, 1.0, 1.0], one).tolist() == [0]  # against the rest of the group
    assert outliers([2.9, 1.0, 1.0, 1.0], one).tolist() == []
    three = np.array([True, True, True, False])
    assert outliers([1.0, 1.0, 3.1, 0.0], three).tolist() == [2]
    assert outliers([1.0, 1.0, 2.9, 0.0], three).tolist() == []
    many = np.ones(40, bool)
    g = np.ones(40) + np.arange(40) * 1e-3
    g[[3, 5, 7, 9, 11, 13]] = [50, 60, 70, 80, 90, 100]
    assert outliers(g, many).tolist() == [13, 11, 9, 7]  # a tenth of the group at most


def test_mean_and_deviation_could_never_fire_with_five():
    """Why the median: of n values none is more than (n − 1)/√n deviations above the mean."""
    values = np.array([0.0, 0.0, 0.0, 0.0, 1e9])
    assert values[4] <= values.mean() + 2 * values.std()
    assert outliers(values, np.ones(5, bool)).tolist() == [4]
