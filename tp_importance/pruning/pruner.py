"""Prune to a budget with any importance and any allocator; what every pruner of this package shares."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..allocation.curves import Curve, value_curves
from ..allocation.greedy import Allocator, WidthSpace, allocate
from ..allocation.program import named_allocator
from ..budget import Budget, Cost
from ..core.arguments import checked_budget, checked_importance, checked_model
from ..core.guards import preserved, transaction
from ..core.loaders import check_loader, require_reiterable
from ..core.processes import levels_up, warned_once
from ..core.progress import phase, shown, shows_progress
from ..core.stale_optimizers import replacing
from ..errors import BudgetError
from ..graph.cost import LATENCY, CostModel
from ..graph.counting import count_ops
from ..graph.discovery import prunable_groups
from ..graph.groups import PrunableGroups, Verifier
from ..graph.host_groups import build_groups
from ..graph.surgery import remove_units, settled
from ..graph.tracing import trace
from ..latency.model import LatencyModel
from ..latency.table import LatencyTable
from ..refitting.refit import refit_consumers
from ..refitting.report import RefitReport
from ..refitting.settings import Refit
from ..statistics.batchnorm import recalibrate_batchnorm
from ..statistics.dense_reference import DenseReference
from ..statistics.labels import LabelFn
from ..statistics.running_statistics import has_batch_norm, is_calibrated
from .importance import StatisticalImportance
from .plan import Plan
from .report import GroupRow, PruningReport

__all__ = ["BudgetPruner", "Plan"]


class BudgetPruner:
    """Prune a network in place until it meets a budget exactly.

    The way is statistics → value curves → widths under the budget → surgery by Torch-Pruning → report. The cost
    never exceeds the budget, and not one more admissible step would fit. A latency is predicted, by a
    :class:`~tp_importance.LatencyModel` that is measured when a budget first limits it; the prediction never exceeds
    the limit, and after the surgery the network is timed.

    Args:
        model: the network; only :meth:`step` changes it.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: re-iterable of batches for data-driven importances, refits and recalibration; collected at the first
            :meth:`plan` or :meth:`step` and again after every step. For recalibration the pruner keeps a copy of the
            network as given.
        importance: a :class:`~tp_importance.StatisticalImportance` or any ``tp.importance.Importance``; or
            ``None``, and the attribute ``importance`` is set before the first plan.
        budget: what the network may cost; fractions refer to ``model`` as given here, also after repeated steps.
            ``latency`` and ``latency_ms`` are those of ``example_inputs`` as they are, on a quiet machine.
        allocator: ``"greedy"``, ``"lagrange"``, ``"uniform"``, ``"program"`` (with the weights of the importance, if it
            has some) or a function, see :mod:`tp_importance.allocation.greedy`. Default (also ``"default"``): what
            suits the importance, see :func:`~tp_importance.allocation.program.default_allocator`: its own choice,
            ``"greedy"`` where its scores compare across layers, else ``"uniform"``.
        ignored_layers: modules, parameters or module types whose outputs are kept.
        round_to: widths become multiples of it.
        max_pruning_ratio: fraction of the initial channels of any group that may go, or one per group name.
        min_widths: fewest channels per group name.
        max_widths: most channels per group name.
        num_heads: as in Torch-Pruning.
        unwrapped_parameters: as in Torch-Pruning.
        customized_pruners: as in Torch-Pruning.
        forward_fn: ``forward_fn(model, example_inputs)``, also called with the loader's batches.
        output_transform: as in Torch-Pruning.
        label_fn: ``label_fn(batch)`` for loaders of unusual form.
        latency_table: layer times for latency budgets, or the file to keep them in; default: measured afresh.
        allow_stale: also prune what layers read in training mode only, see
            :func:`~tp_importance.prunable_groups`.
        verify: leave out groups for which removal is not masking, see
            :func:`~tp_importance.prunable_groups`.
        progress: show a progress bar for every phase, see :mod:`tp_importance.core.progress`.

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
        budget: Budget,
        allocator: str | Allocator | None = None,
        ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
        round_to: int | None = None,
        max_pruning_ratio: float | Mapping[str, float] = 1.0,
        min_widths: Mapping[str, int] | None = None,
        max_widths: Mapping[str, int] | None = None,
        num_heads: Mapping[nn.Module, int] | None = None,
        unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        label_fn: LabelFn | None = None,
        latency_table: LatencyTable | str | os.PathLike[str] | None = None,
        allow_stale: bool = False,
        verify: bool | Verifier = True,
        progress: bool = False,
    ) -> None:
        self.model, self.budget = checked_model(model), checked_budget(budget)
        self.importance = None if importance is None else checked_importance(importance)
        self.example_inputs, self._label_fn, self._progress = example_inputs, label_fn, progress
        named_allocator(allocator)  # checks it
        self._allocator = allocator
        if loader is not None:
            check_loader(loader)
        self.loader = loader
        table = latency_table if isinstance(latency_table, LatencyTable) else LatencyTable(latency_table)
        self._latency_table = table
        self._latency: LatencyModel | None = None
        self._ignored_layers, self._num_heads = ignored_layers, num_heads
        self._round_to, self._max_pruning_ratio = round_to, max_pruning_ratio
        self._min_widths, self._max_widths = dict(min_widths or {}), dict(max_widths or {})
        self.groups: PrunableGroups = prunable_groups(
            model,
            example_inputs,
            ignored_layers,
            num_heads=num_heads,
            unwrapped_parameters=unwrapped_parameters,
            customized_pruners=customized_pruners,
            forward_fn=forward_fn,
            output_transform=output_transform,
            allow_stale=allow_stale,
            verify=verify,
            progress=progress,
        )
        warn_of_uncounted(self.groups)
        self._left_out = {e.name: e.reason for e in self.groups.excluded}
        self.initial_widths = self.groups.widths
        self.cost_model = CostModel.from_groups(self.groups)
        self.dense: Cost = self.cost_model.dense
        ratios = max_pruning_ratio if isinstance(max_pruning_ratio, Mapping) else {}
        for name in (*self._min_widths, *self._max_widths, *ratios):
            self.groups[name]  # raises for an unknown one
        self.space  # noqa: B018 - checks the options
        self._curves: dict[str, Curve] | None = None
        self._history: list[Any] = []
        self._reference: DenseReference | None = None

    def collect(self) -> BudgetPruner:
        """Collect the statistics of the importance now; :meth:`plan` and :meth:`step` do it when needed.

        Raises:
            ValueError: if the importance needs data and the pruner has no loader, and for bad data.
        """
        if isinstance(self.importance, StatisticalImportance):
            if self.loader is None:
                raise ValueError(f"{type(self.importance).__name__} looks at data: pass loader= to the pruner")
            self.importance.collect(
                self.model,
                self.example_inputs,
                self.loader,
                groups=self.groups,
                forward_fn=self.groups.options.forward_fn,
                label_fn=self._label_fn,
                progress=self._progress,
            )
            self._curves = value_curves(self.importance, self.groups)
        return self

    def limit_ratios(self, max_pruning_ratio: float | Mapping[str, float]) -> None:
        """Set the largest fraction of the initial channels that may go, for all groups or by name."""
        WidthSpace.of(self.groups.groups, max_pruning_ratio=max_pruning_ratio)  # checks it
        self._max_pruning_ratio = max_pruning_ratio

    @property
    def space(self) -> WidthSpace:
        """Admissible widths of the model as it is now."""
        return WidthSpace.of(
            self.groups.groups,
            round_to=self._round_to,
            max_pruning_ratio=self._max_pruning_ratio,
            initial_widths=self.initial_widths,
            min_widths=self._min_widths,
            max_widths=self._max_widths,
        )

    @warned_once()
    @shows_progress
    def measure_latency(self) -> LatencyModel:
        """The latency model of the model as given, measured when first asked for; :meth:`plan` does it when needed.

        Raises:
            ValueError: if the latency table was measured under other conditions.
            RuntimeError: after a step: what fractions refer to is gone then.
        """
        if self._latency is None:
            if self._history:
                raise RuntimeError(
                    "the network was pruned before its latency was measured: call measure_latency() before the first "
                    "step, or build a new pruner"
                )
            latency = LatencyModel.measure(self.groups, self.example_inputs, self._latency_table)
            timed = replace(self.cost_model, latency=latency)
            self._latency, self.cost_model = latency, timed
        return self._latency

    def limits(self, budget: Budget | None = None) -> dict[str, float]:
        """Absolute limits of a budget: counts, and ``"latency_ms"`` if a latency is limited.

        Args:
            budget: default: the pruner's.
        """
        chosen = checked_budget(self.budget if budget is None else budget)
        counts: dict[str, float] = dict(chosen.marked_limits(self.dense))
        if not chosen.is_measured:
            return counts
        model = self.measure_latency()
        limit = chosen.latency_limit(model.dense.median_ms)
        assert limit is not None
        if limit >= model.dense.median_ms:  # met as it is, whatever is predicted for it
            limit = max(limit, (1 + 1e-6) * model.predict(self.cost_model.full))
        return {**counts, LATENCY: limit}

    def curves(self) -> dict[str, Curve]:
        """Value curve of every group, collected when needed."""
        return self._value()

    @warned_once()
    def plan(self, budget: Budget | None = None) -> Plan:
        """Widths and cost under a budget, without touching the model and, for a second budget, the data.

        Args:
            budget: default: the pruner's.

        Returns:
            The :class:`Plan`.

        Raises:
            BudgetError: if the budget cannot be reached; names the least reachable cost. Also if the network itself is
                measured above a latency limit and predicted within it.
            ValueError: for bad data, or if nothing can be pruned.
        """
        limits = self.limits(budget)
        curves = self._value()
        allocator = named_allocator(self._allocator, self._weights, self.importance)
        with phase("allocating", progress=self._progress) as running:
            units = allocate(allocator, curves, self.cost_model, self.space, limits)
            running.note(cost=self.cost_model.cost(self.cost_model.widths(units)))
        removed = {n: curves[n].removed(int(u)) for n, u in zip(self.cost_model.names, units, strict=True)}
        return replace(self.plan_of(removed, limits), certificate=dict(getattr(allocator, "certificate", {})))

    def plan_of(self, removed: Mapping[str, Sequence[int]], limits: Mapping[str, float] | None = None) -> Plan:
        """The :class:`Plan` that removes given units, at whatever cost."""
        widths = {g.name: g.width - len(removed.get(g.name, ())) * g.unit_size for g in self.groups}
        constant = {n: c.constant.tolist() for n, c in (self._curves or {}).items() if len(c.constant)}
        gone = {n: list(units) for n, units in removed.items()}
        counts = {f: int(v) for f, v in (limits or {}).items() if f != LATENCY}
        found = {} if limits is None or LATENCY not in limits else self._times(widths, limits[LATENCY])
        uncounted = dict(self.groups.trace.uncounted)
        cost = self.cost_model.cost(widths)
        return Plan(widths, cost, self.dense, counts, gone, constant, latency_ms=found, uncounted=uncounted)

    def _times(self, widths: Mapping[str, int], limit: float) -> dict[str, float]:
        predicted = self.cost_model.timed.predict(self.cost_model.units(widths))
        dense = self.measure_latency().dense
        now = self.cost_model.timed.predict(self.cost_model.full)
        untouched = self.groups.widths == self.initial_widths
        if untouched and now <= limit < dense.median_ms:
            raise BudgetError(
                f"the network took {dense.median_ms:.3f} ms, above the limit of {limit:.3f}, but the latency model "
                f"predicts {now:.3f} for it: the machine was busy at one of these times. Measure again on a quiet one, "
                "without the file given as latency_table"
            )
        if untouched and not 0.5 < now / dense.median_ms < 2:
            warnings.warn(
                f"the dense network took {dense.median_ms:.3f} ms (IQR {dense.iqr_ms:.3f}), {now:.3f} are "
                "predicted: the machine was busy at one of these times. Measure on a quiet one",
                stacklevel=levels_up(),
            )
        return {"dense": dense.median_ms, "dense_iqr": dense.iqr_ms, "limit": limit, "predicted": predicted}

    @warned_once()
    def step(
        self,
        budget: Budget | None = None,
        *,
        refit: Refit | str | bool | None = None,
    ) -> PruningReport:
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
            The :class:`~tp_importance.PruningReport`.

        Raises:
            BudgetError: if the budget cannot be reached.
            RuntimeError: if the pruned network does not cost what was planned.
            ValueError: as :meth:`plan`, or if compensation or recalibration has no loader.

        After any exception, Ctrl-C included, model and pruner are as before; a step that changes nothing changes no
        statistics either.
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
            The :class:`~tp_importance.PruningReport`.

        Raises:
            RuntimeError: if the pruned network does not cost what was planned.
            ValueError: if the plan is of another network, or a refit has no loader.
        """
        settings = Refit.of(refit)
        self._require_loader(settings)
        report, run = self._report(plan), self.groups.options.forward_fn
        if plan.is_noop:
            time = f", {plan.latency_ms['predicted']:.3f} ms predicted" if plan.latency_ms else ""
            warnings.warn(
                f"the network already meets the budget ({plan.cost}{time}); nothing is pruned", stacklevel=levels_up()
            )
            return self._timed(report)
        compares = settings is not None and settings.follows and (not settings.solves or has_batch_norm(self.model))
        reference = self._reference_after(plan.removed, needed=compares)
        solves = settings is not None and settings.solves
        values = self.model.parameters() if solves else ()
        step = self.surgery(values)
        with shown(self._progress), step, replacing(self.model), torch.inference_mode(False):
            if settings is not None and solves:
                report = replace(report, refit=self._refit(plan, settings))
            with phase("removing channels", before=self.cost_model.dense, after=plan.cost):
                remove_units(self.groups, plan.removed)
            counted = count_ops(self.model, self.example_inputs, forward_fn=run)
            if Cost(*counted) != plan.cost:
                raise RuntimeError(f"the pruned network costs {Cost(*counted)}, planned were {plan.cost}")
            if compares and self.loader is not None:
                recalibrate_batchnorm(self.model, self.loader, reference=reference, forward_fn=run)
            state = self._adopting(self._retrace(), self.groups.trace.graph.pruning_history())
            if reference is not None:
                state["_reference"] = reference.stamped(self.model)
            step.commit()
            vars(self).update(state)
        return self._timed(report)

    def pruning_history(self) -> list[Any]:
        """Torch-Pruning's history ``[[module name, is_out, indices], ...]`` of all steps so far."""
        return [list(entry) for entry in self._history]

    def load_pruning_history(self, history: Sequence[Any]) -> None:
        """Repeat the steps of a history on the model, which must be as it was when the history began.

        Fractions of later budgets still refer to the model as given at construction.

        Raises:
            ValueError: if the history is of another network; the model is then as before.
        """
        entries = [list(entry) for entry in history]
        try:
            step = self.surgery()
            running = phase("repeating a history", steps=len(entries), progress=self._progress)
            with preserved(self.model), running, step, replacing(self.model), torch.inference_mode(False):
                groups = self.groups
                for entry in entries:  # a fresh graph each: Torch-Pruning's keeps stale offsets behind a split
                    with settled(self.model):
                        groups.trace.graph.load_pruning_history([list(entry)])
                    groups = self._retrace()
                counted = count_ops(self.model, self.example_inputs, forward_fn=self.groups.options.forward_fn)
                if Cost(*counted) != CostModel.from_groups(groups).dense:
                    raise ValueError(f"after it the network costs {Cost(*counted)}, its widths say otherwise")
                state = self._adopting(groups, entries)
                step.commit()
                vars(self).update(state)
        except Exception as error:
            raise ValueError(
                f"the history does not fit {type(self.model).__name__} as it is now ({type(error).__name__}: {error})"
            ) from error

    def surgery(self, values: Iterable[torch.Tensor] = ()) -> Surgery:
        """A block in which the model is changed; if it raises, model and pruner are as before.

        Args:
            values: parameters that are written into, rather than replaced.
        """
        return Surgery(self, values)

    def _refit(self, plan: Plan, settings: Refit) -> RefitReport:
        assert self.loader is not None
        known = getattr(self.importance, "consumer_statistics", None)
        reusable = known is not None and known.covers(self.groups, settings.sampled) and self._curves is not None
        return refit_consumers(
            self.model,
            self.example_inputs,
            self.loader,
            plan.removed,
            settings,
            groups=self.groups,
            statistics=known if reusable else None,
            classes=getattr(self.importance, "classes", None),
            forward_fn=self.groups.options.forward_fn,
            label_fn=self._label_fn,
            progress=self._progress,
        )

    def _require_loader(self, settings: Refit | None) -> None:
        if settings is None:
            return
        if self.loader is None:
            raise ValueError(f"refit={settings.mode!r} needs data: pass loader= to the pruner")
        collects = isinstance(self.importance, StatisticalImportance) and self._curves is None
        shares = settings.mode == "parallel" and hasattr(self.importance, "consumer_statistics")
        if collects + (settings.solves and not shares) + settings.follows > 1:
            require_reiterable(self.loader)

    def _weights(self) -> Mapping[str, float] | None:
        return getattr(self.importance, "weights", None) if hasattr(self.importance, "curves") else None

    @shows_progress
    def _value(self) -> dict[str, Curve]:
        self.groups.require_some()
        checked_importance(self.importance)  # it may have been set later
        if not isinstance(self.importance, StatisticalImportance):
            return value_curves(self.importance, self.groups)  # weights and gradients may have changed: never kept
        if self._curves is None:
            self.collect()
        assert self._curves is not None
        return self._curves

    @phase("tracing")
    def _retrace(self) -> PrunableGroups:
        """Groups of the pruned model; what was left out before stays out."""
        options = self.groups.options.renamed(self.groups.trace.names, self.model)
        traced = trace(self.model, self.example_inputs, options)
        groups = build_groups(traced, self._ignored_layers, self._num_heads, options)
        return groups.exclude({n: r for n, r in self._left_out.items() if n in groups.names})

    def _adopting(self, groups: PrunableGroups, history: Sequence[Any]) -> dict[str, Any]:
        """What changes in the pruner when it goes on with ``groups`` after a surgery."""
        latency = None if self._latency is None else self._latency.of(groups)
        return {
            "groups": groups,
            "cost_model": replace(CostModel.from_groups(groups), latency=latency),
            "_latency": latency,
            "_curves": None,
            "_history": [*self._history, *history],
        }

    def _reference_after(self, removed: Mapping[str, Sequence[int]], needed: bool) -> DenseReference | None:
        """The network that batch norms are compared with, and what of it is left when ``removed`` has gone.

        It is the network as given, or as somebody else, training say, has left it since the last step. A later step may
        want it; so it is kept, if the network can be copied, where it is not ``needed`` now.
        """
        if self.loader is None or not has_batch_norm(self.model):
            return None
        known = self._reference
        if known is None or not known.is_of(self.model):
            try:
                known = DenseReference.of(self.model)
            except Exception:
                if needed:
                    raise
                return None
        layers, gone = dict(self.model.named_modules()), defaultdict[str, list[int]](list)
        for group in self.groups:
            for m in group.members:
                if m.kind == "passthrough" and m.role == "out" and is_calibrated(layers.get(m.name)):
                    gone[m.name] += m.positions(removed.get(group.name, ())).tolist()
        return known.after(gone)

    @shows_progress
    def _timed(self, report: PruningReport) -> PruningReport:
        """The report with the measured latency of the network, if it was limited."""
        if not report.latency_ms:
            return report
        with phase("measuring latency"):
            found = self._latency_table.network(self.model, self.example_inputs, self.groups.options.forward_fn)
        times = {**report.latency_ms, "measured": found.median_ms, "measured_iqr": found.iqr_ms}
        return replace(report, latency_ms=times)

    def _report(self, plan: Plan) -> PruningReport:
        before = self.groups.widths
        share = self.cost_model.shares()
        rows = [
            GroupRow(
                g.name, self.initial_widths.get(g.name, g.width), before[g.name], plan.widths[g.name], share[g.name]
            )
            for g in self.groups
        ]
        return PruningReport(
            rows=rows,
            dense=self.dense,
            before=self.cost_model.dense,
            cost=plan.cost,
            limits=plan.limits,
            bytes_per_param=bytes_per_parameter(self.model),
            excluded=list(self.groups.excluded),
            constant={g: len(u) for g, u in plan.constant.items()},
            criterion=type(self.importance).__name__,
            latency_ms=dict(plan.latency_ms),
            uncounted=dict(plan.uncounted),
        )


class Surgery(transaction):
    """A block in which a pruner changes its model; if it raises, both are as before."""

    def __init__(self, pruner: BudgetPruner, values: Iterable[torch.Tensor] = ()) -> None:
        """``values``: parameters that are written into; buffers, which are few, always come back."""
        super().__init__(pruner.model, (*values, *pruner.model.buffers()))
        self._pruner = pruner

    def _note(self) -> None:
        super()._note()
        self._state = dict(vars(self._pruner))

    def _restore(self, failed: bool) -> None:
        super()._restore(failed)
        if failed:
            pruner = self._pruner
            vars(pruner).clear()
            vars(pruner).update(self._state)
            # the host's surgery has changed the graph
            traced = trace(pruner.model, pruner.example_inputs, pruner.groups.options)
            pruner.groups = replace(pruner.groups, trace=traced)


def warn_of_uncounted(groups: PrunableGroups) -> None:
    """Say which layers multiply and accumulate as often as nobody knows: no budget of MACs holds for them."""
    if groups.trace.uncounted:
        named = "; ".join(f"{name}: {reason}" for name, reason in groups.trace.uncounted.items())
        warnings.warn(f"the MACs of some layers are not known and not counted ({named})", stacklevel=levels_up())


def bytes_per_parameter(model: nn.Module) -> float:
    count = sum(p.numel() for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in model.parameters()) / max(count, 1)
