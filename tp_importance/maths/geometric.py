r"""Widths from importances under posynomial costs: the convex programs of ITPruner.

With kept fractions x and quadratic costs :math:`F_f(x) = k_f + a_f^\top x + x^\top Q_f x` with coefficients ≥ 0:

* ``"gp"`` (ours): :math:`\min \sum \alpha_i / x_i` s.t. :math:`F \le B,\ l \le x \le h`, a geometric program,
  strictly convex in :math:`y = \log x`: one optimum, with a dual certificate.
* ``"linear"`` (the paper's problem): :math:`\max \sum \alpha_i x_i` under the same constraints. Not convex; solved by
  condensation (successive geometric programs), a local optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.types import Floats
from .interior import Objective, minimise

__all__ = ["Posynomial", "Solution", "condense", "solve", "solve_cvxpy"]


@dataclass(frozen=True, eq=False)
class Posynomial:
    """Constraint F(x) ≤ limit.

    Attributes:
        constant: k ≥ 0.
        linear: a ≥ 0, shape (n,).
        quadratic: symmetric Q ≥ 0, shape (n, n).
        limit: B > 0.
    """

    constant: float
    linear: Floats
    quadratic: Floats
    limit: float

    def value(self, x: Floats) -> float:
        """F(x)."""
        return float(self.constant + self.linear @ x + x @ self.quadratic @ x)

    def log_derivatives(self, x: Floats) -> tuple[float, Floats, Floats]:
        """Value, gradient and Hessian of log(F(eʸ)/B) in y = log x."""
        product = self.quadratic * x
        slope = x * (self.linear + 2 * product.sum(1))
        f = self.value(x)
        gradient = slope / f
        hessian = (2 / f * x)[:, None] * product - gradient[:, None] * gradient
        hessian[np.diag_indices(len(x))] += gradient
        return float(np.log(f / self.limit)), gradient, hessian

    def fix(self, x: Floats, free: NDArray[np.bool_]) -> Posynomial:
        """The same constraint on the ``free`` variables, the others held at ``x``."""
        rest = np.where(free, 0.0, x)
        linear = (self.linear + 2 * self.quadratic @ rest)[free]
        return Posynomial(self.value(rest), linear, self.quadratic[np.ix_(free, free)], self.limit)


@dataclass(frozen=True, eq=False)
class Solution:
    r"""Optimum of a program, with what proves it.

    Attributes:
        x: kept fractions, shape (n,).
        objective: value of the objective.
        bound: no feasible point is better: by convexity of the Lagrangian :math:`h = f + \sum_f \lambda_f g_f` in y,
            :math:`h(y) + \sum_i \min_{l_i \le z \le u_i} \partial_i h(y) (z - y_i)`. Infinite for ``"linear"``.
        multipliers: λ of the cost constraints in log form, so :math:`\lambda_f = -\partial f / \partial \log B_f`.
        kkt_residual: largest of :math:`|y - P(y - \nabla h)|` (P: onto the bounds) and
            :math:`|\min(\lambda_f, -g_f)|`, with the objective scaled to a gradient of largest entry 1.
    """

    x: Floats
    objective: float
    bound: float
    multipliers: Floats
    kkt_residual: float


def solve(alpha: Floats, constraints: list[Posynomial], low: Floats, high: Floats) -> Solution:
    r"""Minimise :math:`\sum \alpha_i / x_i` under posynomial costs and bounds, by a primal-dual interior-point method.

    Args:
        alpha: weights > 0, shape (n,).
        constraints: costs; each must hold at ``low``.
        low: lower bounds > 0, shape (n,).
        high: upper bounds ≥ ``low``, shape (n,).

    Returns:
        :class:`Solution`; weights below about 1e-9 of the largest count, but are not resolved among themselves.

    Raises:
        ValueError: for weights or bounds that are not positive, or if ``low`` exceeds a limit.

    Example:
        >>> cost = Posynomial(0.0, np.ones(2), np.zeros((2, 2)), 1.0)
        >>> solve(np.array([1.0, 4.0]), [cost], np.full(2, 1e-3), np.ones(2)).x.round(4).tolist()
        [0.3333, 0.6667]
    """
    _check(alpha, constraints, low, high)

    def objective(y: Floats) -> tuple[float, Floats, Floats]:
        terms = alpha * np.exp(-y)
        return float(terms.sum()), -terms, terms

    high = _reachable(constraints, low, high)
    y, multipliers = _interior_point(objective, constraints, np.log(low), np.log(high))
    return _certify(objective, constraints, low, high, y, multipliers)


def condense(alpha: Floats, constraints: list[Posynomial], low: Floats, high: Floats, *, rounds: int = 200) -> Solution:
    r"""Maximise :math:`\sum \alpha_i x_i` locally: replace the sum by its best monomial bound, solve, repeat.

    By the inequality of arithmetic and geometric means :math:`\sum \alpha_i x_i \ge \prod (\alpha_i x_i / w_i)^{w_i}`,
    with equality at the present x for :math:`w_i = \alpha_i x_i / \sum \alpha x`: a round never lowers the objective.
    Rounds look ahead along the last move, further as long as that pays.

    Args:
        alpha: see :func:`solve`.
        constraints: see :func:`solve`.
        low: see :func:`solve`.
        high: see :func:`solve`.
        rounds: most rounds.

    Returns:
        :class:`Solution`; ``bound`` is infinite, as a local optimum bounds nothing.
    """
    _check(alpha, constraints, low, high)
    high = _reachable(constraints, low, high)
    lower, upper = np.log(low), np.log(high)

    def monomial(w: Floats) -> Objective:
        return lambda y: (float(-w @ y), -w, np.zeros_like(w))

    y, value, multipliers = _inside(constraints, lower, upper), -np.inf, np.zeros(len(constraints))
    move, reach = np.zeros_like(y), 0.0
    for _ in range(rounds):
        w = alpha * np.exp(np.clip(y + reach * move, lower, upper))
        found, factors = _interior_point(monomial(w / w.sum()), constraints, lower, upper)
        better = float(alpha @ np.exp(found))
        done = reach == 0 and better <= value * (1 + 1e-8)
        if reach == 0 or better > value * (1 + 1e-8):
            y, move, value, multipliers = found, found - y, better, factors
            reach = min(2 * reach + 1, 64.0)
        else:
            reach = 0.0
        if done:
            break
    w = alpha * np.exp(y)
    solution = _certify(monomial(w / w.sum()), constraints, low, high, y, multipliers)
    return Solution(solution.x, float(alpha @ solution.x), np.inf, multipliers, solution.kkt_residual)


def solve_cvxpy(alpha: Floats, constraints: list[Posynomial], low: Floats, high: Floats) -> Solution:
    """The same program as :func:`solve` through cvxpy's disciplined geometric programming; slower, independent.

    Args:
        alpha: see :func:`solve`.
        constraints: see :func:`solve`.
        low: see :func:`solve`.
        high: see :func:`solve`.
    """
    import cvxpy

    _check(alpha, constraints, low, high)
    scale = float(alpha.sum())
    x = cvxpy.Variable(len(alpha), pos=True)
    rules = [x <= high, x >= low]
    for c in constraints:
        parts = [cvxpy.Constant(c.constant / c.limit)] if c.constant > 0 else []
        if len(one := np.flatnonzero(c.linear)):
            parts.append(cvxpy.sum(cvxpy.multiply(c.linear[one] / c.limit, x[one])))
        q = np.triu(2 * c.quadratic - np.diag(c.quadratic.diagonal())) / c.limit
        i, j = np.nonzero(q)
        if len(i):
            parts.append(cvxpy.sum(cvxpy.multiply(q[i, j], cvxpy.multiply(x[i], x[j]))))
        if len(i) or len(one):
            rules.append(sum(parts[1:], parts[0]) <= 1)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(cvxpy.multiply(alpha / scale, x**-1))), rules)
    problem.solve(gp=True)
    if x.value is None:
        raise RuntimeError(f"cvxpy ends with status {problem.status!r}")
    high = _reachable(constraints, low, high)
    found = np.clip(np.asarray(x.value, np.float64), low, high)
    value = float((alpha / found).sum())
    return Solution(found, value, float(problem.value) * scale, np.full(len(constraints), np.nan), np.nan)


def _check(alpha: Floats, constraints: list[Posynomial], low: Floats, high: Floats) -> None:
    if not (np.isfinite(alpha).all() and (alpha > 0).all()):
        raise ValueError("weights must be positive and finite; drop groups of weight 0 before solving")
    if not ((low > 0).all() and (low <= high).all()):
        raise ValueError("bounds must satisfy 0 < low <= high")
    for c in constraints:
        if c.value(low) > c.limit * (1 + 1e-12):
            raise ValueError(f"the lower bounds cost {c.value(low):g}, more than the limit {c.limit:g}")


def _reachable(constraints: list[Posynomial], low: Floats, high: Floats) -> Floats:
    """Upper bounds, put to the lower ones where a limit leaves no room at all."""
    high = high.copy()
    for c in constraints:
        if c.value(low) >= c.limit * (1 - 1e-10):
            costs = (c.linear + 2 * c.quadratic @ low) > 0
            high[costs] = low[costs]
    return high


def _inside(constraints: list[Posynomial], lower: Floats, upper: Floats) -> Floats:
    """A point between the bounds that leaves half of the room of every constraint."""
    room = [0.5 * (c.limit + c.value(np.exp(lower))) for c in constraints]
    share = 0.5
    while any(c.value(np.exp(lower + share * (upper - lower))) > r for c, r in zip(constraints, room, strict=True)):
        share *= 0.5
    return lower + share * (upper - lower)


def _certify(
    objective: Objective, constraints: list[Posynomial], low: Floats, high: Floats, y: Floats, multipliers: Floats
) -> Solution:
    """Solution at y with the bound and the KKT residual, from scratch: whoever found y and the multipliers."""
    lower, upper = np.log(low), np.log(high)
    value, gradient, _ = objective(y)
    slope, lagrangian, slack = gradient.copy(), value, 0.0
    scale = max(float(np.abs(gradient).max()), 1e-300)
    for c, factor in zip(constraints, multipliers, strict=True):
        g, first, _ = c.log_derivatives(np.exp(y))
        slope, lagrangian = slope + factor * first, lagrangian + factor * g
        slack = max(slack, abs(min(factor / scale, -g)))
    bound = lagrangian + float(np.minimum(slope * (lower - y), slope * (upper - y)).sum())
    stationarity = float(np.abs(y - np.clip(y - slope / scale, lower, upper)).max(initial=0.0))
    return Solution(np.clip(np.exp(y), low, high), value, bound, multipliers, max(stationarity, slack))


def _interior_point(
    objective: Objective,
    constraints: list[Posynomial],
    lower: Floats,
    upper: Floats,
) -> tuple[Floats, Floats]:
    """Minimise a convex objective in y; returns y and the multipliers of the constraints.

    What costs nothing goes to its upper bound, what cannot move is held: the rest has an interior.
    """
    multipliers, y = np.zeros(len(constraints)), upper.copy()
    binding = [i for i, c in enumerate(constraints) if c.value(np.exp(upper)) > c.limit]
    if not binding:
        return y, multipliers
    costs = np.any([constraints[i].linear + constraints[i].quadratic.sum(1) > 0 for i in binding], axis=0)
    free = costs & (upper > lower + 1e-12)
    if not free.any():
        return y, multipliers
    inner = [constraints[i].fix(np.exp(upper), free) for i in binding]

    def reduced(z: Floats) -> tuple[float, Floats, Floats]:
        full = y.copy()
        full[free] = z
        value, gradient, curvature = objective(full)
        return value, gradient[free], curvature[free]

    begin = _inside(inner, lower[free], upper[free])
    y[free], multipliers[binding] = minimise(reduced, inner, lower[free], upper[free], begin)
    return y, multipliers
