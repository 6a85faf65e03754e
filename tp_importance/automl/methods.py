"""The methods that searches and :func:`~tp_importance.prune` know by name; a new one is registered here only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..allocation.curves import value_curves
from ..allocation.greedy import Allocator, Curves, Limits, WidthSpace
from ..allocation.program import default_allocator, named_allocator
from ..budget import Budget
from ..core.types import Ints
from ..errors import SearchSpaceError
from ..graph.cost import CostModel
from ..graph.groups import PrunableGroups
from ..methods.catro.importance import CATROImportance
from ..methods.itpruner.importance import ITPrunerImportance
from ..methods.obs.importance import OBSImportance
from ..methods.psap.importance import PSAPImportance
from ..methods.psap.pruner import PSAPPruner
from ..methods.psap.schedule import PSAPSchedule
from ..methods.resconv import ResConvPruner, fuse
from ..pruning.importance import StatisticalImportance
from ..pruning.pruner import BudgetPruner
from ..refitting.settings import Refit
from ..statistics.gradients import loss_gradients
from ..statistics.running_statistics import has_batch_norm
from .space import Choice, Domain, Float, Int, check_names
from .statistics import CurveStore, Valuation

__all__ = [
    "METHODS",
    "Job",
    "Method",
    "RandomImportance",
    "Train",
    "channel_method",
    "find_criterion",
    "find_method",
    "register_method",
    "value_network",
]


class Train(Protocol):
    """Fine-tuning of a network in place.

    With ``start`` and ``step`` it calls ``start(optimizer, total_steps=n)`` once, before the first step, and ``step()``
    after every ``optimizer.step()``; only methods that prune while training give them.
    """

    def __call__(self, model: nn.Module, *, start: Any = None, step: Any = None) -> None:
        """Train ``model`` in place."""


@dataclass
class Job:
    """What a method is given: a copy of the network to prune in place, and how.

    Attributes:
        model: the copy.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: re-iterable of batches, or None.
        budget: what the network may cost, or None if the widths are given.
        options: the method's own, from the search.
        allocate: widths given by the search, as an allocator; None leaves them to the method.
        allocator: name of the allocator the search chose, or None.
        train: fine-tuning, or None.
        store: shared statistics, or None.
        loss_fn: for criteria that need gradients.
        pruner_options: further arguments of the pruner, such as ``ignored_layers``; use :attr:`arguments`.
        refit: how the network is repaired on the loader, or None.
    """

    model: nn.Module
    example_inputs: Any
    loader: Iterable[Any] | None
    budget: Budget | None
    options: dict[str, Any] = field(default_factory=dict)
    allocate: Allocator | None = None
    allocator: str | None = None
    train: Train | None = None
    store: CurveStore | None = None
    loss_fn: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy
    pruner_options: dict[str, Any] = field(default_factory=dict)
    refit: Refit | None = None

    @property
    def repair(self) -> Refit | None:
        """How the network is repaired: batch norms follow only where there are some, and data."""
        if self.refit is None or self.refit.solves:
            return self.refit
        return self.refit if self.loader is not None and has_batch_norm(self.model) else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Further arguments of a pruner of channels: groups are verified once, if there is a store."""
        return {**({} if self.store is None else {"verify": self.store.verify}), **self.pruner_options}


@dataclass(frozen=True)
class Method:
    """One method of a search.

    Attributes:
        name: how a search calls it.
        prune: prunes ``job.model`` in place, and trains it if ``job.train`` is there.
        options: the method's hyper-parameters with the domains that a search takes by default.
        make: the importance, for methods that choose channels; they take widths from the search. None: they do not.
        needs_gradients: whether ``make()`` wants gradients of the loss collected first.
        needs_training: whether it can do nothing without ``train``.
    """

    name: str
    prune: Callable[[Job], None]
    options: Mapping[str, Domain] = field(default_factory=dict)
    make: Callable[..., Any] | None = None
    needs_gradients: bool = False
    needs_training: bool = False


class RandomImportance(tp.importance.Importance):
    """Random scores, the baseline; Torch-Pruning's cannot be seeded.

    Args:
        seed: of the scores.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, group: Any) -> Tensor:
        """Scores of a ``tp.Group``, shape (len(group[0].idxs),)."""
        return torch.rand(len(group[0].idxs), generator=self._generator)


_METHODS: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""All methods by name, read-only; :func:`register_method` adds one."""


def register_method(method: Method) -> Method:
    """Make a method known to searches.

    Args:
        method: the method.

    Raises:
        ValueError: if the name is taken, empty, or has one of the characters that parameters are made with (``.:``).

    Example:
        >>> register_method(METHODS["catro"])
        Traceback (most recent call last):
        ValueError: a method called 'catro' is registered already; choose another name
    """
    if method.name in _METHODS:
        raise ValueError(f"a method called {method.name!r} is registered already; choose another name")
    if not method.name or set(".:") & set(method.name):
        raise ValueError(f"{method.name!r} cannot be the name of a method; use letters, digits and _")
    _METHODS[method.name] = method
    return method


def find_method(name: Any) -> Method:
    """The method of that name.

    Raises:
        SearchSpaceError: if there is none; names those there are.
    """
    check_names([name], list(METHODS), "method")
    return METHODS[name]


def find_criterion(name: str) -> Method:
    """The method of that name, if it is one that chooses channels.

    Raises:
        ValueError: if there is none; names those there are.
    """
    known = sorted(n for n, m in METHODS.items() if m.make is not None)
    if name not in known:
        other = {"resconv": "use ResConvPruner", "psap_training": "use PSAPPruner"}.get(name)
        why = "is unknown" if name not in METHODS else f"is no criterion for channels: {other or 'use prune_trial'}"
        raise ValueError(f"method={name!r} {why}; known: {known}, or pass an importance")
    return METHODS[name]


def channel_method(
    name: str,
    make: Callable[..., Any],
    options: Mapping[str, Domain] | None = None,
    *,
    gradients: bool = False,
) -> Method:
    """A method that is an importance: ours, or any ``tp.importance.Importance``.

    If the search gives no widths, they come from the :func:`~tp_importance.allocation.program.default_allocator` of the
    importance.

    Args:
        name: how a search calls it.
        make: ``make(**options)`` gives the importance.
        options: domains of the options.
        gradients: collect gradients of the loss over the loader first.

    Example:
        >>> channel_method("lamp", tp.importance.LAMPImportance, {"p": Choice((1, 2))}).name
        'lamp'
    """

    def prune(job: Job) -> None:
        found: list[Valuation] = []

        def allocate(curves: Curves, cost: CostModel, space: WidthSpace, limits: Limits) -> Ints:
            chosen = job.allocate or named_allocator(job.allocator, found[0].weights, found[0])
            return chosen(curves, cost, space, limits)

        pruner = BudgetPruner(
            job.model,
            job.example_inputs,
            job.loader,
            importance=None,
            budget=Budget(macs=1.0) if job.budget is None else job.budget,
            allocator=allocate,
            **job.arguments,
        )
        found.append(value_network(method, job, pruner.groups))
        pruner.importance = found[0]
        plan = pruner.plan()
        if not plan.is_noop:
            pruner.apply(plan, refit=job.repair)
        if job.train is not None:
            job.train(job.model)

    method = Method(name, prune, dict(options or {}), make, gradients)
    return method


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
    make = method.make
    assert make is not None

    def collect() -> Valuation:
        start = time.perf_counter()
        try:
            importance = make(**job.options)
        except TypeError as error:
            known = sorted(method.options)
            raise SearchSpaceError(
                f"{method.name} does not take {job.options}: {error}; its options: {known}"
            ) from error
        if job.loader is None and (method.needs_gradients or isinstance(importance, StatisticalImportance)):
            raise ValueError(f"method {method.name!r} looks at data: pass loader=")
        gradients = ExitStack()
        calls: dict[str, Any] = {
            "forward_fn": groups.options.forward_fn,
            "label_fn": job.pruner_options.get("label_fn"),
        }
        if hasattr(importance, "loss_fn"):
            importance.loss_fn = job.loss_fn
        if isinstance(importance, StatisticalImportance):
            importance.collect(job.model, job.example_inputs, job.loader or (), groups=groups, **calls)
        elif method.needs_gradients:
            gradients.enter_context(loss_gradients(job.model, job.loader or (), job.loss_fn, **calls))
        with gradients:
            curves = value_curves(importance, groups)
        weights, seconds = getattr(importance, "weights", None), time.perf_counter() - start
        return Valuation(curves, weights, default_allocator(importance), seconds)

    if job.store is None:
        return collect()
    return job.store.get(method.name, {**job.options, "groups": groups.widths}, collect)


def _prune_layers(job: Job) -> None:
    """ResConv: whole layers go, the rest is trained with its shortcuts and fused."""
    pruner = ResConvPruner(
        job.model,
        job.example_inputs,
        job.loader,
        budget=_needed(job, "resconv"),
        **job.options,
        **job.pruner_options,
    )
    if pruner.plan().removed:
        pruner.step(fuse=False, refit=job.repair)
    if job.train is not None:
        job.train(job.model)
    if pruner.layers:
        fuse(job.model.eval())


def _prune_while_training(job: Job) -> None:
    """PSAP as it is meant: masks move while the network trains."""
    if job.train is None:
        raise ValueError("method 'psap_training' prunes while training: pass train=, or choose 'psap'")
    options = dict(job.options)
    schedule = PSAPSchedule(**{k: options.pop(k) for k in ("prune_steps", "begin", "end", "pulse") if k in options})
    budget = _needed(job, "psap_training")
    pruner = PSAPPruner(job.model, job.example_inputs, budget=budget, schedule=schedule, **options, **job.arguments)
    job.train(job.model, start=pruner.start, step=pruner.step)
    pruner.finish()  # removes what was masked while the batch norms learned: they fit


def _needed(job: Job, name: str) -> Budget:
    if job.allocate is not None or job.allocator is not None:
        raise SearchSpaceError(f"method {name!r} takes no widths and no allocator per group; it needs a budget")
    if job.refit is not None and job.refit.solves:
        raise SearchSpaceError(f"method {name!r} has no consumers of removed channels to refit; give refit='batchnorm'")
    if job.budget is None:
        raise ValueError(f"method {name!r} needs a budget: pass budget=, or search over 'budget:macs'")
    return job.budget


register_method(channel_method("catro", CATROImportance, {"class_weight": Float(0.0, 1.0)}))
register_method(channel_method("obs", OBSImportance, {"class_weight": Float(0.0, 1.0)}))
register_method(channel_method("itpruner", ITPrunerImportance, {"beta": Float(-10.0, 10.0)}))
register_method(channel_method("psap", PSAPImportance, {"ratio": Float(0.2, 0.8)}))
register_method(
    Method(
        "psap_training",
        _prune_while_training,
        {"threshold": Float(0.1, 1.0, log=True), "prune_steps": Int(2, 10), "protect": Choice((True, False))},
        needs_training=True,
    )
)
register_method(Method("resconv", _prune_layers, {"importance": Choice(("output", "scale"))}))
register_method(channel_method("magnitude", tp.importance.MagnitudeImportance, {"p": Choice((1, 2))}))
for _p in (1, 2):  # by the names that are short for it
    register_method(channel_method(f"l{_p}", partial(tp.importance.MagnitudeImportance, p=_p)))
register_method(channel_method("fpgm", tp.importance.FPGMImportance))
register_method(channel_method("taylor", tp.importance.TaylorImportance, gradients=True))
register_method(channel_method("random", RandomImportance))
