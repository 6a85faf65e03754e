"""A network under a budget, apart from any criterion: groups, exact cost, admissible widths, surgery and history."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..allocation.allocate import allocate
from ..allocation.curves import Curve
from ..allocation.proportional import uniform
from ..allocation.registry import Allocator
from ..allocation.space import WidthSpace
from ..budget import Budget, Cost
from ..core.arguments import checked_budget, checked_model
from ..core.options import hand_on, split_options
from ..core.processes import levels_up, warned_once
from ..core.progress import phase, shown, shows_progress
from ..core.stale_optimizers import replacing
from ..errors import BudgetError
from ..graph.classes import AT_MINIMUM, build_groups
from ..graph.cost import LATENCY, CostModel
from ..graph.discovery import prunable_groups
from ..graph.groups import PrunableGroups
from ..graph.history import PruningHistory, repeat, units_of
from ..graph.narrowing import narrowed
from ..graph.surgery import remove_units
from ..graph.tracing import trace
from ..latency.model import LatencyModel
from ..latency.table import LatencyTable
from ..latency.times import LatencyTimes
from ..refitting.refit import refit_consumers
from ..refitting.report import RefitReport
from ..refitting.settings import Refit
from ..statistics.batchnorm import recalibrate_batchnorm
from ..statistics.consumers import ConsumerStatistics
from ..statistics.dense_reference import DenseReference
from ..statistics.labels import LabelFn
from ..statistics.running_statistics import has_batch_norm
from .output_change import Outputs
from .plan import Plan
from .reference import reference_after
from .report import PruningReport
from .surgery import Surgery

__all__ = ["PruningTarget"]


class PruningTarget:
    """What can go of a network, what it would cost, and the surgery that does it; the choice is somebody else's.

    Every pruner holds one: :class:`~tp_importance.BudgetPruner` is a target, an importance and an allocator. A new
    kind of search or pruner asks the target for :attr:`groups`, :attr:`cost_model` and :attr:`space`, chooses units,
    and gives them to :meth:`plan` and :meth:`apply`.

    Args:
        model: the network; only :meth:`apply` and :meth:`load_pruning_history` change it.
        example_inputs: tensor, tuple or dict, batch dimension first.
        round_to: widths become multiples of it.
        max_pruning_ratio: fraction of the initial channels of any group that may go, or one per group name.
        min_widths: fewest channels per group name.
        max_widths: most channels per group name.
        keep_padded: whether residual stages that padded shortcuts widen (``groups.padded``, as in the CIFAR ResNets
            with option-A shortcuts) keep their widths. Default: under uniform widths they do, as long as the budget can
            be met without them; all other allocators weigh them against the other groups. Measured in
            docs/benchmarks.md.
        latency_table: layer times for latency budgets, or the file to keep them in; default: measured afresh.
        progress: show a bar for every phase; by default in a terminal, see :mod:`tp_importance.core.progress`.
        **options: see :func:`~tp_importance.prunable_groups`.

    Attributes:
        groups: coupled groups of the model as it is now.
        cost_model: their exact cost, with a latency model once that was measured.
        dense: cost of the model as given.
        initial_widths: channels per group of the model as given.

    Raises:
        TypeError: for a model that is none or compiled, and unknown options or such of the wrong type.
        TracingError: if the network cannot be traced.
        ValueError: for bad options.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> target = PruningTarget(net, torch.randn(1, 3, 12, 12))
        >>> plan = target.plan({"0": [1, 5]})
        >>> target.apply(plan).cost == plan.cost, net[0].out_channels
        (True, 6)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        round_to: int | None = None,
        max_pruning_ratio: float | Mapping[str, float] = 1.0,
        min_widths: Mapping[str, int] | None = None,
        max_widths: Mapping[str, int] | None = None,
        keep_padded: bool | None = None,
        latency_table: LatencyTable | str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        (for_groups,) = split_options(type(self), options, prunable_groups)
        if keep_padded is not None and not isinstance(keep_padded, bool):
            raise TypeError(
                f"keep_padded must be True, False or None, not {keep_padded!r}; min_widths keeps single groups wide"
            )
        self.model, self.example_inputs, self._progress = checked_model(model), example_inputs, progress
        table = latency_table if isinstance(latency_table, LatencyTable) else LatencyTable(latency_table)
        self._latency_table = table
        self._latency: LatencyModel | None = None
        self._round_to, self._max_pruning_ratio = round_to, max_pruning_ratio
        self._min_widths, self._max_widths = dict(min_widths or {}), dict(max_widths or {})
        self._keep_padded = keep_padded
        self._ignored_layers, self._num_heads = options.get("ignored_layers"), options.get("num_heads")
        self.groups: PrunableGroups = prunable_groups(model, example_inputs, progress=progress, **for_groups)
        _warn_of_uncounted(self.groups)
        self._left_out = list(self.groups.excluded)
        self.initial_widths = self.groups.widths
        self.cost_model = CostModel.from_groups(self.groups)
        self.dense: Cost = self.cost_model.dense
        ratios = max_pruning_ratio if isinstance(max_pruning_ratio, Mapping) else {}
        for name in (*self._min_widths, *self._max_widths, *ratios):
            self.groups[name]  # raises for an unknown one
        self.space  # noqa: B018 - checks the options
        self._history = PruningHistory()
        self._reference: DenseReference | None = None

    # -- what it costs

    def limit_ratios(self, max_pruning_ratio: float | Mapping[str, float]) -> None:
        """Set the largest fraction of the initial channels that may go, for all groups or by name."""
        WidthSpace.of(self.groups.groups, max_pruning_ratio=max_pruning_ratio)  # checks it
        self._max_pruning_ratio = max_pruning_ratio

    @property
    def space(self) -> WidthSpace:
        """Admissible widths of the model as it is now."""
        return self._space(bool(self._keep_padded))

    def _space(self, keep_padded: bool) -> WidthSpace:
        padded = self.groups.padded if keep_padded else ()
        kept = {n: w for n, w in self.groups.widths.items() if n in padded and n not in self._max_widths}
        space = WidthSpace.of(
            self.groups.groups,
            round_to=self._round_to,
            max_pruning_ratio=self._max_pruning_ratio,
            initial_widths=self.initial_widths,
            min_widths=self._min_widths | kept,
            max_widths=self._max_widths,
        )
        own = [name for name in space.binding if name != "min_widths" or self._min_widths]
        return replace(space, binding=(*own, *(["keep_padded"] if kept else [])))

    def _space_of(self, allocator: Allocator, limits: Mapping[str, float]) -> WidthSpace:
        """Admissible widths for an allocator: uniform ones leave padded stages as they are, if they can."""
        if allocator is uniform and self._keep_padded is None and self.groups.padded:
            space = self._space(True)
            if self.cost_model.within(space.floor, limits):
                return space
        return self.space

    @warned_once()
    def measure_latency(self) -> LatencyModel:
        """The latency model of the model as given, measured when first asked for; :meth:`limits` does it when needed.

        Raises:
            ValueError: if the latency table was measured under other conditions.
            RuntimeError: after a surgery: what fractions refer to is gone then.
        """
        if self._latency is None:
            if self._history:
                raise RuntimeError(
                    "the network was pruned before its latency was measured: call measure_latency() before the first "
                    "step, or build a new pruner"
                )
            with shown(self._progress):
                latency = LatencyModel.measure(self.groups, self.example_inputs, self._latency_table)
            timed = replace(self.cost_model, latency=latency)
            self._latency, self.cost_model = latency, timed
        return self._latency

    def limits(self, budget: Budget) -> dict[str, float]:
        """Absolute limits of a budget: counts, and ``"latency_ms"`` if a latency is limited.

        Args:
            budget: fractions refer to the model as given.
        """
        counts: dict[str, float] = dict(checked_budget(budget).marked_limits(self.dense))
        if not budget.is_measured:
            return counts
        model = self.measure_latency()
        limit = budget.latency_limit(model.dense.median_ms)
        assert limit is not None
        if limit >= model.dense.median_ms:  # met as it is, whatever is predicted for it
            limit = max(limit, (1 + 1e-6) * model.predict(self.cost_model.full))
        return {**counts, LATENCY: limit}

    def plan(
        self,
        removed: Mapping[str, Sequence[int]],
        limits: Mapping[str, float] | None = None,
        *,
        constant: Mapping[str, Sequence[int]] | None = None,
        certificate: Mapping[str, float] | None = None,
    ) -> Plan:
        """The :class:`~tp_importance.pruning.plan.Plan` that removes given units, at whatever cost.

        Args:
            removed: units per group name.
            limits: what they were chosen under, to be noted in the plan; a latency limit is compared with the clock.
            constant: units that do not vary on the data, to be noted.
            certificate: what the allocator proves, to be noted.

        Raises:
            BudgetError: if the network itself is measured above a latency limit and predicted within it.
        """
        widths = {g.name: g.width - len(removed.get(g.name, ())) * g.unit_size for g in self.groups}
        counts = {f: int(v) for f, v in (limits or {}).items() if f != LATENCY}
        times = LatencyTimes() if LATENCY not in (limits or {}) else self._times(widths, (limits or {})[LATENCY])
        return Plan(
            widths,
            self.cost_model.cost(widths),
            self.dense,
            counts,
            {n: list(units) for n, units in removed.items()},
            {n: list(units) for n, units in (constant or {}).items() if len(units)},
            dict(certificate or {}),
            latency_ms=times,
            uncounted=dict(self.groups.trace.uncounted),
        )

    def allocate(
        self,
        allocator: Allocator,
        curves: Mapping[str, Curve],
        limits: Mapping[str, float],
        *,
        constant: Mapping[str, Sequence[int]] | None = None,
    ) -> Plan:
        """Let an allocator choose the widths; the curves say which units go.

        Args:
            allocator: where the widths come from.
            curves: curve per group name.
            limits: see :meth:`limits`.
            constant: units that do not vary on the data, to be noted in the plan.

        Raises:
            BudgetError: if the limits cannot be kept; names the least reachable cost.
        """
        cost = self.cost_model
        with phase("allocating", progress=self._progress) as running:
            units = allocate(allocator, curves, cost, self._space_of(allocator, limits), limits)
            running.note(cost=cost.cost(cost.widths(units)))
        removed = {n: curves[n].removed(int(u)) for n, u in zip(cost.names, units, strict=True)}
        certificate = getattr(allocator, "certificate", {})
        return self.plan(removed, limits, constant=constant, certificate=certificate)

    def _times(self, widths: Mapping[str, int], limit: float) -> LatencyTimes:
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
        return LatencyTimes(dense.median_ms, dense.iqr_ms, limit, predicted)

    # -- surgery

    @warned_once()
    def apply(
        self,
        plan: Plan,
        loader: Iterable[Any] | None = None,
        *,
        refit: Refit | str | bool | None = None,
        label_fn: LabelFn | None = None,
        classes: Sequence[int] | None = None,
        statistics: ConsumerStatistics | None = None,
        criterion: str = "",
    ) -> PruningReport:
        """Remove the units of a plan from the model, in place, and repair it.

        Args:
            plan: made for the model as it is now.
            loader: re-iterable of batches, for the repair.
            refit: how the network is repaired, see :class:`~tp_importance.Refit`.
            label_fn: ``label_fn(batch)``, with ``classes``.
            classes: only samples of these labels count in a refit.
            statistics: what consumers received, if it was collected already; a parallel refit takes it if it fits.
            criterion: who chose the units, for the report.

        Returns:
            The :class:`~tp_importance.pruning.report.PruningReport`.

        Raises:
            RuntimeError: if the pruned network does not cost what was planned.
            ValueError: if the plan is of another network, or a refit has no loader. After any exception, Ctrl-C
                included, model and target are as before.
        """
        settings = Refit.of(refit)
        if settings is not None:
            settings.require_data(loader)
        plan.require_made_for(self.groups)
        report, run = self.report(plan, criterion), self.groups.options.forward_fn
        if plan.is_noop:
            time = f", {plan.latency_ms.predicted:.3f} ms predicted" if plan.latency_ms.is_limited else ""
            warnings.warn(
                f"the network already meets the budget ({plan.cost}{time}); nothing is pruned", stacklevel=levels_up()
            )
            return self._timed(report)
        solves = settings is not None and settings.solves
        follows = settings is not None and settings.follows and (not solves or has_batch_norm(self.model))
        reference = None
        if loader is not None:
            reference = reference_after(self.model, self.groups, plan.removed, self._reference, needed=follows)
        outputs = Outputs(self.model, self.example_inputs, loader, self.groups.options)
        step = self.surgery(self.model.parameters() if solves else ())
        with shown(self._progress), step, replacing(self.model), torch.inference_mode(False):
            if settings is not None and loader is not None and solves:
                known = statistics if statistics and statistics.covers(self.groups, settings.sampled) else None
                made = self._refit(plan, loader, settings, label_fn, classes, known)
                report = replace(report, refit=made)
            with phase("removing channels", before=self.cost_model.dense, after=plan.cost):
                cuts = remove_units(self.groups, plan.removed)
            left = self._left(self.groups, plan.removed)
            counted = left.trace.ops
            if Cost(*counted) != plan.cost:
                raise RuntimeError(f"the pruned network costs {Cost(*counted)}, planned were {plan.cost}")
            if follows and loader is not None:
                recalibrate_batchnorm(self.model, loader, reference=reference, forward_fn=run)
            report = replace(report, outputs=outputs.change(self.model))
            history = PruningHistory.of(self.groups, plan.removed, cuts)
            state = self._adopting(left, history)
            if reference is not None:
                state["_reference"] = reference.stamped(self.model)
            step.commit()
            vars(self).update(state)
        return self._timed(report)

    def _refit(
        self,
        plan: Plan,
        loader: Iterable[Any],
        settings: Refit,
        label_fn: LabelFn | None,
        classes: Sequence[int] | None,
        statistics: ConsumerStatistics | None,
    ) -> RefitReport:
        return refit_consumers(
            self.model,
            self.example_inputs,
            loader,
            plan.removed,
            settings,
            groups=self.groups,
            statistics=statistics,
            classes=classes,
            forward_fn=self.groups.options.forward_fn,
            label_fn=label_fn,
            progress=self._progress,
        )

    def surgery(self, values: Iterable[torch.Tensor] = ()) -> Surgery:
        """A block in which the model is changed; if it raises, model and target are as before.

        Args:
            values: parameters that are written into, rather than replaced.
        """
        return Surgery(self, values)

    def pruning_history(self, *, direct: bool = False) -> list[Any]:
        """All surgery so far, for :meth:`load_pruning_history`; see :mod:`tp_importance.graph.history`.

        Args:
            direct: in our own format, ``[[name, side, positions], ...]`` for every place that was cut, which needs no
                graph to be repeated. Default: in Torch-Pruning's, ``[[module name, is_out, positions], ...]``.

        Raises:
            RuntimeError: if Torch-Pruning's format cannot say what a direct history has removed.
        """
        return self._history.entries(direct=direct)

    def load_pruning_history(self, history: Sequence[Any]) -> None:
        """Repeat a history on the model, which must be as it was when the history began.

        Fractions of later budgets still refer to the model as given at construction.

        Args:
            history: in either format, see :meth:`pruning_history`. Torch-Pruning's is repeated by the groups of this
                target: verified groups, if those were that were pruned.

        Raises:
            ValueError: if the history is of another network, or of other groups; the model is then as before.
        """
        try:
            entries = list(history)
            step = self.surgery()
            running = phase("repeating a history", steps=len(entries), progress=self._progress)
            with running, step, replacing(self.model), torch.inference_mode(False):
                # also what is left out now may have gone then
                known = build_groups(self.groups.trace, None, self._num_heads, self.groups.options)
                done = repeat(entries, known)
                groups = self._left(known, None if done.host is None else units_of(done.host, known))
                counted = groups.trace.ops
                if Cost(*counted) != CostModel.from_groups(groups).dense:
                    raise ValueError(f"after it the network costs {Cost(*counted)}, its widths say otherwise")
                state = self._adopting(groups, done)
                step.commit()
                vars(self).update(state)
        except Exception as error:
            raise ValueError(
                f"the history does not fit {type(self.model).__name__} as it is now ({type(error).__name__}: {error})"
            ) from error

    @phase("tracing")
    def _left(self, groups: PrunableGroups, removed: Mapping[str, Sequence[int]] | None) -> PrunableGroups:
        """Groups of the pruned model; what was left out before stays out.

        They are not found anew, where it is known which units have gone: a narrow network shows less. Where one slice
        of a reshaped axis is left, say, nothing tells that its length is fixed.

        Args:
            groups: of the model before.
            removed: units of them that have gone; ``None`` if what has gone is not made up of units.
        """
        options = self.groups.options.renamed(self.groups.trace.names, self.model)
        traced = trace(self.model, self.example_inputs, options)
        if removed is None:
            return build_groups(traced, self._ignored_layers, self._num_heads, options).exclude_again(self._left_out)
        left = replace(narrowed(groups, removed), trace=traced, options=options).exclude_again(self._left_out)
        kind, reason = AT_MINIMUM
        return left.exclude({g.name: reason for g in left if g.n_units <= g.min_units}, kind)

    def _adopting(self, groups: PrunableGroups, history: PruningHistory) -> dict[str, Any]:
        """What changes in the target when it goes on with ``groups`` after a surgery."""
        latency = None if self._latency is None else self._latency.of(groups)
        return {
            "groups": groups,
            "cost_model": replace(CostModel.from_groups(groups), latency=latency),
            "_latency": latency,
            "_history": self._history.then(history),
        }

    # -- report

    def report(self, plan: Plan, criterion: str = "") -> PruningReport:
        """What a plan does to the model as it is now.

        Args:
            plan: of this target.
            criterion: who chose the units.
        """
        return PruningReport.of(plan, self.groups, self.initial_widths, self.cost_model, self.dense, criterion)

    @shows_progress
    def _timed(self, report: PruningReport) -> PruningReport:
        """The report with the measured latency of the network, if it was limited."""
        if not report.latency_ms.is_limited:
            return report
        with phase("measuring latency"):
            found = self._latency_table.network(self.model, self.example_inputs, self.groups.options.forward_fn)
        times = replace(report.latency_ms, measured=found.median_ms, measured_iqr=found.iqr_ms)
        return replace(report, latency_ms=times)


hand_on(PruningTarget, prunable_groups)


def _warn_of_uncounted(groups: PrunableGroups) -> None:
    """Say which layers multiply and accumulate as often as nobody knows: no budget of MACs holds for them."""
    if groups.trace.uncounted:
        named = "; ".join(f"{name}: {reason}" for name, reason in groups.trace.uncounted.items())
        warnings.warn(f"the MACs of some layers are not known and not counted ({named})", stacklevel=levels_up())
