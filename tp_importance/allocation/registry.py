"""Allocators by name, and which of them suits an importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch_pruning as tp

from ..core.types import Ints
from ..graph.cost import CostModel
from .curves import Curves
from .greedy import greedy
from .lagrange import lagrange
from .limits import Limits
from .program import ProgramAllocator, WeightSource, program
from .proportional import uniform
from .space import WidthSpace

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "default_allocator",
    "find_allocator",
    "named_allocator",
    "register_allocator",
]

Allocator = Callable[[Curves, CostModel, WidthSpace, Limits], Ints]
"""Any function with the arguments of :func:`~tp_importance.allocation.greedy.greedy`."""

_ALLOCATORS: dict[str, Allocator] = {"greedy": greedy, "uniform": uniform, "program": program, "lagrange": lagrange}

ALLOCATORS: Mapping[str, Allocator] = MappingProxyType(_ALLOCATORS)
"""All allocators by name; :func:`register_allocator` adds one."""

_OWN_CHOICE = "default"
"""What stands for the :func:`default_allocator`, so that no allocator can bear that name."""

_LOSSES = ("GroupTaylorImportance", "GroupHessianImportance", "OBDCImportance")
COMPARABLE = tuple(getattr(tp.importance, name) for name in _LOSSES if hasattr(tp.importance, name))
"""Importances of Torch-Pruning that estimate what the loss gains without a channel: greedy widths suit the first of
them (docs/benchmarks.md); the second-order ones are of its kind and were not measured."""


def register_allocator(name: str, allocator: Allocator) -> None:
    """Let pruners, searches and both hosts find an allocator by name.

    Args:
        name: its name, an identifier.
        allocator: the function, or an object that is called like one.

    Raises:
        TypeError: if the allocator cannot be called, or is a class.
        ValueError: for a name that is taken or no identifier.

    Example:
        >>> def narrowest(curves, cost, space, limits):
        ...     return space.floor
        >>> register_allocator("greedy", narrowest)
        Traceback (most recent call last):
        ValueError: an allocator is called 'greedy' already: give this one another name
    """
    if not callable(allocator) or isinstance(allocator, type):
        raise TypeError(f"allocator {name!r} must be a function (curves, cost, space, limits) → units: {allocator!r}")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"an allocator cannot be called {name!r}: give it an identifier as name")
    if name in _ALLOCATORS or name == _OWN_CHOICE:
        raise ValueError(f"an allocator is called {name!r} already: give this one another name")
    _ALLOCATORS[name] = allocator


def find_allocator(choice: str | Allocator) -> Allocator:
    """Look an allocator up by name; callables pass through.

    Raises:
        TypeError: for what is neither a name nor a function.
        ValueError: for an unknown name.
    """
    if isinstance(choice, type):
        raise TypeError(f"allocator={choice.__name__} is a class; make one of it: allocator={choice.__name__}()")
    if callable(choice):
        return choice
    if not isinstance(choice, str):
        raise TypeError(f"allocator={choice!r} must be one of {sorted(ALLOCATORS)}, or a function")
    if choice not in ALLOCATORS:
        raise ValueError(f"unknown allocator {choice!r}; known: {sorted(ALLOCATORS)}, or pass a function")
    return ALLOCATORS[choice]


def default_allocator(importance: Any) -> str:
    """Where the widths come from if nobody says: the one rule, for names, objects, both hosts and searches.

    What the importance declares as its ``default_allocator``; else ``"greedy"`` where scores compare across layers: it
    has value curves, or is in :data:`COMPARABLE`; else ``"uniform"``. Scores such as magnitudes compare within a layer
    only, and greedy widths by them lose many points (docs/benchmarks.md).

    Args:
        importance: any importance.

    Returns:
        A name in :data:`ALLOCATORS`.

    Example:
        >>> default_allocator(tp.importance.MagnitudeImportance()), default_allocator(tp.importance.TaylorImportance())
        ('uniform', 'greedy')
    """
    declared = getattr(importance, "default_allocator", None)
    if declared is not None:
        return str(declared)
    return "greedy" if hasattr(importance, "curves") or isinstance(importance, COMPARABLE) else "uniform"


def named_allocator(choice: str | Allocator | None, weights: WeightSource = None, importance: Any = None) -> Allocator:
    """Look an allocator up by name, for somebody who has weights; functions pass through.

    Args:
        choice: a name in :data:`ALLOCATORS`, or a function; ``None`` or
            ``"default"`` for the :func:`default_allocator` of the importance.
        weights: those that ``"program"`` takes, see :class:`ProgramAllocator`.
        importance: what values the channels.

    Raises:
        TypeError: for what is neither a name nor a function.
        ValueError: for an unknown name.
    """
    if choice is None or (isinstance(choice, str) and choice == _OWN_CHOICE):
        choice = default_allocator(importance)
    found = find_allocator(choice)
    if found is not program:
        return found
    return importance.program() if hasattr(importance, "program") else ProgramAllocator(weights)
