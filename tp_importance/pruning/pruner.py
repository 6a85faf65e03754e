"""Prune to a budget with any importance and any allocator; what every pruner of channels shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..allocation.curves import Curve, value_curves
from ..allocation.registry import Allocator, named_allocator
from ..allocation.space import WidthSpace
from ..budget import Budget, Cost
from ..core.arguments import checked_budget, checked_importance, require_writable
from ..core.loaders import check_loader, require_reiterable
from ..core.options import hand_on, split_options
from ..core.processes import warned_once
from ..core.progress import shows_progress
from ..graph.cost import CostModel
from ..graph.groups import PrunableGroups
from ..latency.model import LatencyModel
from ..refitting.settings import Refit
from ..statistics.consumers import ConsumerStatistics
from ..statistics.labels import LabelFn
from .importance import StatisticalImportance
from .plan import Plan
from .registry import find_importance
from .report import PruningReport
from .target import PruningTarget

__all__ = ["BudgetPruner", "MethodPruner"]


@dataclass(frozen=True)
class _Collected:
    """What was collected, with what for and by whom: others may use the importance meanwhile."""

    groups: Any
    importance: Any
    curves: dict[str, Curve]
    statistics: ConsumerStatistics | None


class BudgetPruner:
    """Prune a network in place until it meets a budget exactly.

    The way is statistics → value curves → widths under the budget → surgery by Torch-Pruning → report. The cost
    never exceeds the budget, and not one more admissible step would fit. A latency is predicted, by a
    :class:`~tp_importance.latency.model.LatencyModel` that is measured when a budget first limits it; the prediction
    never exceeds the limit, and after the surgery the network is timed.

    Args:
        model: the network; only :meth:`step` and :meth:`apply` change it.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: re-iterable of batches for data-driven importances and refits; collected at the first :meth:`plan` or
            :meth:`step` and again after every step. For batch norms the pruner keeps a copy of the network as given.
        importance: a :class:`~tp_importance.StatisticalImportance`, any ``tp.importance.Importance``, or the name of a
            registered criterion, see :func:`~tp_importance.register_method`.
        budget: what the network may cost; fractions refer to ``model`` as given here, also after repeated steps.
            ``latency`` and ``latency_ms`` are those of ``example_inputs`` as they are, on a quiet machine. Without
            one, :meth:`plan` and :meth:`step` want it.
        allocator: ``"greedy"``, ``"lagrange"``, ``"uniform"``, ``"program"`` (with the weights of the importance, if it
            has some) or a function, see :mod:`tp_importance.allocation`. Default (also ``"default"``): what suits the
            importance, see :func:`~tp_importance.allocation.registry.default_allocator`: its own choice, ``"greedy"``
            where its scores compare across layers, else ``"uniform"``.
        label_fn: ``label_fn(batch)`` for loaders of unusual form.
        target: of this model, if there is one already; several pruners may share it. Then without further options.
        **options: see :class:`~tp_importance.pruning.target.PruningTarget`.

    Attributes:
        target: the :class:`~tp_importance.pruning.target.PruningTarget`: network, groups, cost, surgery.

    Raises:
        TypeError: for a model, importance, budget or allocator that is none, a class where an object is needed, or a
            compiled model; before anything runs.
        TracingError: if the network cannot be traced.
        ValueError: for bad options.

    Example:
        >>> import torch, torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> pruner = BudgetPruner(net, torch.randn(1, 3, 12, 12), budget=Budget(macs=0.5),
        ...                       importance=tp.importance.MagnitudeImportance(p=1))
        >>> pruner.plan(Budget(macs=0.25)).widths != pruner.plan().widths
        True
        >>> pruner.step().cost.macs <= 0.5 * pruner.dense.macs
        True
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any] | None = None,
        *,
        importance: Any,
        budget: Budget | None = None,
        allocator: str | Allocator | None = None,
        label_fn: LabelFn | None = None,
        target: PruningTarget | None = None,
        **options: Any,
    ) -> None:
        if target is not None and (options or target.model is not model):
            raise TypeError(
                f"target= is a network with options of its own: give it that network as model, and no {list(options)}"
            )
        (for_target,) = split_options(type(self), options, PruningTarget)
        self.budget = None if budget is None else checked_budget(budget)
        self.importance = find_importance(importance)
        named_allocator(allocator)  # checks it
        self._allocator, self._label_fn = allocator, label_fn
        if loader is not None:
            check_loader(loader)
        self.loader = loader
        self.target = PruningTarget(model, example_inputs, **for_target) if target is None else target
        self._collected: _Collected | None = None

    @property
    def _progress(self) -> bool | None:
        return self.target._progress

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            hand_on(cls, BudgetPruner)

    # -- the network

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.target.model

    @property
    def example_inputs(self) -> Any:
        """What it was traced with."""
        return self.target.example_inputs

    @property
    def groups(self) -> PrunableGroups:
        """Coupled groups of the network as it is now."""
        return self.target.groups

    @property
    def cost_model(self) -> CostModel:
        """Exact cost of any widths."""
        return self.target.cost_model

    @property
    def space(self) -> WidthSpace:
        """Admissible widths of the network as it is now."""
        return self.target.space

    @property
    def dense(self) -> Cost:
        """Cost of the network as given."""
        return self.target.dense

    @property
    def initial_widths(self) -> dict[str, int]:
        """Channels per group of the network as given."""
        return self.target.initial_widths

    def measure_latency(self) -> LatencyModel:
        """See :meth:`~tp_importance.pruning.target.PruningTarget.measure_latency`."""
        return self.target.measure_latency()

    def limits(self, budget: Budget | None = None) -> dict[str, float]:
        """Absolute limits of a budget: counts, and ``"latency_ms"`` if a latency is limited.

        Args:
            budget: default: the pruner's.

        Raises:
            TypeError: if there is none.
        """
        return self.target.limits(checked_budget(self.budget if budget is None else budget))

    def pruning_history(self, *, direct: bool = False) -> list[Any]:
        """Torch-Pruning's history ``[[module name, is_out, positions], ...]`` of all steps so far.

        Args:
            direct: in our own format instead, see :meth:`~tp_importance.pruning.target.PruningTarget.pruning_history`.
        """
        return self.target.pruning_history(direct=direct)

    def load_pruning_history(self, history: Sequence[Any]) -> None:
        """Repeat the steps of a history on the model, which must be as it was when the history began.

        Fractions of later budgets still refer to the model as given at construction.

        Args:
            history: in either format of :meth:`pruning_history`. Torch-Pruning's is repeated by the groups of this
                pruner, which must be verified (the default) if those were that were pruned.

        Raises:
            ValueError: if the history is of another network, or of other groups; the model is then as before.
        """
        self.target.load_pruning_history(history)

    # -- statistics, widths, surgery

    def collect(self) -> BudgetPruner:
        """Collect the statistics of the importance now; :meth:`plan` and :meth:`step` do it when needed.

        Raises:
            ValueError: if the importance needs data and the pruner has no loader, and for bad data.
        """
        if isinstance(self.importance, StatisticalImportance):
            if self.loader is None:
                raise ValueError(f"{self.importance.name} looks at data: pass loader= to the pruner")
            self.importance.collect(
                self.model,
                self.example_inputs,
                self.loader,
                groups=self.groups,
                forward_fn=self.groups.options.forward_fn,
                label_fn=self._label_fn,
                progress=self._progress,
            )
            curves = value_curves(self.importance, self.groups)
            statistics = getattr(self.importance, "consumer_statistics", None)
            self._collected = _Collected(self.groups.groups, self.importance, curves, statistics)
        return self

    @shows_progress
    def curves(self) -> dict[str, Curve]:
        """Value curve of every group, collected when needed.

        Raises:
            ValueError: for bad data, or if nothing can be pruned.
        """
        self.groups.require_some()
        checked_importance(self.importance)  # it may have been set later
        if not isinstance(self.importance, StatisticalImportance):
            return value_curves(self.importance, self.groups)  # weights and gradients may have changed: never kept
        known = self._known_curves()
        return self.collect()._known_curves() or {} if known is None else known

    def _known_curves(self) -> dict[str, Curve] | None:
        """What was collected, if it is of the groups as they are now."""
        known = self._known()
        return None if known is None else known.curves

    def _known(self) -> _Collected | None:
        kept = self._collected
        fits = kept is not None and kept.groups is self.groups.groups and kept.importance is self.importance
        return kept if fits else None

    @warned_once()
    def plan(self, budget: Budget | None = None) -> Plan:
        """Widths and cost under a budget, without touching the model and, for a second budget, the data.

        Args:
            budget: default: the pruner's.

        Returns:
            The :class:`~tp_importance.pruning.plan.Plan`.

        Raises:
            BudgetError: if the budget cannot be reached; names the least reachable cost. Also if the network itself is
                measured above a latency limit and predicted within it.
            ValueError: for bad data, or if nothing can be pruned.
        """
        limits, curves = self.limits(budget), self.curves()
        allocator = named_allocator(self._allocator, self._weights, self.importance)
        return self.target.allocate(allocator, curves, limits, constant=self._constant())

    def sweep(self, budgets: Sequence[Budget | float]) -> list[Plan]:
        """Plans for many budgets from one pass; see :mod:`tp_importance.pruning.sweep` for a table and a picture.

        Args:
            budgets: budgets, or fractions of the MACs.
        """
        return [self.plan(b if isinstance(b, Budget) else Budget(macs=float(b))) for b in budgets]

    def plan_of(self, removed: Mapping[str, Sequence[int]]) -> Plan:
        """The :class:`~tp_importance.pruning.plan.Plan` that removes given units, at whatever cost."""
        return self.target.plan(removed, constant=self._constant())

    def _constant(self) -> dict[str, list[int]]:
        return {n: c.constant.tolist() for n, c in (self._known_curves() or {}).items()}

    def _weights(self) -> Mapping[str, float] | None:
        return getattr(self.importance, "weights", None) if hasattr(self.importance, "curves") else None

    @warned_once()
    def step(self, budget: Budget | None = None, *, refit: Refit | str | bool | None = None) -> PruningReport:
        """Prune the model in place.

        Parameters that are cut become new objects without a gradient, so build the optimizer afterwards; those that
        stay as they are keep theirs. Memory formats (``channels_last``) stay.

        Args:
            budget: default: the pruner's. Repeated steps with falling budgets prune iteratively.
            refit: repair the network on the pruner's loader, see :class:`~tp_importance.Refit`: settings, a mode, or
                ``True`` for ``"sequential"``, the best measured; ``None`` leaves weights and statistics alone. Batch
                norms move by the change since the network as given (or as training has left it); for that the pruner
                keeps a copy of it.

        Returns:
            The :class:`~tp_importance.pruning.report.PruningReport`.

        Raises:
            BudgetError: if the budget cannot be reached.
            RuntimeError: if the pruned network does not cost what was planned.
            ValueError: as :meth:`plan`, or if a refit has no loader.

        After any exception, Ctrl-C included, model and pruner are as before; a step that changes nothing changes no
        statistics either. Only Ctrl-C that comes while a step is being completed waits for that.
        """
        self._require_loader(Refit.of(refit))
        return self.apply(self.plan(budget), refit=refit)

    @warned_once()
    def apply(self, plan: Plan, *, refit: Refit | str | bool | None = None) -> PruningReport:
        """Prune the model in place by a plan of this pruner, made for the model as it is now.

        Args:
            plan: what to remove.
            refit: as for :meth:`step`.

        Returns:
            The :class:`~tp_importance.pruning.report.PruningReport`.

        Raises:
            RuntimeError: if the pruned network does not cost what was planned.
            ValueError: if the plan is of another network, or a refit has no loader.
        """
        settings = Refit.of(refit)
        self._require_loader(settings)
        known = self._known()
        return self.target.apply(
            plan,
            self.loader,
            refit=settings,
            label_fn=self._label_fn,
            classes=getattr(self.importance, "classes", None),
            statistics=None if known is None else known.statistics,
            criterion=getattr(self.importance, "name", type(self.importance).__name__),
        )

    def _require_loader(self, settings: Refit | None) -> None:
        if settings is None:
            return
        settings.require_data(self.loader)
        require_writable(self.model)
        collects = isinstance(self.importance, StatisticalImportance) and self._known_curves() is None
        shares = settings.mode == "parallel" and hasattr(self.importance, "consumer_statistics")
        passes = collects + (settings.solves and not shares) + settings.follows
        if self.loader is not None and passes > 1:
            require_reiterable(self.loader)


hand_on(BudgetPruner, PruningTarget)


class MethodPruner(BudgetPruner):
    """A pruner with one criterion: subclasses only name its importance.

    Its options become options of the subclass, in signature and documentation.

    Example:
        >>> import torch
        >>> from tp_importance import OBSImportance
        >>> class MyPruner(MethodPruner):
        ...     '''Prune by my criterion.'''
        ...     importance_class = OBSImportance
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> MyPruner(net, torch.randn(1, 3, 8, 8), [torch.randn(16, 3, 8, 8)], ridge=0.01).importance.ridge
        0.01
    """

    importance_class: ClassVar[Any]

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any] | None = None,
        *,
        budget: Budget | None = None,
        **options: Any,
    ) -> None:
        of_importance, rest = split_options(
            type(self), options, self.importance_class, BudgetPruner, leave=("importance",)
        )
        importance = self.importance_class(**of_importance)
        super().__init__(model, example_inputs, loader, importance=importance, budget=budget, **rest)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "importance_class"):  # else there is a class to come
            hand_on(cls, cls.importance_class, BudgetPruner, leave=("importance",))
