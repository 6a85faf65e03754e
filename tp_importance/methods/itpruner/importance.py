"""ITPruner: widths from what layers share and a convex program (arXiv 2108.08532), for Torch-Pruning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import numpy as np
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor

from ...allocation.curves import Curve, curve_from_scores, host_scores
from ...allocation.program import Objective, ProgramAllocator, Solver, WeightSource, checked_objective
from ...allocation.space import WidthSpace
from ...budget import Budget
from ...core.arguments import checked_budget, checked_importance
from ...core.forward import ForwardFn
from ...core.progress import phase
from ...core.types import Floats, Ints
from ...graph.cost import CostModel
from ...graph.groups import PrunableGroups
from ...pruning.importance import StatisticalImportance
from ...statistics.observe import Watch
from .grams import LEAST_SAMPLES, GramStatistics
from .hsic import Estimator, Kernel, importance_weights, relevance

__all__ = ["ITPrunerImportance", "Per"]

Per = Literal["layer", "group"]


class ITPrunerImportance(StatisticalImportance):
    r"""Information-theoretic weights per group, and any importance inside the groups (ITPruner, arXiv 2108.08532).

    One pass, no labels: nHSIC between what the groups' first consumers receive, relevance
    :math:`t_g = \sum_{h \ne g} \mathrm{nHSIC}_{gh}` over its sum, weight
    :math:`\alpha_g = N_g e^{-\beta (t_g - \min t)}` [paper: without N, and up to the shift], where :math:`N_g` layers
    produce the channels of the group (ours: what counts is layers, and coupled ones share a width). A group of U units
    loses, at c of them,

    .. math:: L_g(c) = \alpha_g (U / c - 1) \text{ ("gp", ours)}, \qquad
              L_g(c) = \alpha_g (1 - c / U) \text{ ("linear", the paper's)}

    (at c = 0 of "gp", which no allocator reaches: as at ½). Which units go is the inner importance's choice
    [paper: L1 norm].

    Args:
        importance: inside the groups: any ``tp.importance.Importance``, or a data-driven one of ours, whose statistics
            come from the same pass; default: L1 norm.
        beta: β; 0 is equal weights, negative protects what layers share.
        estimator: of HSIC, ``"biased"`` [paper] or ``"unbiased"``, see :mod:`~tp_importance.methods.itpruner.hsic`.
        kernel: ``"linear"`` [paper] or ``"rbf"``.
        objective: ``"gp"`` or ``"linear"``.
        budget: what the network is to cost; the scores for Torch-Pruning's ``global_pruning=True`` then rank all units
            that the program keeps above all it removes (prune by :attr:`pruning_ratio`).
        pool: average channels over their positions before comparing groups; cheaper, ours.
        per: ``"layer"``, or ``"group"``: N = 1, so that a stage of many layers weighs what one layer does.
        solver: ``"direct"``, or ``"cvxpy"`` as an independent check, see
            :class:`~tp_importance.allocation.program.ProgramAllocator`.

    Attributes:
        nhsic: shape (G, G), in the order of ``groups``.
        relevance: t per group name.

    Raises:
        TypeError: if ``budget`` is no :class:`~tp_importance.Budget`, or ``importance`` cannot value channels.
        ValueError: for an unknown option or a β that is not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> importance = ITPrunerImportance(budget=Budget(macs=0.5))
        >>> importance = importance.collect(net, torch.randn(1, 3, 12, 12), [torch.randn(16, 3, 12, 12)])
        >>> tp.pruner.BasePruner(net, torch.randn(1, 3, 12, 12), importance, pruning_ratio=importance.pruning_ratio,
        ...                      global_pruning=True, ignored_layers=[net[4]]).step()
        >>> {"0": net[0].out_channels, "2": net[2].out_channels} == importance.allocated
        True
    """

    needs_labels = False
    default_allocator = "program"

    def __init__(
        self,
        *,
        importance: Any = None,
        beta: float = 0.0,
        estimator: Estimator = "biased",
        kernel: Kernel = "linear",
        objective: Objective = "gp",
        budget: Budget | None = None,
        pool: bool = False,
        per: Per = "layer",
        solver: Solver = "direct",
    ) -> None:
        inner = tp.importance.MagnitudeImportance(p=1) if importance is None else checked_importance(importance)
        super().__init__(classes=getattr(inner, "classes", None))
        if estimator not in ("biased", "unbiased"):
            raise ValueError(f"estimator={estimator!r} is unknown; choose 'biased' or 'unbiased'")
        if kernel not in ("linear", "rbf"):
            raise ValueError(f"kernel={kernel!r} is unknown; choose 'linear' or 'rbf'")
        if per not in ("layer", "group"):
            raise ValueError(f"per={per!r} is unknown; choose 'layer' or 'group'")
        importance_weights(np.zeros(1), beta)  # checks it
        self.importance, self.beta, self.estimator, self.kernel = inner, beta, estimator, kernel
        if budget is not None:
            checked_budget(budget).require_counted("ITPrunerImportance without a pruner")
        self.objective, self.budget, self.pool = checked_objective(objective), budget, pool
        self.per, self.solver = per, solver
        self.program()  # checks objective and solver
        self.needs_labels = isinstance(inner, StatisticalImportance) and inner.needs_labels
        self.nhsic: NDArray[np.float64] = np.zeros((0, 0))
        self.relevance: dict[str, float] = {}
        self._grams: GramStatistics | None = None
        self._orders: dict[str, Curve] = {}
        self._units: dict[str, int] = {}

    @property
    def least_samples(self) -> int:
        """Samples without which a batch has no HSIC; those of the importance inside, if it needs more."""
        inner = self.importance.least_samples if isinstance(self.importance, StatisticalImportance) else 1
        return max(LEAST_SAMPLES[self.estimator], inner)

    @property
    def weights(self) -> dict[str, float]:
        """Weight α per group name.

        Raises:
            NotCollectedError: before :meth:`collect`.
        """
        return self._weights(self.groups, self.relevance)

    @property
    def allocated(self) -> dict[str, int]:
        """Channels per group under ``budget``, in which :meth:`__call__` ranks."""
        return {g.name: self._units.get(g.name, g.n_units) * g.unit_size for g in self.groups}

    @property
    def pruning_ratio(self) -> float:
        """Overall ratio that makes Torch-Pruning's ``global_pruning`` remove as many channels as the allocation."""
        total, kept = sum(self.groups.widths.values()), sum(self.allocated.values())
        return 1.0 - (kept + 0.5) / total if kept < total else 0.0

    def reweighted(
        self, *, beta: float | None = None, objective: Objective | None = None, per: Per | None = None
    ) -> Self:
        """The same statistics with other weights or another objective, without a new pass.

        Args:
            beta: β; default: as it is.
            objective: default: as it is.
            per: default: as it is.
        """
        other = copy.copy(self)
        other.beta, other.per = self.beta if beta is None else beta, self.per if per is None else per
        other.objective = checked_objective(self.objective if objective is None else objective)
        other._cached_curves, other._ranks = other._valued(self.groups, self._orders, self.relevance), {}
        other._units = other._allocated(self.groups, other._cached_curves, self.relevance)
        return other

    def program(self, weights: WeightSource = None) -> ProgramAllocator:
        """The convex program that chooses the widths.

        Args:
            weights: α per group; default: those of this importance, once they are collected.
        """
        source = (lambda: self.weights) if weights is None else weights
        return ProgramAllocator(source, objective=self.objective, solver=self.solver)

    def watches(self, groups: PrunableGroups) -> list[Watch]:
        """See :meth:`~tp_importance.StatisticalImportance.watches`."""
        self._grams = GramStatistics(groups, kernel=self.kernel, estimator=self.estimator, pool=self.pool)
        inner = self.importance.watches(groups) if isinstance(self.importance, StatisticalImportance) else []
        return [*self._grams.watches(), *inner]

    def alongside(self, groups: PrunableGroups, forward_fn: ForwardFn | None) -> AbstractContextManager[None]:
        """See :meth:`~tp_importance.StatisticalImportance.alongside`."""
        inner = self.importance
        return inner.alongside(groups, forward_fn) if isinstance(inner, StatisticalImportance) else nullcontext()

    def before_batch(self, labels: Tensor) -> None:
        """See :meth:`~tp_importance.StatisticalImportance.before_batch`."""
        assert self._grams is not None
        self._grams.begin(len(labels))
        if isinstance(self.importance, StatisticalImportance):
            self.importance.before_batch(labels)

    def value(self, groups: PrunableGroups) -> dict[str, Curve]:
        """See :meth:`~tp_importance.StatisticalImportance.value`."""
        assert self._grams is not None
        with phase("comparing layers"):
            nhsic = self._grams.nhsic()
        shared = dict(zip(groups.names, relevance(nhsic).tolist(), strict=True))
        if isinstance(self.importance, StatisticalImportance):
            orders = self.importance.value(groups)
        else:
            orders = {g.name: curve_from_scores(host_scores(self.importance, groups, g)) for g in groups}
        curves = self._valued(groups, orders, shared)
        units = self._allocated(groups, curves, shared)
        constant = [n for n, own in zip(groups.names, nhsic.diagonal(), strict=True) if own == 0]
        if constant:
            warnings.warn(f"constant on the data, so of relevance 0: {', '.join(constant)}", stacklevel=4)
        self._orders, self.nhsic, self.relevance, self._units = orders, nhsic, shared, units
        return curves

    def _weights(self, groups: PrunableGroups, shared: Mapping[str, float]) -> dict[str, float]:
        alpha = importance_weights(np.array([shared[g.name] for g in groups]), self.beta)
        layers = [len(g.producers) if self.per == "layer" else 1 for g in groups]
        return dict(zip(groups.names, (alpha * layers).tolist(), strict=True))

    def _valued(
        self, groups: PrunableGroups, orders: Mapping[str, Curve], shared: Mapping[str, float]
    ) -> dict[str, Curve]:
        weights, curves = self._weights(groups, shared), {}
        for g in groups:
            order, kept = orders[g.name], np.arange(g.n_units + 1) / g.n_units
            kept[0] = 0.5 / g.n_units if self.objective == "gp" else 0.0
            loss = weights[g.name] * (1 / kept - 1 if self.objective == "gp" else 1 - kept)
            curves[g.name] = Curve(loss, order.order, order.kept, order.constant)
        return curves

    def _allocated(
        self, groups: PrunableGroups, curves: Mapping[str, Curve], shared: Mapping[str, float]
    ) -> dict[str, int]:
        """Units per group under the budget, if there is one."""
        if self.budget is None:
            return {}
        cost = CostModel.from_groups(groups)
        allocate = self.program(self._weights(groups, shared))
        units: Ints = allocate(curves, cost, WidthSpace.of(groups.groups), self.budget.marked_limits(cost.dense))
        return dict(zip(cost.names, units.tolist(), strict=True))

    def _rank(self, groups: PrunableGroups) -> dict[str, Floats]:
        ranks = super()._rank(groups)
        for name, units in self._units.items():
            gone = self._cached_curves[name].removed(units)
            ranks[name] = 0.5 + ranks[name] / 2
            ranks[name][gone] -= 0.5
        return ranks
