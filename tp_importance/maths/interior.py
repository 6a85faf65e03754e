"""A primal-dual interior-point method for smooth convex programs with bounds and a few dense constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.linalg import lu_factor, lu_solve

from ..core.types import Floats

__all__ = ["Objective", "minimise"]


Objective = Callable[[Floats], tuple[float, Floats, Floats]]
"""y → value, gradient (n,) and diagonal of the Hessian (n,)."""


class _Constraint(Protocol):
    def log_derivatives(self, x: Floats) -> tuple[float, Floats, Floats]:
        """Value, gradient and Hessian of g in y = log x."""


def minimise(
    objective: Objective, constraints: Sequence[_Constraint], lower: Floats, upper: Floats, y: Floats
) -> tuple[Floats, Floats]:
    r"""Minimise f(y) subject to :math:`g_i(y) \le 0` and :math:`l \le y \le u`, all convex and with an interior.

    Newton's method on the perturbed KKT system with slacks :math:`g + s = 0`, Mehrotra's predictor and corrector on one
    factorisation (Nocedal and Wright 2006, §19.3). Where the corrected step is short, a cautious one is taken instead.

    Args:
        objective: f; its Hessian is diagonal.
        constraints: g, at least one.
        lower: l, shape (n,).
        upper: u > l, shape (n,).
        y: a point strictly between the bounds, shape (n,).

    Returns:
        ``(y, multipliers)``, shapes (n,) and (m,), to about machine precision.
    """
    n = len(y)
    scale = 1.0 / max(float(np.abs(objective(y)[1]).max()), 1e-300)
    gradient, curvature, g, first, second = _evaluate(objective, constraints, y)
    room = np.concatenate([y - lower, upper - y, np.maximum(-g, 1e-2)])
    dual = 0.1 / room
    for _ in range(100):
        gap = float(dual @ room) / len(room)
        stationary = scale * gradient - dual[:n] + dual[n : 2 * n] + dual[2 * n :] @ first
        primal = g + room[2 * n :]
        if gap < 1e-15 and np.abs(stationary).max() < 1e-12 and np.abs(primal).max() < 1e-14:
            break
        hessian = np.einsum("f,fij->ij", dual[2 * n :], second)
        hessian[np.diag_indices(n)] += scale * curvature
        newton = _Newton.factorised(hessian, first, stationary, primal, room, dual)
        move, turn = newton.direction(np.zeros_like(room))
        size = min(1.0, _largest(room, move), _largest(dual, turn))
        centring = (float((room + size * move) @ (dual + size * turn)) / len(room) / gap) ** 3
        size = 0.0
        for target in (centring * gap - move * turn, np.full(len(room), 0.5 * gap)):
            if size < 0.1:
                move, turn = newton.direction(target)
                size = min(1.0, 0.995 * _largest(room, move), 0.995 * _largest(dual, turn))
        if not np.isfinite(move).all() or size < 1e-10:
            break  # as precise as the arithmetic allows
        y, room, dual = y + size * move[:n], room + size * move, dual + size * turn
        gradient, curvature, g, first, second = _evaluate(objective, constraints, y)
    return np.clip(y, lower, upper), dual[2 * n :] / scale


def _evaluate(
    objective: Objective, constraints: Sequence[_Constraint], y: Floats
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    _, gradient, curvature = objective(y)
    g, first, second = zip(*(c.log_derivatives(np.exp(y)) for c in constraints), strict=True)
    return gradient, curvature, np.array(g), np.stack(first), np.stack(second)


@dataclass(frozen=True, eq=False)
class _Newton:
    """The KKT system linearised at one point; room and dual are those of lower bounds, upper bounds, constraints."""

    factors: Any
    stationary: Floats
    primal: Floats
    room: Floats
    dual: Floats

    @classmethod
    def factorised(
        cls, hessian: Floats, first: Floats, stationary: Floats, primal: Floats, room: Floats, dual: Floats
    ) -> _Newton:
        n, ratio = len(stationary), dual / room
        hessian[np.diag_indices(n)] += ratio[:n] + ratio[n : 2 * n]
        factors = lu_factor(np.block([[hessian, first.T], [first, -np.diag(1 / ratio[2 * n :])]]))
        return cls(factors, stationary, primal, room, dual)

    def direction(self, target: Floats) -> tuple[Floats, Floats]:
        """Changes of room and dual that bring dual·room to ``target`` in linear approximation."""
        n, ratio = len(self.stationary), self.dual / self.room
        change = target / self.room - self.dual  # what the duals do where the room does not move
        right = np.concatenate(
            [self.stationary - change[:n] + change[n : 2 * n], self.primal + change[2 * n :] / ratio[2 * n :]]
        )
        step = lu_solve(self.factors, -right)
        move = np.concatenate([step[:n], -step[:n], (change[2 * n :] - step[n:]) / ratio[2 * n :]])
        return move, np.concatenate([(change - ratio * move)[: 2 * n], step[n:]])


def _largest(value: Floats, change: Floats) -> float:
    """Largest step that keeps ``value`` ≥ 0."""
    falling = change < 0
    return float((-value[falling] / change[falling]).min(initial=np.inf))
