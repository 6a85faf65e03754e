import pytest
import torch

from tp_importance.maths.least_squares import refit, residual_energy
from tp_importance.maths.ridge import ALIKE, RIDGES, cross_validated

F64 = torch.float64


def rows(n, *shape, seed=0):
    return torch.randn(n, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def chosen(*arguments, **options):
    return cross_validated(*arguments, **options)[1]


def moments(u, e):
    """P, M and mean squares of one or more groups; rows (R, G, d) and (R, G, O)."""
    n = len(u)
    return torch.einsum("rgd,rgf->gdf", u, u) / n, torch.einsum("rgd,rgo->gdo", u, e) / n, e.square().mean(0)


def by_hand(u, e, kept, ridge, shares, constant=True):
    """GCV from stored rows and hat matrices."""
    total = 0.0
    for g in range(u.shape[1]):
        x, n = u[:, g, kept[g]], len(u)
        if not x.any():
            hat = torch.zeros(n, n, dtype=F64)
        else:
            epsilon = ridge * x.square().mean(0).mean()
            hat = x @ torch.linalg.solve(x.T @ x / n + epsilon * torch.eye(x.shape[1], dtype=F64), x.T) / n
        left = ((e[:, g] - hat @ e[:, g]).square().mean(0) * shares[g]).sum()
        total = total + left / (1 - (hat.trace() + constant) / n) ** 2
    return float(total)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("noise", [0.01, 1.0, 10.0])
@pytest.mark.parametrize(("n", "constant"), [(60, True), (60, False), (20, False)])
def test_it_is_the_minimum_of_gcv_by_hand(groups, noise, n, constant):
    d, outputs = 12, 4
    u = rows(n, groups, d) * torch.linspace(0.1, 2, d, dtype=F64)
    e = torch.einsum("rgd,gdo->rgo", u, rows(groups, d, outputs, seed=1)) + noise * rows(n, groups, outputs, seed=2)
    kept = torch.rand(groups, d, generator=torch.Generator().manual_seed(3)) > 0.3
    kept[-1, :2] = True
    if groups > 1:
        kept[0] = False  # a group that goes as a whole
    shares = torch.rand(groups, outputs, dtype=F64, generator=torch.Generator().manual_seed(4))
    found = chosen(moments(u, e)[0], kept, *moments(u, e)[1:], n, shares, constant=constant)
    scores = {r: by_hand(u, e, kept, r, shares, constant) for r in RIDGES}
    assert found == best(scores)


def best(scores):
    return max(r for r, score in scores.items() if score <= min(scores.values()) * (1 + ALIKE))


def test_fewer_rows_take_a_stronger_pull():
    u, w = rows(4000, 1, 40), rows(1, 40, 8, seed=1)
    e = torch.einsum("rgd,gdo->rgo", u, w) + 20 * rows(4000, 1, 8, seed=2)
    kept = torch.ones(1, 40, dtype=torch.bool)
    found = [chosen(*_with(kept, moments(u[:n], e[:n])), n) for n in (30, 4000)]
    assert found[0] > found[1]


def test_it_errs_less_on_other_rows_than_a_small_ridge():
    u, w = rows(4000, 1, 40), rows(1, 8, 40, seed=1)
    y = torch.einsum("rgd,god->rgo", u, w) + 20 * rows(4000, 1, 8, seed=2)
    kept, nothing = torch.ones(1, 40, dtype=torch.bool), torch.zeros(1, 8, 40, dtype=F64)
    p, m, error = moments(u[:50], y[:50])
    true, cross, energy = moments(u[50:], y[50:])

    def elsewhere(ridge):
        return float(residual_energy(true, refit(p, nothing, kept, ridge, missing=m), cross, energy).sum())

    assert elsewhere(chosen(p, kept, m, error, 50)) < 0.7 * elsewhere(RIDGES[0])


def test_nothing_lacking_and_nothing_varying():
    kept = torch.tensor([[True, True, False], [False, False, False]])
    still = torch.zeros(2, 3, 3, dtype=F64)
    assert chosen(still, kept, torch.zeros(2, 3, 2, dtype=F64), torch.zeros(2, 2, dtype=F64), 10) == RIDGES[0]
    u = rows(10, 2, 3)
    assert chosen(*_with(kept, moments(u, torch.zeros(10, 2, 2, dtype=F64))), 10) == RIDGES[0]


def test_a_minimum_behind_a_hill_is_found():
    """One weak direction that is signal, and noise: the score rises before it falls."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(400, 1, 190, dtype=F64, generator=generator)
    u[..., 0] *= 0.02
    e = 250 * u[..., :1] + 8 * torch.randn(400, 1, 1, dtype=F64, generator=generator)
    kept, shares = torch.ones(1, 190, dtype=torch.bool), torch.ones(1, 1, dtype=F64)
    scores = {r: by_hand(u, e, kept, r, shares) for r in RIDGES}
    assert chosen(*_with(kept, moments(u, e)), 400) == best(scores) > RIDGES[0]
    assert scores[RIDGES[1]] > scores[RIDGES[0]]


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("constant", [True, False])
def test_too_few_rows_to_tell_take_the_strongest_pull(n, constant):
    u, e = rows(n, 1, 40), rows(n, 1, 3, seed=1)
    if constant:
        u, e = u - u.mean(0), e - e.mean(0)
    found = chosen(*_with(torch.ones(1, 40, dtype=torch.bool), moments(u, e)), n, constant=constant)
    assert found == (RIDGES[0] if n == 1 and constant else RIDGES[-1])  # one centred row lacks nothing


def test_outputs_without_a_share_do_not_count():
    u, w = rows(30, 1, 20), rows(1, 20, 2, seed=1)
    e = torch.einsum("rgd,gdo->rgo", u, w)
    e[..., 1] = 100 * rows(30, 1, seed=2)
    arguments = _with(torch.ones(1, 20, dtype=torch.bool), moments(u, e))
    assert chosen(*arguments, 30) > chosen(*arguments, 30, torch.tensor([[1.0, 0.0]])) == RIDGES[0]


def _with(kept, found):
    return found[0], kept, *found[1:]
