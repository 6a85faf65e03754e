import pytest
import torch

from tp_importance.maths.least_squares import eigen, output_energy, refit, residual_energy

F64 = torch.float64


def problem(n=200, groups=2, d=9, outputs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, d, d, generator=generator, dtype=F64)
    u = torch.einsum("ngd,gde->nge", torch.randn(n, groups, d, generator=generator, dtype=F64), mix)
    weight = torch.randn(groups, outputs, d, generator=generator, dtype=F64)
    kept = torch.rand(groups, d, generator=generator) < 0.6
    kept[:, 0], kept[:, 1] = True, False
    return u, weight, kept


def second(u):
    return torch.einsum("ngd,nge->gde", u, u) / len(u)


def test_without_a_ridge_it_is_least_squares():
    u, weight, kept = problem()
    new = refit(second(u), weight, kept, 0.0)
    for g in range(2):
        direct = torch.linalg.lstsq(u[:, g, kept[g]], u[:, g] @ weight[g].T).solution
        torch.testing.assert_close(new[g, :, kept[g]], direct.T)
        assert not new[g, :, ~kept[g]].any()


def test_the_ridge_pulls_to_the_old_weights():
    u, weight, kept = problem(groups=1)
    u, weight, kept = u[:, 0], weight[0], kept[0]
    p = second(u[:, None])[0]
    eps = 0.3 * p[kept][:, kept].diagonal().mean()
    # |y - W'u_k|² + ε|W' - W_k|² as one least-squares problem: rows √n·√ε for every weight
    root = (len(u) * eps).sqrt()
    left = torch.cat([u[:, kept], root * torch.eye(int(kept.sum()), dtype=F64)])
    right = torch.cat([u @ weight.T, root * weight[:, kept].T])
    direct = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(refit(p[None], weight[None], kept[None], 0.3)[0][:, kept], direct)
    far = refit(p[None], weight[None], kept[None], 1e9)[0]
    torch.testing.assert_close(far[:, kept], weight[:, kept], rtol=1e-6, atol=1e-6)


def test_targets_of_another_network():
    u, weight, kept = problem()
    y = torch.einsum("ngd,god->ngo", u, weight) + torch.randn(200, 2, 4, generator=torch.Generator().manual_seed(1))
    cross = torch.einsum("ngd,ngo->gdo", u, y) / len(u)
    missing = cross - second(u) @ (weight * kept.unsqueeze(1)).mT
    new = refit(second(u), weight, kept, 0.0, missing)
    for g in range(2):
        direct = torch.linalg.lstsq(u[:, g, kept[g]], y[:, g]).solution
        torch.testing.assert_close(new[g, :, kept[g]], direct.T)
    missed = (y - torch.einsum("ngd,god->ngo", u, new)).square().mean(0)
    torch.testing.assert_close(residual_energy(second(u), new, cross, y.square().mean(0)), missed)


def test_own_outputs_as_targets_are_the_default():
    u, weight, kept = problem()
    p = second(u)
    missing = p @ (weight * ~kept.unsqueeze(1)).mT
    torch.testing.assert_close(refit(p, weight, kept, 1e-2, missing), refit(p, weight, kept, 1e-2))


def test_nothing_removed_nothing_changed():
    u, weight, kept = problem()
    assert refit(second(u), weight, torch.ones_like(kept), 1e-3) is weight
    kept[0] = True  # one conv group of two loses nothing
    assert torch.equal(refit(second(u), weight, kept, 1e-3)[0], weight[0])


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
def test_a_linear_combination_costs_nothing(ridge):
    u, weight, kept = problem()
    for g in range(2):
        u[:, g, ~kept[g]] = u[:, g, kept[g]] @ torch.randn(int(kept[g].sum()), int((~kept[g]).sum()), dtype=F64)
    new = refit(second(u), weight, kept, ridge)
    y = torch.einsum("ngd,god->ngo", u, weight)
    torch.testing.assert_close(torch.einsum("ngd,god->ngo", u, new), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("n", [5, 200])  # fewer rows than features: singular
def test_the_error_never_grows(ridge, n):
    u, weight, kept = problem(n=n)
    p = second(u)
    new = refit(p, weight, kept, ridge)
    before = output_energy(p, weight * kept.unsqueeze(1) - weight)
    after = output_energy(p, new - weight)
    assert (after <= before + 1e-12 * before.max()).all()
    assert after.sum() < before.sum()


def test_singular_and_constant_inputs():
    _, weight, kept = problem()
    assert torch.equal(refit(torch.zeros(2, 9, 9, dtype=F64), weight, kept, 1e-3), weight * kept.unsqueeze(1))
    twin = torch.ones(1, 3, 3, dtype=F64)  # three times the same feature
    new = refit(twin, torch.tensor([[[1.0, 1.0, 1.0]]], dtype=F64), torch.tensor([[True, True, False]]), 0.0)
    torch.testing.assert_close(new, torch.tensor([[[1.5, 1.5, 0.0]]], dtype=F64))  # the shortest way


def test_slightly_indefinite_moments():
    p = torch.eye(4, dtype=F64)
    p[0, 0] = -1e-7  # rounding of streamed float32 moments
    p[3, 1] = p[1, 3] = 0.5
    new = refit(p[None], torch.ones(1, 2, 4, dtype=F64), torch.tensor([[True, True, True, False]]), 1e-8)
    assert torch.isfinite(new).all()
    torch.testing.assert_close(new[0, 0, 1], torch.tensor(1.5, dtype=F64))


def test_float32_input_is_solved_in_float64():
    u, weight, kept = problem()
    low = refit(second(u).float(), weight.float(), kept, 1e-3)
    assert low.dtype == F64
    torch.testing.assert_close(low, refit(second(u), weight, kept, 1e-3), rtol=1e-3, atol=1e-4)


def test_errors():
    u, weight, kept = problem()
    with pytest.raises(ValueError, match="ridge=-1"):
        refit(second(u), weight, kept, -1.0)
    with pytest.raises(ValueError, match="moments of shape"):
        refit(second(u)[:1], weight, kept, 1e-3)
    with pytest.raises(ValueError, match=r"missing of shape \(2, 9, 4\), not \(2, 4, 9\)"):
        refit(second(u), weight, kept, 1e-3, weight)


@pytest.mark.parametrize("scale", [1.0, 1e-17, 0.0])
def test_eigenvalues_of_any_scale(scale):
    gram = second(problem(d=40)[0]) * scale
    values, vectors = eigen(gram)
    torch.testing.assert_close(vectors @ (values.unsqueeze(2) * vectors.mT), gram, rtol=1e-9, atol=1e-12 * scale)
