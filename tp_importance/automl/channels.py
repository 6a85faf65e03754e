"""A trial of a method that values channels: its curves, shared between trials, and the widths of the search."""

from __future__ import annotations

import time

from ..allocation.curves import value_curves
from ..allocation.registry import default_allocator, named_allocator
from ..errors import SearchSpaceError
from ..graph.groups import PrunableGroups
from ..pruning.importance import StatisticalImportance
from ..pruning.registry import Job, Method
from ..pruning.target import PruningTarget
from .statistics import Valuation

__all__ = ["prune_channels", "value_network"]


def prune_channels(method: Method, job: Job) -> None:
    """Prune ``job.model`` in place by the importance of a method, recover and train it if the job says so.

    If the search gives no widths, they come from the
    :func:`~tp_importance.allocation.registry.default_allocator` of the importance.

    Args:
        method: the method; it has an importance.
        job: network, data, budget and options.

    Raises:
        BudgetError: if the budget cannot be reached.
        SearchSpaceError: if the importance does not take the options.
    """
    options = dict(job.arguments)
    label_fn = options.pop("label_fn", None)
    target = PruningTarget(job.model, job.example_inputs, **options)
    found = value_network(method, job, target.groups)
    target.groups.require_some()
    chosen = job.allocate or named_allocator(job.allocator, found.weights, found)
    limits = {"macs": float(target.dense.macs)} if job.budget is None else target.limits(job.budget)
    plan = target.allocate(chosen, found.curves(target.groups), limits)
    if not plan.is_noop:
        target.apply(plan, job.loader, refit=job.repair, label_fn=label_fn)
    job.finish()


def value_network(method: Method, job: Job, groups: PrunableGroups) -> Valuation:
    """Curves of a channel method, from the store if it has them.

    Args:
        method: the method; it has an importance.
        job: network, data, options and store.
        groups: groups of the network.

    Raises:
        SearchSpaceError: if the importance does not take the options.
        ValueError: if it needs data and there is no loader.
    """

    def collect() -> Valuation:
        start = time.perf_counter()
        try:
            importance = method.create(**job.options)
        except TypeError as error:
            known = sorted(method.options)
            raise SearchSpaceError(
                f"{method.name} does not take {job.options}: {error}; its options: {known}"
            ) from error
        if job.loss_fn is not None and hasattr(importance, "loss_fn"):
            importance.loss_fn = job.loss_fn
        if isinstance(importance, StatisticalImportance):
            if job.loader is None:
                raise ValueError(f"method {method.name!r} looks at data: pass loader=")
            importance.collect(
                job.model,
                job.example_inputs,
                job.loader,
                groups=groups,
                forward_fn=groups.options.forward_fn,
                label_fn=job.pruner_options.get("label_fn"),
            )
        curves = value_curves(importance, groups)
        weights, seconds = getattr(importance, "weights", None), time.perf_counter() - start
        return Valuation(curves, weights, default_allocator(importance), seconds)

    if job.store is None:
        return collect()
    return job.store.get(method.name, {**job.options, "groups": groups.widths}, collect)
