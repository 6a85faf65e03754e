from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from tp_importance.methods.catro.trace_ratio import ClassScatter, select, top_d_values


def ratio(b, w):
    return b / w if w > 0 else (np.inf if b > 0 else 0.0)


def best_by_force(b, w, d):
    """Largest ratio over all sets of d channels; dead channels only where nothing else is left."""
    alive = np.flatnonzero(b + w > 0)
    dead = np.flatnonzero(b + w == 0)
    spare = max(d - len(alive), 0)
    sets = combinations(alive, d - spare)
    return max(ratio(b[list(s)].sum(), w[list(s)].sum()) for s in sets) if len(alive) else ratio(b[dead].sum(), 0.0)


def instance(kind, rng):
    c = int(rng.integers(2, 13))
    b, w = rng.exponential(size=c), rng.exponential(size=c)
    if kind == "dead":
        off = rng.random(c) < 0.4
        b[off] = w[off] = 0.0
    elif kind == "ties":
        b, w = rng.integers(0, 4, c).astype(float), rng.integers(0, 4, c).astype(float)
    elif kind == "no_within":
        w[rng.random(c) < 0.5] = 0.0
    elif kind == "no_between":
        b[rng.random(c) < 0.5] = 0.0
    elif kind == "scales":
        scale = 10.0 ** rng.uniform(-4, 4, c)
        b, w = b * scale, w * scale
    return b, w, int(rng.integers(1, c + 1))


@pytest.mark.parametrize("kind", ["plain", "dead", "ties", "no_within", "no_between", "scales"])
def test_selection_is_the_best_of_all_subsets(kind):
    rng = np.random.default_rng(sum(map(ord, kind)))
    for _ in range(100):
        b, w, d = instance(kind, rng)
        found = select(b, w, d)
        assert len(found.chosen) == len(set(found.chosen.tolist())) == d
        assert np.array_equal(found.chosen, np.sort(found.chosen))
        assert found.ratio == pytest.approx(ratio(b[found.chosen].sum(), w[found.chosen].sum()), rel=1e-12)
        assert found.ratio == pytest.approx(best_by_force(b, w, d), rel=1e-9), (b, w, d)
        assert all(a < z for a, z in pairwise(found.history))
        assert found.history[-1] == found.ratio and len(found.history) <= 20


def test_dead_channels_come_last():
    b, w = [0.0, 1.0, 0.0, 2.0], [0.0, 5.0, 0.0, 1e6]
    assert select(b, w, 2).chosen.tolist() == [1, 3]
    assert {1, 3} < set(select(b, w, 3).chosen.tolist())
    assert select([0.0, 0.0], [0.0, 0.0], 1).ratio == 0.0
    nearly = select([1.0, 1e-14, 0.5], [1.0, 1e-15, 5.0], 2)  # a ratio of 10, made of nothing
    assert nearly.chosen.tolist() == [0, 2]


def test_channels_without_within_scatter_win():
    found = select([1.0, 1.0, 9.0], [0.0, 0.0, 1.0], 2)
    assert found.chosen.tolist() == [0, 1] and found.ratio == np.inf


def test_truncating_to_the_largest_single_ratios_first_is_suboptimal():
    rng = np.random.default_rng(0)
    worse = 0
    for _ in range(200):
        b, w = rng.random(12), rng.random(12)
        top = np.argsort(-b / w)[:6]
        best = select(b, w, 6).ratio
        assert best >= ratio(b[top].sum(), w[top].sum()) * (1 - 1e-12)
        worse += best > ratio(b[top].sum(), w[top].sum()) * (1 + 1e-9)
    assert worse > 100


def test_best_ratio_falls_with_the_size():
    rng = np.random.default_rng(1)
    for _ in range(50):
        b, w = rng.exponential(size=12), rng.exponential(size=12)
        ratios = [select(b, w, d).ratio for d in range(1, 13)]
        assert all(z <= a * (1 + 1e-12) for a, z in pairwise(ratios))


def test_selection_is_equivariant_to_the_order_of_channels():
    rng = np.random.default_rng(2)
    for _ in range(50):
        b, w, order = rng.exponential(size=10), rng.exponential(size=10), rng.permutation(10)
        permuted = select(b[order], w[order], 4).chosen
        assert sorted(order[permuted].tolist()) == select(b, w, 4).chosen.tolist()


@pytest.mark.parametrize(
    ("b", "w", "d"),
    [
        ([1.0, 2.0], [1.0, 1.0], 0),
        ([1.0, 2.0], [1.0, 1.0], 3),
        ([], [], 1),
        ([1.0, -1.0], [1.0, 1.0], 1),
        ([1.0, 1.0], [1.0, -1e-9], 1),
        ([1.0, np.nan], [1.0, 1.0], 1),
        ([1.0, 1.0], [np.inf, 1.0], 1),
        ([[1.0, 1.0]], [[1.0, 1.0]], 1),
    ],
)
def test_selection_refuses(b, w, d):
    with pytest.raises(ValueError):
        select(b, w, d)


def test_top_d_values_are_the_best_sums_and_concave():
    rng = np.random.default_rng(3)
    b, w = rng.exponential(size=8), rng.exponential(size=8)
    gain = top_d_values(b, w, 0.7)
    value = b - 0.7 * w
    for d in range(9):
        assert gain[d] == pytest.approx(max(sum(value[list(s)]) for s in combinations(range(8), d)))
    assert (np.diff(gain, 2) <= 1e-12).all()
    smallest = top_d_values(b, w, float((b / w).min()))
    assert (np.diff(smallest) >= -1e-12).all()  # no gain is negative with the least ratio


def data(n=60, c=5, p=3, classes=4, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    x = torch.randn(n, c, p, generator=generator, dtype=torch.float64)
    return x + torch.randn(classes, c, p, generator=generator, dtype=torch.float64)[y] + mean, y


def direct(x, y):
    """b and w by their definition, class by class."""
    b, w = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
    for k in y.unique():
        mine = x[y == k]
        b += len(mine) * (mine.mean(0) - x.mean(0)).square().sum(1)
        w += (mine - mine.mean(0)).square().sum((0, 2))
    return b, w


def assert_same(first, second, rtol=1e-9):
    for a, z in zip(first, second, strict=True):
        torch.testing.assert_close(a, z, rtol=rtol, atol=1e-9)


def test_scatter_is_the_definition_and_the_graph_form():
    x, y = data()
    scatter = ClassScatter().update(x[:25], y[:25]).update(x[25:], y[25:]).scatter()
    assert_same(scatter, direct(x, y))
    n = len(y)
    same = (y.view(-1, 1) == y).double()
    a_w = same / same.sum(1, keepdim=True)
    a_b = torch.full((n, n), 1 / n, dtype=torch.float64) - a_w
    laplacians = [torch.diag(a.sum(1)) - a for a in (a_b, a_w)]
    graph = [torch.stack([torch.trace(x[:, i].T @ m @ x[:, i]) for i in range(x.shape[1])]) for m in laplacians]
    assert_same(scatter, graph)


@pytest.mark.parametrize("cut", [1, 7, 30, 59])
def test_merged_parts_are_the_whole(cut):
    x, y = data(mean=100.0)
    x[:cut] += 50.0  # the parts have different shifts
    x += torch.arange(60.0).view(-1, 1, 1)  # and their first batches are not like the rest
    whole = ClassScatter().update(x, y)
    first, second = ClassScatter(), ClassScatter()
    for part, rows in ((first, slice(0, cut)), (second, slice(cut, 60))):
        for a, z in zip(x[rows].split(5), y[rows].split(5), strict=True):
            part.update(a, z)
    assert not torch.equal(first.shift, second.shift)
    merged = first.merge(second)
    assert_same(merged.scatter(), direct(x, y))
    assert_same(merged.scatter(), whole.scatter())
    assert_same(merged.scatter([0, 2]), whole.scatter([0, 2]))
    assert torch.equal(merged.counts, whole.counts)


def test_merge_where_the_parts_have_different_classes():
    x, y = data(n=80, classes=6)
    low, high = y < 3, y >= 2
    high &= ~low  # classes 3, 4, 5
    for first, second in [(low, high), (high, low)]:
        merged = ClassScatter().update(x[first], y[first]).merge(ClassScatter().update(x[second], y[second]))
        assert_same(merged.scatter(), direct(x, y))
    gap = y != 1  # a class nobody has
    one = ClassScatter().update(x[gap & low], y[gap & low]).merge(ClassScatter().update(x[high], y[high]))
    assert_same(one.scatter(), direct(x[gap], y[gap]))


def test_merge_with_nothing():
    x, y = data()
    full = ClassScatter().update(x, y)
    expected = full.scatter()
    assert_same(full.merge(ClassScatter()).scatter(), expected)
    other = ClassScatter().merge(full)
    assert_same(other.scatter(), expected)
    other.update(x, y)  # a copy: the source stays
    assert_same(full.scatter(), expected)
    assert_same(full.update(x[:0], y[:0]).scatter(), expected)


def test_order_and_batches_do_not_matter():
    x, y = data()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    batches = ClassScatter()
    for i in order.split(7):
        batches.update(x[i], y[i])
    assert_same(batches.scatter(), ClassScatter().update(x, y).scatter())


@pytest.mark.parametrize("classes", [[0, 3], [3, 0], [1, 2, 3], [0, 1, 2, 3]])
def test_class_subset_is_the_statistic_of_the_filtered_samples(classes):
    x, y = data()
    mine = torch.isin(y, torch.tensor(classes))
    subset = ClassScatter().update(x, y).scatter(classes)
    assert_same(subset, ClassScatter().update(x[mine], y[mine]).scatter())
    assert_same(subset, direct(x[mine], y[mine]))


def test_channels_are_equivariant():
    x, y = data()
    order = torch.tensor([3, 1, 4, 0, 2])
    plain = ClassScatter().update(x, y).scatter()
    assert_same(ClassScatter().update(x[:, order], y).scatter(), [v[order] for v in plain])


def test_large_means_stay_accurate():
    x, y = data(n=200, mean=1e4)
    single = x.float()  # what a network gives
    streamed = ClassScatter()
    for i in range(0, 200, 20):
        streamed.update(single[i : i + 20], y[i : i + 20])
    assert_same(streamed.scatter(), direct(single.double(), y), rtol=1e-8)


def test_constant_channels_have_no_scatter():
    x, y = data()
    x[:, 2] = 0.1
    b, w = ClassScatter().update(x[:7], y[:7]).update(x[7:], y[7:]).scatter()
    assert b[2] + w[2] <= 1e-12 * (b + w).max()
    assert (b >= 0).all() and (w >= 0).all()


def test_scatter_refuses():
    x, y = data()
    with pytest.raises(ValueError, match="no samples"):
        ClassScatter().scatter()
    with pytest.raises(ValueError, match="two classes"):
        ClassScatter().update(x, torch.zeros_like(y)).scatter()
    with pytest.raises(ValueError, match="two classes"):
        ClassScatter().update(x, y).scatter([2])
    with pytest.raises(ValueError, match="two classes"):
        ClassScatter().update(x, y).scatter([2, 17])
