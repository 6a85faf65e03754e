"""Widths from weights by a convex program on the exact cost: ITPruner's allocation, for any importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ..core.types import Floats, Ints
from ..graph.cost import COST_FIELDS, CostModel
from ..maths.geometric import Posynomial, Solution, condense, solve, solve_cvxpy
from .curves import Curves
from .limits import Limits, require_reachable
from .space import WidthSpace
from .walk import fill_up

__all__ = [
    "Objective",
    "ProgramAllocator",
    "Solver",
    "WeightSource",
    "checked_objective",
    "implied_weights",
    "posynomials",
    "program",
]

Objective = Literal["gp", "linear"]
Solver = Literal["direct", "cvxpy"]
Weights = Mapping[str, float]
WeightSource = Weights | Callable[[], Weights | None] | None
"""Weights of a :class:`ProgramAllocator`, or what gives them."""


class ProgramAllocator:
    r"""Allocator that solves a program over kept fractions :math:`x_g = u_g / U_g`, then makes them admissible.

    ``"gp"`` (ours): :math:`\min \sum_g \alpha_g / x_g`, with all costs within their limits and
    :math:`x_g` between the floor and the ceiling of its group: one optimum, proven. ``"linear"`` (the paper's
    problem, arXiv 2108.08532): :math:`\max \sum_g \alpha_g x_g`, of which a local optimum is found. Units are rounded
    down, then steps that fit are added by gain of the value curves per cost. With equal weights (the default) only
    the order inside the groups is the importance's.

    Args:
        weights: α > 0 per group name, or a function that gives them when they are there; default: equal. Where layers
            share widths, ``{g.name: len(g.producers) for g in pruner.groups}`` counts layers, not groups.
        objective: ``"gp"`` or ``"linear"``.
        solver: ``"direct"``, or ``"cvxpy"`` as an independent check (``"gp"`` only).

    Attributes:
        certificate: of the last solve: ``objective`` at the continuous optimum, its lower ``bound`` (``"gp"`` only,
            where the optimum is global; no admissible widths are below it), the ``kkt_residual``, the multiplier of
            every limit in log form (``multiplier_macs``: what the objective gains per relative change of the limit),
            and ``objective_units`` at the widths that were returned.

    Raises:
        ValueError: for an unknown objective or solver.

    Example:
        >>> import torch, torch_pruning as tp
        >>> from torch import nn
        >>> from tp_importance import Budget, BudgetPruner
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> pruner = BudgetPruner(net, torch.randn(1, 3, 12, 12), budget=Budget(macs=0.5),
        ...                       importance=tp.importance.MagnitudeImportance(p=1), allocator=ProgramAllocator())
        >>> pruner.plan().certificate["kkt_residual"] < 1e-6
        True
    """

    def __init__(
        self,
        weights: WeightSource = None,
        *,
        objective: Objective = "gp",
        solver: Solver = "direct",
    ) -> None:
        self.objective = checked_objective(objective)
        if solver not in ("direct", "cvxpy"):
            raise ValueError(f"solver={solver!r} is unknown; choose 'direct' or 'cvxpy'")
        if solver == "cvxpy" and objective != "gp":
            raise ValueError("solver='cvxpy' is for objective='gp'")
        self.weights, self.solver = weights, solver
        self.certificate: dict[str, float] = {}

    def __call__(self, curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
        """Units per group, as any :data:`~tp_importance.allocation.registry.Allocator`.

        Raises:
            BudgetError: if the floor exceeds a limit; names the least reachable cost.
            ValueError: if a group has no weight, or one that is not positive.
        """
        require_reachable(cost, space, limits)
        given = self.weights() if callable(self.weights) else self.weights
        missing = [] if given is None else [n for n in cost.names if n not in given]
        if missing:
            raise ValueError(f"groups {missing} have no weight")
        alpha = np.array([1.0 if given is None else given[n] for n in cost.names], np.float64)
        solution = self._solve(alpha, posynomials(cost, limits), space.floor / cost.full, space.full / cost.full)
        units = fill_up(curves, cost, space, limits, solution.x * cost.full)
        self.certificate = self._certificate(alpha, solution, limits, units / cost.full)
        return units

    def _solve(self, alpha: Floats, constraints: list[Posynomial], low: Floats, high: Floats) -> Solution:
        if self.objective == "linear":
            return condense(alpha, constraints, low, high)
        return (solve if self.solver == "direct" else solve_cvxpy)(alpha, constraints, low, high)

    def _certificate(self, alpha: Floats, solution: Solution, limits: Limits, x: Floats) -> dict[str, float]:
        found = {
            "objective": solution.objective,
            "bound": solution.bound,
            "kkt_residual": solution.kkt_residual,
            "objective_units": float((alpha / x).sum() if self.objective == "gp" else alpha @ x),
            **{f"multiplier_{f}": v for f, v in zip(limits, solution.multipliers, strict=True)},
        }
        return {key: float(value) for key, value in found.items() if np.isfinite(value)}


def program(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    """:class:`ProgramAllocator` with equal weights; args and returns as for ``greedy``."""
    return ProgramAllocator()(curves, cost, space, limits)


def posynomials(cost: CostModel, limits: Limits) -> list[Posynomial]:
    """The limits as constraints on kept fractions, divided by the limits.

    Args:
        cost: the cost model.
        limits: upper limit per cost field.
    """
    result = []
    for field, limit in limits.items():
        f, size = COST_FIELDS.index(field), cost.full.astype(np.float64)
        quadratic = (cost.quadratic[f] + cost.quadratic[f].T) / 2 * np.outer(size, size) / limit
        result.append(Posynomial(float(cost.constant[f] / limit), cost.linear[f] * size / limit, quadratic, 1.0))
    return result


def implied_weights(cost: CostModel, limits: Limits, units: ArrayLike) -> Floats:
    r"""Weights for which the geometric program ends at given units: the inverse of :class:`ProgramAllocator`.

    At the optimum of :math:`\min \sum \alpha_g / x_g` on the surface :math:`F(x) = B` the slopes in log x agree:

    .. math:: \alpha_g / x_g = \lambda\, \partial \log F / \partial \log x_g

    so weights, up to a common factor, are coordinates of the budget surface. With several limits F is the cost that
    is nearest to its limit.

    Args:
        cost: the cost model.
        limits: upper limit per cost field.
        units: units per group > 0, shape (G,).

    Returns:
        α > 0 with geometric mean 1, shape (G,); groups that cost nothing get the least weight of the others.

    Raises:
        ValueError: if a group has no units.
    """
    x = np.asarray(units, np.float64) / cost.full
    if (x <= 0).any():
        raise ValueError(f"units {np.asarray(units).tolist()} must be above 0 in every group")
    binding = max(posynomials(cost, limits), key=lambda c: c.value(x))
    alpha = x * binding.log_derivatives(x)[1]
    positive = alpha[alpha > 0]
    alpha = np.maximum(alpha, positive.min() if len(positive) else 1.0)
    return alpha / float(np.exp(np.log(alpha).mean()))


def checked_objective(objective: Objective) -> Objective:
    """``objective``, if it is one for networks.

    Raises:
        ValueError: else.
    """
    if objective not in ("gp", "linear"):
        hint = (
            ": the published procedure has its own cost convention and works on the published networks only, see "
            "tp_importance.methods.itpruner.official"
            if objective == "official"
            else ""
        )
        raise ValueError(f"objective={objective!r} is not available; choose 'gp' or 'linear'{hint}")
    return objective
