import numpy as np
import pytest
import torch

from tp_importance.maths.moments import Moments, consumer_scatter, eliminate, elimination_loss

F64 = torch.float64


def rows(n=90, groups=2, d=4, classes=3, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    u = torch.randn(n, groups, d, generator=generator, dtype=F64)
    return u + torch.randn(classes, groups, d, generator=generator, dtype=F64)[y] + mean, y


def direct(u, y):
    """Total and between-class covariance by their definition."""
    total = torch.stack([torch.cov(u[:, g].T, correction=0) for g in range(u.shape[1])])
    between = torch.zeros_like(total)
    for k in y.unique():
        deviation = u[y == k].mean(0) - u.mean(0)
        between += (y == k).double().mean() * torch.einsum("gd,ge->gde", deviation, deviation)
    return total, between


def assert_moments(moments, u, y, rtol=1e-9, atol=1e-9):
    total, between = direct(u.double(), y)
    torch.testing.assert_close(moments.total(), total, rtol=rtol, atol=atol)
    torch.testing.assert_close(moments.between(), between, rtol=rtol, atol=atol)
    torch.testing.assert_close(moments.mean(), u.double().mean(0), rtol=rtol, atol=atol)
    assert moments.rows == len(u) and moments.class_rows.sum() == len(u)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [1, 13, 90])
def test_moments_are_those_of_the_rows(groups, batch):
    u, y = rows(groups=groups)
    moments = Moments()
    for part, labels in zip(u.split(batch), y.split(batch), strict=True):
        moments.update(part, labels)
    assert_moments(moments, u, y)


@pytest.mark.parametrize("groups", [1, 2])
def test_large_means_stay_accurate(groups):
    u, y = rows(n=600, groups=groups, mean=1e4)
    moments = Moments()
    for part, labels in zip(u.float().split(50), y.split(50), strict=True):
        moments.update(part, labels)
    assert_moments(moments, u.float(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 20, 89])
def test_merged_parts_are_the_whole(cut):
    u, y = rows(mean=30.0)
    u[:cut] += 10.0
    u += torch.arange(90.0).view(-1, 1, 1)  # the first batch of a part is not like the rest
    first, second = Moments(), Moments()
    for part, chosen in ((first, slice(0, cut)), (second, slice(cut, 90))):
        for a, z in zip(u[chosen].split(5), y[chosen].split(5), strict=True):
            part.update(a, z)
    assert not torch.equal(first.shift, second.shift)
    assert_moments(first.merge(second), u, y)


def test_merge_where_the_parts_have_different_classes():
    u, y = rows(classes=5)
    low = y < 2
    for first, second in [(low, ~low), (~low, low)]:
        assert_moments(Moments().update(u[first], y[first]).merge(Moments().update(u[second], y[second])), u, y)


def test_merge_with_nothing():
    u, y = rows()
    moments = Moments().update(u, y)
    assert_moments(moments.merge(Moments()), u, y)
    copy = Moments().merge(moments)
    assert_moments(copy, u, y)
    copy.update(u, y)
    assert_moments(moments, u, y)


def test_merge_keeps_float32_rows_exact():
    u, y = rows(mean=1e4)
    u = u.float()
    merged = Moments().update(u[:50], y[:50]).merge(Moments().update(u[50:], y[50:]))
    assert_moments(merged, u, y, rtol=1e-4, atol=1e-4)


def test_empty_batches_change_nothing():
    u, y = rows()
    assert_moments(Moments().update(u, y).update(u[:0], y[:0]), u, y)
    assert_moments(Moments().update(u[:0], y[:0]).update(u, y), u, y)
    far = (u + 1e4).float()  # nothing in the first batch says where the data is
    assert_moments(Moments().update(far[:0], y[:0]).update(far, y), far, y, rtol=1e-4, atol=1e-4)


def test_class_order_and_absent_classes():
    u, y = rows(classes=3)
    assert_moments(Moments().update(u, 4 * y), u, y)  # labels 0, 4, 8


def naive_scatter(p, weight, gain, units, n_units):
    s = torch.zeros(n_units, n_units, dtype=F64)
    groups, outputs, d = weight.shape
    for g in range(groups):
        for o in range(outputs):
            for a in range(d):
                for c in range(d):
                    i, j = int(units[g, a]), int(units[g, c])
                    if i >= 0 and j >= 0:
                        s[i, j] += gain[g, o] ** 2 * weight[g, o, a] * weight[g, o, c] * p[g, a, c]
    return s


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_consumer_scatter_is_the_sum_and_the_change_of_the_output(groups, foreign):
    generator = torch.Generator().manual_seed(3)
    u, y = rows(groups=groups, d=8)
    weight = torch.randn(groups, 5, 8, generator=generator, dtype=F64)
    gain = torch.randn(groups, 5, generator=generator, dtype=F64)
    units = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).expand(groups, -1).clone()
    units = units[:, torch.randperm(8, generator=generator)]
    if foreign:
        units[:, [1, 6]] = -1
    moments = Moments().update(u, y)
    s = consumer_scatter(moments.total(), weight, gain, units, 4)
    torch.testing.assert_close(s, naive_scatter(moments.total(), weight, gain, units, 4))
    for removed in ([0], [1, 3], [0, 1, 2, 3]):
        masked = u * ~torch.isin(units, torch.tensor(removed))
        change = torch.einsum("god,rgd->rgo", weight * gain.unsqueeze(2), u - masked)
        loss = (change - change.mean(0)).square().sum((1, 2)).mean()
        torch.testing.assert_close(elimination_loss(s, torch.tensor(removed)), loss)


def test_consumer_scatter_keeps_the_precision_of_the_moments():
    s = consumer_scatter(
        torch.eye(2, dtype=F64)[None], torch.ones(1, 1, 2), torch.ones(1, 1), torch.tensor([[0, 1]]), 3
    )
    assert s.dtype == F64 and s.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def naive_elimination(s, tie_break):
    alive, removed, order, loss = list(range(len(s))), [], [], [0.0]
    while alive:
        totals = {i: s[np.ix_([*removed, i], [*removed, i])].sum() for i in alive}
        unit = min(alive, key=lambda i: (round(totals[i], 6), tie_break[i], i))
        removed.append(unit)
        alive.remove(unit)
        order.append(unit)
        loss.append(totals[unit])
    return order, loss[::-1]


def symmetric(kind, n, rng):
    if kind == "covariance":
        x = rng.normal(size=(n, 3 * n))
        return x @ x.T
    if kind == "ties":
        x = rng.integers(-1, 2, (n, 4))
        return (x @ x.T).astype(float)
    if kind == "low_rank":  # duplicates and cancellations
        x = rng.normal(size=(n, 2))
        x[n // 2 :] = rng.choice([-1, 1], (n - n // 2, 1)) * x[: n - n // 2]
        return x @ x.T
    return np.zeros((n, n))


@pytest.mark.parametrize("kind", ["covariance", "ties", "low_rank", "zero"])
def test_elimination_is_greedy_and_its_loss_that_of_the_set(kind):
    rng = np.random.default_rng(5)
    for _ in range(25):
        n = int(rng.integers(1, 10))
        s = symmetric(kind, n, rng)
        s = (s + s.T) / 2
        tie_break = rng.integers(0, 3, n).astype(float)
        found = eliminate(s, tie_break)
        order, loss = naive_elimination(s, tie_break)
        assert found.order.tolist() == order
        np.testing.assert_allclose(found.loss, loss, rtol=1e-9, atol=1e-9)
        for left in range(n + 1):
            removed = found.order[: n - left]
            assert found.loss[left] == pytest.approx(s[np.ix_(removed, removed)].sum(), rel=1e-9, abs=1e-9)


def test_a_pair_that_cancels_goes_together():
    s = np.array([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
    found = eliminate(s)
    assert found.order.tolist() == [0, 1, 2]
    assert found.loss.tolist() == [5.0, 0.0, 4.0, 0.0]  # the second step costs -4


def test_duplicates_cost_more_than_their_sum():
    s = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    found = eliminate(s)
    assert found.order.tolist() == [0, 2, 1]  # not the twin next: together they lose 4
    assert found.loss.tolist() == [6.0, 3.0, 1.0, 0.0]


def test_ties_go_by_the_second_key_then_by_position():
    assert eliminate(np.eye(4), np.array([3.0, 1.0, 2.0, 1.0])).order.tolist() == [1, 3, 2, 0]
    assert eliminate(np.eye(4)).order.tolist() == [0, 1, 2, 3]
    nearly = np.diag([1.0, 1.0 - 1e-15, 1.0 + 1e-15])  # rounding is no preference
    assert eliminate(nearly, np.array([0.0, 2.0, 1.0])).order.tolist() == [0, 2, 1]


def test_elimination_is_equivariant_and_takes_tensors():
    rng = np.random.default_rng(6)
    s, order = symmetric("covariance", 8, rng), rng.permutation(8)
    plain = eliminate(s)
    permuted = eliminate(torch.from_numpy(s[np.ix_(order, order)]))
    assert order[permuted.order].tolist() == plain.order.tolist()
    np.testing.assert_allclose(permuted.loss, plain.loss)
    np.testing.assert_array_equal(s, symmetric("covariance", 8, np.random.default_rng(6)))  # the input is not changed
    assert eliminate(np.zeros((0, 0))).loss.tolist() == [0.0]
