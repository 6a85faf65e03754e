"""One trial of a search: parameters in, metrics out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..allocation.curves import Curves
from ..allocation.limits import Limits
from ..allocation.program import ProgramAllocator
from ..allocation.proportional import proportional
from ..allocation.registry import ALLOCATORS, Allocator
from ..allocation.space import WidthSpace, round_down
from ..budget import Budget, Cost
from ..core.arguments import checked_budget, checked_model
from ..core.copies import copied_with
from ..core.processes import warned_once
from ..core.progress import phase, shown
from ..core.types import Ints
from ..errors import BudgetError, SearchSpaceError
from ..graph.cost import CostModel, exceeded
from ..graph.counting import count_ops
from ..latency.measure import measure_latency
from ..pruning.domains import check_names
from ..pruning.registry import Job, Train, find_method
from ..recovery.settings import Recovery
from ..refitting.settings import Refit
from ..statistics.gradients import LossFn, checked_loss_fn
from .channels import prune_channels
from .space import flatten, parameters_noted
from .statistics import CurveStore

__all__ = ["TrialParameters", "prune_trial"]

FAMILIES = ("ratio", "weight", "width")
"""Prefixes of parameters that are given per group; one of them in a trial."""
BUDGETS = ("macs", "params")


@dataclass(frozen=True)
class TrialParameters:
    """The parameters of a trial, understood.

    Attributes:
        method: name of the method.
        options: its hyper-parameters.
        allocator: name of an allocator, or None.
        family: ``"ratio"``, ``"weight"``, ``"width"``, or None if there is nothing per group.
        per_group: the values of that family by group name.
        budget: fractions of the budget that the search chose.
        refit: mode of the refit, ``False`` for none, or ``None`` if the search leaves it open.
    """

    method: str = "magnitude"
    options: dict[str, Any] = field(default_factory=dict)
    allocator: str | None = None
    family: str | None = None
    per_group: dict[str, float] = field(default_factory=dict)
    budget: dict[str, float] = field(default_factory=dict)
    refit: str | bool | None = None

    @classmethod
    def parse(cls, params: Mapping[str, Any]) -> TrialParameters:
        """Sort the parameters of a trial by what they are.

        Args:
            params: ``"method"``, ``"<method>.<option>"``, ``"allocator"``, ``"refit"``, ``"budget:macs"``,
                ``"budget:params"`` and one of ``"ratio:<group>"``, ``"weight:<group>"``, ``"width:<group>"``. Options
                of other methods are dropped, as flat search spaces have them.

        Raises:
            SearchSpaceError: for names or values that are not understood.

        Example:
            >>> TrialParameters.parse({"method": "catro", "catro.class_weight": 0.2, "ratio:conv1": 0.5}).per_group
            {'conv1': 0.5}
        """
        flat = flatten(params)
        name = flat.pop("method", "magnitude")
        find_method(name)
        options: dict[str, Any] = {}
        budget: dict[str, float] = {}
        groups: dict[str, dict[str, float]] = {}
        allocator = checked_allocator(flat.pop("allocator", "default"))
        refit = (checked_mode(flat.pop("refit")) or False) if "refit" in flat else None
        for key, value in flat.items():
            prefix, colon, rest = key.partition(":")
            if colon and prefix == "budget" and rest in BUDGETS:
                budget[rest] = value
            elif colon and prefix in FAMILIES:
                groups.setdefault(prefix, {})[rest] = checked_number(key, prefix, value)
            elif "." in key and not colon:
                owner, _, option = key.partition(".")
                find_method(owner)
                if owner == name:
                    options[option] = value
            else:
                raise SearchSpaceError(
                    f"parameter {key!r} is not understood; there are 'method', '<method>.<option>', 'allocator', "
                    "'refit', 'budget:macs', 'budget:params', and per group 'ratio:<group>', 'weight:<group>', "
                    "'width:<group>'"
                )
        if len(groups) > 1:
            raise SearchSpaceError(f"a trial has {' and '.join(sorted(groups))} per group; give one of them")
        family = next(iter(groups), None)
        if family is not None and allocator is not None:
            raise SearchSpaceError(f"allocator={allocator!r} chooses widths, and so does {family}:<group>; drop one")
        return cls(
            name,
            options,
            allocator,
            family,
            groups[family] if family is not None else {},
            budget,
            refit,
        )

    def allocate(self, limited: bool) -> Allocator | None:
        """The widths of the trial as an allocator, or None if the method chooses.

        Args:
            limited: whether there is a budget.
        """
        if self.family is None:
            return None

        def allocator(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
            check_names(self.per_group, cost.names, "group")
            given = [self.per_group.get(name) for name in cost.names]
            if self.family == "weight":
                weights = {n: 1.0 if w is None else w for n, w in zip(cost.names, given, strict=True)}
                return ProgramAllocator(weights)(curves, cost, space, limits)
            if self.family == "ratio":
                kept = np.array([1.0 if r is None else 1.0 - r for r in given]) * space.full.astype(np.float64)
                return proportional(curves, cost, space, limits, kept) if limited else round_down(space, kept)
            return _exact(self.per_group, cost, space, limits)

        return allocator


def checked_allocator(choice: Any) -> str | None:
    """Name of an allocator in the parameters of a search, ``None`` for ``"default"``, the method's own.

    Raises:
        SearchSpaceError: for anything else.
    """
    if choice is None or choice == "default":
        return None
    if not isinstance(choice, str) or choice not in ALLOCATORS:
        raise SearchSpaceError(f"allocator={choice!r} is unknown; choose from {['default', *sorted(ALLOCATORS)]}")
    return choice


def checked_mode(mode: Any) -> str | None:
    """Mode of the refit in the parameters of a search.

    Raises:
        SearchSpaceError: if it is none.
    """
    if mode is not None and mode is not False:
        try:
            return Refit(mode).mode
        except ValueError as error:
            known = "None, 'sequential', 'parallel' or 'batchnorm'"
            raise SearchSpaceError(f"refit={mode!r} is unknown; choose {known}") from error
    return None


@warned_once()
def prune_trial(
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float],
    loader: Iterable[Any] | None = None,
    budget: Budget | None = None,
    train: Train | None = None,
    refit: Refit | str | bool | None = "batchnorm",
    recover: Recovery | bool | float | None = None,
    statistics: Any = None,
    loss_fn: LossFn | None = None,
    latency_seconds: float | None = 0.2,
    seed: int = 0,
    keep: Callable[[nn.Module], None] | None = None,
    progress: bool | None = None,
    **pruner_options: Any,
) -> dict[str, float]:
    """Prune a copy of a network as the parameters of one trial say, train it if asked to, and measure it.

    Args:
        model: the network; not changed.
        params: see :meth:`TrialParameters.parse`. Widths come from ``width:<group>`` (channels, taken exactly),
            ``weight:<group>`` (weights of the convex program: always on the budget), ``ratio:<group>`` (fraction to
            remove; with a budget only the proportions count, and they are scaled to meet it), or else from the method.
            Groups not named keep everything (``width``, ``ratio``) or have weight 1.
        example_inputs: tensor, tuple or dict, batch dimension first; latency is measured on them.
        evaluate: ``evaluate(model) → number``, larger is better.
        loader: re-iterable of batches for statistics and batch norms.
        budget: limit; ``budget:macs`` and ``budget:params`` of the trial replace its fields. Without one, widths must
            be given.
        train: fine-tuning, see :class:`~tp_importance.automl.Train`; default: none.
        refit: how the network is repaired on ``loader`` before training, see :class:`~tp_importance.Refit`; a
            ``"refit"`` among the parameters goes first. Without a loader or batch norms, ``"batchnorm"`` does nothing.
        recover: train the pruned network on ``loader`` to give what ``model`` gives, without labels and before
            ``train``: ``True``, a number of minutes or a :class:`~tp_importance.Recovery`.
        statistics: folder for statistics that trials share, see
            :class:`~tp_importance.automl.statistics.CurveStore`; default: collected in every trial.
        loss_fn: ``loss_fn(output, labels)`` for trials of a criterion that looks at gradients of a loss (``"taylor"``,
            ``"psap"``); the others, in the same search, have no use for it.
        latency_seconds: how long to measure; None leaves the latency out.
        seed: of torch during the trial; the generator of the caller is not touched.
        keep: called with the pruned network, to save it say.
        progress: show a bar for every phase; by default in a terminal, see :mod:`tp_importance.core.progress`.
        **pruner_options: of the pruner, such as ``ignored_layers`` or ``round_to``; layers are named by ``model``.

    Returns:
        ``default`` (what ``evaluate`` says), ``macs`` and ``params`` (exact), ``latency`` (milliseconds, median).

    Raises:
        BudgetError: if the budget cannot be reached, or the widths exceed it.
        SearchSpaceError: if the parameters are not understood.
        TypeError: for a model or budget that is none, or a compiled model.
        ValueError: for bad data, or a metric that is not a finite number.

    Every exception has a note with the parameters.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> x = torch.randn(1, 3, 12, 12)
        >>> found = prune_trial(net, {"method": "magnitude", "magnitude.p": 1}, example_inputs=x,
        ...                     evaluate=lambda net: 0.5, budget=Budget(macs=0.5), latency_seconds=None)
        >>> sorted(found), net[0].out_channels
        (['default', 'macs', 'params'], 8)
    """
    with parameters_noted(params), torch.random.fork_rng(), shown(progress):
        torch.manual_seed(seed)
        checked_model(model)
        if loss_fn is not None:
            checked_loss_fn(loss_fn)
        if budget is not None:
            checked_budget(budget)
        # layers in the options are then those of the copy
        clone, options = copied_with(model, pruner_options)
        job = Job(clone, example_inputs, loader, budget, train=train, loss_fn=loss_fn)
        job.refit, job.recovery, job.dense = Refit.of(refit), Recovery.of(recover), model
        if job.recovery is not None:
            job.recovery.require_data(loader)
        job.store = None if statistics is None else CurveStore(statistics, model)
        job.pruner_options = options
        return _run(TrialParameters.parse(params), job, evaluate, latency_seconds, keep)


def _run(
    params: TrialParameters,
    job: Job,
    evaluate: Callable[[nn.Module], float],
    latency_seconds: float | None,
    keep: Callable[[nn.Module], None] | None,
) -> dict[str, float]:
    method, x = find_method(params.method), job.example_inputs
    if params.budget:
        job.budget = Budget(**{**(job.budget.to_dict() if job.budget is not None else {}), **params.budget})
    if job.budget is None and params.family not in ("ratio", "width"):
        raise SearchSpaceError(
            "the trial has no budget: pass budget=, search over 'budget:macs', or give ratio:<group> or width:<group>"
        )
    job.options, job.allocator = dict(params.options), params.allocator
    if params.refit is not None:
        job.refit = Refit.of(params.refit)
    if job.refit is not None and job.refit.solves:
        job.refit.require_data(job.loader)
    job.allocate = params.allocate(limited=job.budget is not None)
    run, products = job.pruner_options.get("forward_fn"), job.pruner_options.get("count_attention", True)
    dense = Cost(*count_ops(job.model, x, forward_fn=run, attention=products))
    if method.prune is None:
        prune_channels(method, job)
    else:
        method.prune(job)
    if job.recovery is not None and job.recovered is None:
        raise SearchSpaceError(f"method {params.method!r} recovers nothing: its prune(job) must call job.finish()")
    cost = Cost(*count_ops(job.model, x, forward_fn=run, attention=products))
    limits = job.budget.limits(dense) if job.budget is not None else {}
    for name, left in exceeded(cost.as_dict(), limits).items():
        raise BudgetError(f"method {params.method!r} left {left} {name}, more than the limit {limits[name]}")
    job.model.eval()
    with phase("evaluating") as running:
        value = _metric(evaluate(job.model))
        running.note(default=value)
    found = {"default": value, "macs": float(cost.macs), "params": float(cost.params)}
    if latency_seconds is not None:
        with phase("measuring latency"):
            found["latency"] = measure_latency(job.model, x, forward_fn=run, min_run_time=latency_seconds).median_ms
    if keep is not None:
        keep(job.model)
    return found


def _exact(widths: Mapping[str, float], cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
    units = cost.units({name: int(width) for name, width in widths.items()})
    for name, levels, u, size in zip(cost.names, space.levels, units, cost.unit_sizes, strict=True):
        if u not in levels:
            raise SearchSpaceError(f"width:{name}={u * size} is not admissible; admissible: {(levels * size).tolist()}")
    for name, spent in cost.exceeded(units, limits).items():
        raise BudgetError(
            f"the widths of the trial cost {spent} {name}, more than the limit {limits[name]}; let the search "
            "propose weight:<group> or ratio:<group>, which are scaled to the budget, or use the tuner"
        )
    return units


def checked_number(key: str, family: str, value: Any) -> float:
    """A ratio, weight or width.

    Raises:
        SearchSpaceError: if it is none.
    """
    bad = isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value)
    number = 0.0 if bad else float(value)
    wrong = {"ratio": not 0 <= number <= 1, "weight": number <= 0, "width": number < 1 or not number.is_integer()}
    if bad or wrong[family]:
        must = {"ratio": "a fraction in [0, 1]", "weight": "a number above 0", "width": "a whole number of channels"}
        raise SearchSpaceError(f"parameter {key}={value!r} must be {must[family]}")
    return number


def _metric(value: Any) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"evaluate(model) gives {number}; it must be a finite number, larger is better")
    return number
