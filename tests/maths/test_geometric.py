import numpy as np
import pytest
from scipy.optimize import minimize

from tp_importance.maths.geometric import Posynomial, condense, solve, solve_cvxpy


def problem(n, seed=0, fraction=0.4, spread=1.0, constraints=1):
    """Chains with coupled widths; the limit is at a fraction of the way from the floor to the full cost."""
    rng = np.random.default_rng(seed)
    low, high = 1 / rng.choice([16, 32, 64, 256], n), np.ones(n)
    costs = []
    for _ in range(constraints):
        quadratic = np.zeros((n, n))
        for i in range(n - 1):
            quadratic[i, i + 1] = quadratic[i + 1, i] = rng.uniform(0.1, 5) * (rng.random() < 0.7)
        for i in rng.choice(n, max(1, n // 4)):
            quadratic[i, i] = rng.uniform(0.1, 5)
        cost = Posynomial(rng.uniform(0, 0.02 * n), rng.uniform(0.01, 3, n) * (rng.random(n) < 0.7), quadratic, 1.0)
        limit = cost.value(low) + fraction * (cost.value(high) - cost.value(low))
        costs.append(Posynomial(cost.constant, cost.linear, cost.quadratic, limit))
    return np.exp(-spread * rng.random(n)), costs, low, high


def check(solution, alpha, costs, low, high):
    assert solution.kkt_residual <= 1e-6
    assert (solution.x >= low).all() and (solution.x <= high).all() and (solution.multipliers >= 0).all()
    assert all(c.value(solution.x) <= c.limit * (1 + 1e-11) for c in costs)
    assert solution.objective == pytest.approx((alpha / solution.x).sum(), rel=1e-9)
    assert 0 <= solution.objective - solution.bound + 1e-12 * solution.objective <= 1e-8 * solution.objective


@pytest.mark.parametrize("n", [1, 2, 3, 10, 57, 120])
@pytest.mark.parametrize("fraction", [1e-4, 0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize(("spread", "constraints"), [(0, 1), (2, 2), (10, 1), (30, 3)])
def test_certificate(n, fraction, spread, constraints):
    p = problem(n, n, fraction, spread, constraints)
    check(solve(*p), *p)


@pytest.mark.parametrize(("n", "constraints"), [(5, 1), (12, 2), (57, 1)])
def test_against_cvxpy(n, constraints):
    p = problem(n, 1, constraints=constraints)
    ours, theirs = solve(*p), solve_cvxpy(*p)
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-5)
    np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_against_a_grid(seed):
    alpha, costs, low, high = problem(3, seed, 0.4)
    solution = solve(alpha, costs, low, high)
    axes = [np.geomspace(a, b, 60) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    c = costs[0]
    fits = c.constant + points @ c.linear + np.einsum("pi,ij,pj->p", points, c.quadratic, points) <= c.limit
    best = (alpha / points[fits]).sum(1).min()
    assert solution.bound <= solution.objective <= best
    assert best <= 1.25 * solution.objective


def test_against_random_starts():
    alpha, costs, low, high = problem(8, 5, constraints=2)
    solution = solve(alpha, costs, low, high)
    rng = np.random.default_rng(0)
    bounds = list(zip(np.log(low), np.log(high), strict=True))
    rules = [{"type": "ineq", "fun": lambda y, c=c: 1 - c.value(np.exp(y)) / c.limit} for c in costs]
    found = []
    for _ in range(50):
        start = rng.uniform(np.log(low), np.log(high))
        result = minimize(lambda y: (alpha / np.exp(y)).sum(), start, method="SLSQP", bounds=bounds, constraints=rules)
        if result.success and all(r["fun"](result.x) >= -1e-7 for r in rules):
            found.append(result.fun)
    assert len(found) > 25
    assert min(found) >= solution.objective * (1 - 1e-6)
    assert np.median(found) == pytest.approx(solution.objective, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_widths_grow_with_the_budget(seed):
    alpha, costs, low, high = problem(20, seed)
    c = costs[0]
    before = low
    for fraction in np.linspace(0.02, 1, 30):
        limit = c.value(low) + fraction * (c.value(high) - c.value(low))
        x = solve(alpha, [Posynomial(c.constant, c.linear, c.quadratic, limit)], low, high).x
        assert (x >= before * (1 - 1e-7)).all()
        before = x
    np.testing.assert_allclose(before, high)


def test_the_multiplier_is_the_price_of_the_limit():
    alpha, (c,), low, high = problem(10, 3)
    here = solve(alpha, [c], low, high)
    more = solve(alpha, [Posynomial(c.constant, c.linear, c.quadratic, c.limit * 1.0001)], low, high)
    assert (here.objective - more.objective) / np.log(1.0001) == pytest.approx(here.multipliers[0], rel=1e-2)


def test_corners():
    alpha, (c,), low, high = problem(6, 2)
    loose = Posynomial(c.constant, c.linear, c.quadratic, 1e9)
    assert (solve(alpha, [loose], low, high).x == high).all()
    tight = Posynomial(c.constant, c.linear, c.quadratic, c.value(low))
    np.testing.assert_allclose(solve(alpha, [tight], low, high).x[c.linear > 0], low[c.linear > 0])
    held = np.where(np.arange(6) == 2, low, high)  # a group that cannot move
    solution = solve(alpha, [c], low, held)
    assert solution.x[2] == low[2] and solution.kkt_residual <= 1e-6
    free = Posynomial(0.1, np.array([1.0, 0.0]), np.zeros((2, 2)), 0.5)  # the second costs nothing
    assert solve(np.ones(2), [free], np.full(2, 0.1), np.ones(2)).x == pytest.approx([0.4, 1.0])


def test_bad_problems():
    alpha, costs, low, high = problem(4)
    with pytest.raises(ValueError, match="weights"):
        solve(alpha * 0, costs, low, high)
    with pytest.raises(ValueError, match="bounds"):
        solve(alpha, costs, low * 0, high)
    with pytest.raises(ValueError, match="lower bounds cost"):
        solve(alpha, costs, high, high)


@pytest.mark.parametrize("n", [2, 10, 57])
def test_condensation(n):
    alpha, costs, low, high = problem(n, 4)
    solution = condense(alpha, costs, low, high)
    c = costs[0]
    assert c.value(solution.x) <= c.limit * (1 + 1e-11) and solution.bound == np.inf
    assert solution.objective == pytest.approx(alpha @ solution.x)
    assert solution.kkt_residual < 1e-2
    assert solution.objective >= alpha @ solve(alpha, costs, low, high).x - 1e-6  # the other program's optimum is worse
