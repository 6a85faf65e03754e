"""The methods there are, by name: a new one is a folder that calls :func:`register_method` once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from ..allocation.registry import Allocator
from ..budget import Budget
from ..core.arguments import checked_importance
from ..errors import SearchSpaceError
from ..recovery.recover import recover
from ..recovery.report import RecoveryReport
from ..recovery.settings import Recovery
from ..refitting.settings import Refit
from ..statistics.gradients import LossFn
from ..statistics.running_statistics import has_batch_norm
from .domains import Domain, check_names
from .importance import StatisticalImportance

__all__ = ["METHODS", "Job", "Method", "Train", "find_criterion", "find_importance", "find_method", "register_method"]


class Train(Protocol):
    """Fine-tuning of a network in place.

    With ``start`` and ``step`` it calls ``start(optimizer, total_steps=n)`` once, before the first step, and ``step()``
    after every ``optimizer.step()``; only methods that prune while training give them.
    """

    def __call__(self, model: nn.Module, *, start: Any = None, step: Any = None) -> None:
        """Train ``model`` in place."""


@dataclass
class Job:
    """What a method that prunes by itself is given: a copy of the network to prune in place, and how.

    Attributes:
        model: the copy.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: re-iterable of batches, or None.
        budget: what the network may cost, or None if the widths are given.
        options: the method's own, from the search.
        allocate: widths given by the search, as an allocator; None leaves them to the method.
        allocator: name of the allocator the search chose, or None.
        train: fine-tuning, or None.
        store: statistics that trials share, a :class:`~tp_importance.automl.CurveStore`, or None.
        loss_fn: for criteria that look at a loss, or None for their own.
        pruner_options: further arguments of the pruner, such as ``ignored_layers``; use :attr:`arguments`.
        refit: how the network is repaired on the loader, or None; use :attr:`repair`.
        dense: the network that the copy was made of.
        recovery: how it teaches the pruned one on the loader, or None; use :meth:`finish`.
        recovered: what the recovery did, once it is done.
    """

    model: nn.Module
    example_inputs: Any
    loader: Iterable[Any] | None
    budget: Budget | None
    options: dict[str, Any] = field(default_factory=dict)
    allocate: Allocator | None = None
    allocator: str | None = None
    train: Train | None = None
    store: Any = None
    loss_fn: LossFn | None = None
    pruner_options: dict[str, Any] = field(default_factory=dict)
    refit: Refit | None = None
    dense: nn.Module | None = None
    recovery: Recovery | None = None
    recovered: RecoveryReport | None = None

    def finish(self) -> None:
        """What follows the surgery: recovery and fine-tuning of ``model``, of these what there is."""
        if self.recovered is None:
            self.recover()
        if self.train is not None:
            self.train(self.model)

    def recover(self) -> None:
        """Recovery alone, for methods that train by themselves."""
        if self.recovery is not None and self.dense is not None and self.loader is not None:
            run = self.pruner_options.get("forward_fn")
            self.recovered = recover(self.model, self.dense, self.loader, self.recovery, forward_fn=run)

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

    def whole_budget(self, name: str, modes: Sequence[str] = ("batchnorm",)) -> Budget:
        """The budget, for a method that decides all the rest by itself.

        Args:
            name: of the method, for the error.
            modes: of a refit that it takes.

        Raises:
            SearchSpaceError: if the search gives widths, an allocator or another refit.
            ValueError: if there is no budget.
        """
        if self.allocate is not None or self.allocator is not None:
            raise SearchSpaceError(f"method {name!r} takes no widths and no allocator per group; it needs a budget")
        if self.refit is not None and self.refit.mode not in modes:
            known = " or ".join(f"refit={mode!r}" for mode in modes)
            raise SearchSpaceError(f"method {name!r} takes no refit={self.refit.mode!r}; give {known}")
        if self.budget is None:
            raise ValueError(f"method {name!r} needs a budget: pass budget=, or search over 'budget:macs'")
        return self.budget


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: how users and searches call it.
        make: ``make(**options)`` gives the importance of a method that values channels, ours or any
            ``tp.importance.Importance``; None for methods that prune by themselves.
        options: hyper-parameters with the domains that a search takes by default.
        prune: ``prune(job)`` prunes ``job.model`` in place and calls ``job.finish()``, or trains it by itself; None for
            methods with an importance.
        needs_training: whether it can do nothing without ``job.train``.
        instead: what to use where a criterion for channels is wanted and this is none.
    """

    name: str
    make: Callable[..., Any] | None = None
    options: Mapping[str, Domain] = field(default_factory=dict)
    prune: Callable[[Job], None] | None = None
    needs_training: bool = False
    instead: str = "prune_trial"

    def create(self, **options: Any) -> Any:
        """The importance.

        Raises:
            TypeError: if it does not take an option.
        """
        assert self.make is not None
        return self.make(**options)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it looks at with its default options, of ``"loader"``, ``"labels"``, ``"gradients"``, ``"training"``."""
        found = ["training"] if self.needs_training else []
        if self.make is not None and isinstance(made := self.make(), StatisticalImportance):
            asked = {"loader": True, "labels": made.needs_labels, "gradients": made.needs_gradients}
            found += [what for what, wanted in asked.items() if wanted]
        return tuple(found)


_METHODS: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""All methods by name, read-only; :func:`register_method` adds one."""


def register_method(
    name: str,
    importance: Callable[..., Any] | None = None,
    *,
    options: Mapping[str, Domain] | None = None,
    prune: Callable[[Job], None] | None = None,
    needs_training: bool = False,
    instead: str = "prune_trial",
) -> Method:
    """Make a method known everywhere: ``prune(method=name)``, pruners of both hosts, and searches.

    What the method needs (labels, gradients, data) and where its widths come from, its importance says, see
    :class:`~tp_importance.StatisticalImportance` and
    :func:`~tp_importance.allocation.registry.default_allocator`.

    Args:
        name: how it is called.
        importance: a class or function that makes the importance; for methods that value channels.
        options: hyper-parameters of the importance (or of ``prune``) with domains for searches.
        prune: ``prune(job)`` for a method that does more than valuing channels; see :class:`Job`.
        needs_training: whether ``prune`` can do nothing without ``job.train``.
        instead: what an error says to use where only a criterion for channels will do.

    Raises:
        TypeError: if neither or both of ``importance`` and ``prune`` are given.
        ValueError: if the name is taken, empty, or has one of the characters that parameters are made with (``.:``).

    Example:
        >>> import torch_pruning as tp
        >>> register_method("magnitude", tp.importance.MagnitudeImportance)
        Traceback (most recent call last):
        ValueError: a method called 'magnitude' is registered already; choose another name
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a method must be text, not {name!r}")
    for given in (importance, prune):
        if given is not None and not callable(given):
            raise TypeError(f"method {name!r} needs a class or a function, not {given!r}")
    if (importance is None) is (prune is None):
        raise TypeError(f"method {name!r} needs an importance, or a function prune(job), not both: give one of them")
    if name in _METHODS:
        raise ValueError(f"a method called {name!r} is registered already; choose another name")
    if not name or set(".:") & set(name) or not name.isprintable() or " " in name:
        raise ValueError(f"{name!r} cannot be the name of a method; use letters, digits and _")
    method = Method(name, importance, dict(options or {}), prune, needs_training, instead)
    _METHODS[name] = method
    return method


def find_method(name: Any) -> Method:
    """The method of that name.

    Raises:
        SearchSpaceError: if there is none; names those there are.
    """
    check_names([name], list(METHODS), "method")
    return METHODS[name]


def find_criterion(name: str, argument: str = "method") -> Method:
    """The method of that name, if it is one that values channels.

    Args:
        name: of the method.
        argument: how the user calls it.

    Raises:
        ValueError: if there is none; names those there are.
    """
    known = sorted(n for n, m in METHODS.items() if m.make is not None)
    if name not in known:
        why = "is unknown" if name not in METHODS else f"is no criterion for channels: use {METHODS[name].instead}"
        raise ValueError(f"{argument}={name!r} {why}; known: {known}, or pass an importance")
    return METHODS[name]


def find_importance(choice: Any, argument: str = "importance") -> Any:
    """The importance that a user means: a name makes one, an object is checked.

    Args:
        choice: name of a criterion, or an importance.
        argument: how the user calls it.

    Raises:
        TypeError: for what cannot value channels.
        ValueError: for an unknown name.
    """
    if isinstance(choice, str):
        return find_criterion(choice, argument).create()
    return checked_importance(choice, argument)
