from itertools import combinations

import numpy as np
import pytest
import torch

from tp_importance.maths import elimination, elimination_state
from tp_importance.maths.elimination import ReadUnits, eliminate_with_refit

F64 = torch.float64
RIDGE = 1e-4


def consumer(units, outputs=5, seed=0, rows=200, factor=1.0, blocks=None):
    """A consumer of correlated features, and the rows it saw."""
    generator = torch.Generator().manual_seed(seed)
    d = len(units)
    shape = () if blocks is None else (blocks,)
    x = torch.randn(*shape, rows, d, generator=generator, dtype=F64)
    x = x @ torch.randn(*shape, d, d, generator=generator, dtype=F64)
    x = x - x.mean(-2, keepdim=True)
    w = torch.randn(*shape, outputs, d, generator=generator, dtype=F64)
    return ReadUnits(x.mT @ x / rows, w, torch.as_tensor(units), factor), x


def direct(read, removed, ridge=RIDGE):
    """Loss of removing units: the refit as one least-squares problem, ridge included."""
    if read.covariance.dim() == 3:
        parts = zip(read.covariance, read.weight, strict=True)
        return sum(direct(ReadUnits(p, w, read.units, read.factor), removed, ridge) for p, w in parts)
    gone = torch.isin(read.units, torch.as_tensor(list(removed), dtype=torch.int64))
    p = read.covariance + ridge * read.covariance.diagonal().mean() * torch.eye(len(gone), dtype=F64)
    root = torch.linalg.cholesky(p).mT  # ||root dW||^2 = tr(dW' P dW)
    left, wanted = root[:, ~gone], root @ read.weight.mT
    new = torch.linalg.lstsq(left, wanted).solution if left.shape[1] else left.new_zeros(0, wanted.shape[1])
    return read.factor * float((wanted - left @ new).square().sum())


def assert_exact(reads, n_units, found, ridge=RIDGE, rtol=1e-8):
    """Every loss is that of a direct refit, and every step was the best one."""
    for step in range(n_units + 1):
        wanted = sum(direct(r, found.order[:step], ridge) for r in reads)
        np.testing.assert_allclose(found.loss[n_units - step], wanted, rtol=rtol, atol=1e-10)
    for step in range(n_units - 1):
        others = [sum(direct(r, [*found.order[:step], u], ridge) for r in reads) for u in found.order[step:]]
        assert found.loss[n_units - step - 1] <= min(others) * (1 + rtol) + 1e-10


def taps(n, k):
    return np.repeat(np.arange(n), k)


CASES = {
    "1x1": [taps(7, 1)],
    "taps": [taps(5, 4)],
    "others stay": [np.array([0, 0, -1, 1, 1, -1, -1, 2, 2, 3, 3])],
    "scattered": [np.array([2, 0, 1, 2, 1, 0, 3, 3])],
    "uneven": [np.array([0, 0, 0, 1, 2, 2, -1, 3])],
    "two consumers": [taps(5, 1), taps(5, 4)],
    "consumers of some": [np.array([0, 0, 1, 1, 2, 2]), np.array([3, 4, 5, -1]), taps(6, 1)],
}


@pytest.mark.parametrize("compact", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_a_direct_refit(case, compact, monkeypatch):
    monkeypatch.setattr(elimination_state, "COMPACT", compact)
    reads = [consumer(u, outputs=3 + 4 * i, seed=i, factor=0.5 + i)[0] for i, u in enumerate(CASES[case])]
    n = 1 + max(int(r.units.max()) for r in reads)
    assert_exact(reads, n, eliminate_with_refit(reads, n, ridge=RIDGE))


def test_problems_with_the_same_units():
    read, _ = consumer(taps(4, 2), blocks=3)
    assert_exact([read], 4, eliminate_with_refit([read], 4, ridge=RIDGE))


def test_loss_is_what_the_refit_leaves_on_the_rows():
    """Without (next to) a ridge: the residual of least squares on stored activations."""
    read, x = consumer(taps(5, 2), outputs=4)
    found = eliminate_with_refit([read], 5, ridge=1e-12)
    y = x @ read.weight.mT
    for step in range(6):
        left = x[:, ~np.isin(read.units, found.order[:step])]
        rest = y - left @ torch.linalg.lstsq(left, y).solution if step < 5 else y
        assert found.loss[5 - step] == pytest.approx(float(rest.square().sum() / len(x)), rel=1e-6, abs=1e-9)


def test_greedy_is_near_the_best_set():
    """No guarantee, but the first step is the best one and the others are not far off."""
    for seed in range(5):
        read, _ = consumer(taps(8, 1), seed=seed)
        found = eliminate_with_refit([read], 8, ridge=RIDGE)
        best = [min(direct(read, r) for r in combinations(range(8), step)) for step in range(9)]
        assert found.loss[7] == pytest.approx(best[1]) and found.loss[0] == pytest.approx(best[8])
        assert all(best[s] * (1 - 1e-9) <= found.loss[8 - s] <= 2 * best[s] for s in range(1, 9))


def test_duplicates_and_combinations_cost_nothing():
    read, x = consumer(taps(5, 2))
    for copy in (x[:, 2:4], x[:, 2:4] - 3 * x[:, 6:8]):
        x = x.clone()
        x[:, 0:2] = copy
        twin = ReadUnits(x.mT @ x / len(x), read.weight, read.units)
        found = eliminate_with_refit([twin], 5, ridge=1e-10)
        assert found.loss[4] < 1e-6 * found.loss[0] and found.order[0] in (0, 1, 3)
        assert found.loss[3] > 1e-3 * found.loss[0]


def test_units_that_nobody_reads_cost_nothing():
    read, _ = consumer(taps(4, 3))
    weight = read.weight.clone()
    weight[:, 3:6] = 0.0
    found = eliminate_with_refit([ReadUnits(read.covariance, weight, read.units)], 4, ridge=RIDGE)
    assert found.order[0] == 1 and found.loss[3] == pytest.approx(0.0, abs=1e-12)


def test_equivariant_to_the_order_of_units_and_features():
    reads = [consumer(u, seed=i)[0] for i, u in enumerate(CASES["two consumers"])]
    found = eliminate_with_refit(reads, 5, ridge=RIDGE)
    renamed = torch.tensor([3, 0, 4, 1, 2])
    moved = []
    for i, r in enumerate(reads):
        at = torch.randperm(len(r.units), generator=torch.Generator().manual_seed(i))
        moved.append(ReadUnits(r.covariance[at][:, at], r.weight[:, at], renamed[r.units[at]]))
    other = eliminate_with_refit(moved, 5, ridge=RIDGE)
    assert other.order.tolist() == renamed[found.order].tolist()
    np.testing.assert_allclose(other.loss, found.loss, rtol=1e-9, atol=1e-12)


def test_scales():
    """Larger weights or inputs: the same order, losses by the square; a factor between inputs and weights: nothing."""
    read, _ = consumer(taps(5, 3))
    found = eliminate_with_refit([read], 5, ridge=RIDGE)
    for p, w, factor in ((9.0, 1.0, 9.0), (1.0, 3.0, 9.0), (4.0, 0.5, 1.0)):
        other = eliminate_with_refit([ReadUnits(p * read.covariance, w * read.weight, read.units)], 5, ridge=RIDGE)
        assert other.order.tolist() == found.order.tolist()
        np.testing.assert_allclose(other.loss, factor * found.loss, rtol=1e-9)


def test_rotated_outputs_change_nothing():
    read, _ = consumer(taps(5, 2), outputs=4)
    turn = torch.linalg.qr(torch.randn(9, 4, dtype=F64, generator=torch.Generator().manual_seed(1)))[0]
    a, b = (
        eliminate_with_refit([ReadUnits(read.covariance, w, read.units)], 5) for w in (read.weight, turn @ read.weight)
    )
    assert a.order.tolist() == b.order.tolist()
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-9)


def test_first_and_ties():
    read, _ = consumer(taps(5, 2))
    p = read.covariance.clone()
    p[[0, 1, 8, 9]], p[:, [0, 1, 8, 9]] = 0.0, 0.0  # units 0 and 4 do not vary
    found = eliminate_with_refit([ReadUnits(p, read.weight, read.units)], 5, ridge=RIDGE, first=[4, 0])
    assert found.order[:2].tolist() == [4, 0] and not found.loss[3:].any() and found.loss[2] > 0
    everything = eliminate_with_refit([ReadUnits(p, read.weight, read.units)], 5, first=[3, 1, 0, 2, 4])
    assert everything.order.tolist() == [3, 1, 0, 2, 4] and not everything.loss.any()
    same = ReadUnits(torch.eye(4, dtype=F64), torch.eye(4, dtype=F64), torch.arange(4))
    norms = np.array([2.0, 4.0, 1.0, 3.0])
    assert eliminate_with_refit([same], 4, tie_break=norms).order.tolist() == [2, 0, 3, 1]
    assert eliminate_with_refit([same], 4).order.tolist() == [0, 1, 2, 3]
    assert eliminate_with_refit([], 3, tie_break=-np.arange(3.0)).order.tolist() == [2, 1, 0]


@pytest.mark.parametrize("round_", [2, 16])
@pytest.mark.parametrize("case", CASES)
def test_another_metric_measures_the_same_refit(case, round_, monkeypatch):
    monkeypatch.setattr(elimination, "ROUND", round_)
    reads = []
    for i, u in enumerate(CASES[case]):
        read, other = (consumer(u, outputs=3 + i, seed=i + s)[0] for s in (0, 50))
        reads.append(ReadUnits(read.covariance, read.weight, read.units, 0.5 + i, other.covariance))
    n = 1 + max(int(r.units.max()) for r in reads)

    def loss(removed):
        return sum(weighted(r, removed) for r in reads)

    found = eliminate_with_refit(reads, n, ridge=RIDGE)
    for step in range(n + 1):
        assert found.loss[n - step] == pytest.approx(loss(found.order[:step]), rel=1e-8, abs=1e-10)
    for step in range(n - 1 if round_ == 16 else 0):
        others = [loss([*found.order[:step], u]) for u in found.order[step:]]
        assert found.loss[n - step - 1] <= min(others) * (1 + 1e-8)


def weighted(read, removed, ridge=RIDGE):
    """Change of the weights by the refit, measured by the metric."""
    gone = torch.isin(read.units, torch.as_tensor(list(removed), dtype=torch.int64))
    p = read.covariance + ridge * read.covariance.diagonal().mean() * torch.eye(len(gone), dtype=F64)
    change = -read.weight.clone()
    change[:, ~gone] = 0.0
    if (~gone).any():
        change[:, ~gone] = torch.linalg.solve(p[~gone][:, ~gone], p[~gone][:, gone] @ read.weight[:, gone].mT).mT
    return read.factor * float((change @ read.metric * change).sum())


def test_the_own_covariance_as_metric_leaves_out_the_ridge():
    read, _ = consumer(taps(6, 3))
    plain = eliminate_with_refit([read], 6, ridge=1e-7)
    same = ReadUnits(read.covariance, read.weight, read.units, metric=read.covariance)
    found = eliminate_with_refit([same], 6, ridge=1e-7)
    assert found.order.tolist() == plain.order.tolist()
    np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-4)


@pytest.mark.parametrize("double, rel", [(0, 1e-3), (1000, 1e-8)])
@pytest.mark.parametrize("rows", [40, 2000])
def test_no_drift_over_a_long_elimination(rows, double, rel, monkeypatch):
    """60 units of 9 taps; fewer rows than features leave the ridge to hold everything."""
    monkeypatch.setattr(elimination, "DOUBLE", double)
    read, _ = consumer(taps(60, 9), outputs=30, rows=rows)
    found = eliminate_with_refit([read], 60, ridge=1e-3)
    for step in (1, 7, 20, 45, 59, 60):
        assert found.loss[60 - step] == pytest.approx(direct(read, found.order[:step], 1e-3), rel=rel)


@pytest.mark.parametrize("double", [0, 1000])
@pytest.mark.parametrize("n_taps, rows", [(1, 4000), (4, 100), (4, 4000)])
def test_rounds_lose_little_against_single_steps(n_taps, rows, double, monkeypatch):
    """Related units, as channels behind a ReLU are; in either precision."""
    monkeypatch.setattr(elimination, "DOUBLE", double)
    generator = torch.Generator().manual_seed(n_taps)
    d = 96 * n_taps
    hidden, mix, noise = (torch.randn(*n, generator=generator).double() for n in ((rows, 24), (24, d), (rows, d)))
    x = (hidden @ mix / 5 + noise / 2).relu()
    weight = torch.randn(40, d, generator=generator).double()
    reads = [ReadUnits(torch.cov(x.T), weight, torch.as_tensor(taps(96, n_taps)))]
    found = eliminate_with_refit(reads, 96)
    for gone in (1, 13, 48, 80, 95):
        assert found.loss[96 - gone] == pytest.approx(direct(reads[0], found.order[:gone], 1e-3), rel=1e-4)
    monkeypatch.setattr(elimination, "ROUND", 96)
    single = eliminate_with_refit(reads, 96)
    assert (found.loss[1:-1] <= (1.02 if rows > 96 * n_taps else 1.05) * single.loss[1:-1]).all()


def test_copies_do_not_go_in_one_round():
    """20 units of 60 are copies of 20 others: each alone costs next to nothing, both together are dear."""
    read, x = consumer(taps(40, 2), rows=500)
    x = torch.cat([x, x[:, :40]], 1)
    twins = ReadUnits(x.mT @ x / len(x), torch.cat([read.weight, read.weight[:, :40]], 1), torch.as_tensor(taps(60, 2)))
    found = eliminate_with_refit([twins], 60, ridge=1e-6)
    assert sorted(u % 40 for u in found.order[:20]) == list(range(20))
    assert found.loss[40] < 0.01 * found.loss[39]


def test_what_float32_cannot_tell_is_done_in_float64(monkeypatch):
    """A ridge far below the precision of float32, and inputs that only it holds apart."""
    read, x = consumer(taps(30, 3), rows=20)
    small = ReadUnits(x.mT @ x / len(x), read.weight, read.units)
    expected = eliminate_with_refit([small], 30, ridge=1e-9)
    monkeypatch.setattr(elimination, "DOUBLE", 0)
    found = eliminate_with_refit([small], 30, ridge=1e-9)
    assert found.order.tolist() == expected.order.tolist()
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-9)


def test_refuses():
    read, _ = consumer(taps(3, 1))
    with pytest.raises(ValueError, match="ridge=0"):
        eliminate_with_refit([read], 3, ridge=0.0)
    with pytest.raises(ValueError, match="positive semi-definite"):
        eliminate_with_refit([ReadUnits(read.covariance - 5 * torch.eye(3), read.weight, read.units)], 3)
