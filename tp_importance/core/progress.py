"""What is running: every long phase has a name, for the logger ``tp_importance`` and for progress bars.

The phases are logged whether bars are shown or not: the start at DEBUG, the end at INFO, with its duration and what
came out of it; what is part of another phase at DEBUG. To see them::

    logging.basicConfig(level=logging.INFO)

Bars are shown in a terminal, of phases that take longer than a second, with the time that remains where the number of
steps is known. ``progress=True`` shows all of them anywhere, ``progress=False`` none: :func:`shown` says so for
everything inside, in this thread. So functions deep below need no argument.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from operator import length_hint
from typing import Any, Concatenate, ParamSpec, TypeVar

from tqdm.auto import tqdm

__all__ = ["LOGGER", "Phase", "phase", "shown", "shows_progress", "track"]

LOGGER = logging.getLogger("tp_importance")
LOGGER.addHandler(logging.NullHandler())  # silent until the user configures logging

_SHOWN: ContextVar[bool | None] = ContextVar("tp_importance.core.progress", default=None)
_DEPTH: ContextVar[int] = ContextVar("tp_importance.depth", default=0)

_DELAY = 1.0
"""Seconds after which a bar appears that nobody asked for."""

_UNCOUNTED = "{desc} [{elapsed}]"
_UNTOLD = "{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}]"  # counted, though how many there will be is not known

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class Phase:
    """A phase that is running; :func:`phase` makes it.

    Attributes:
        facts: what the log says at its end, besides the duration.
    """

    def __init__(self, name: str, bar: Any = None) -> None:
        self.name, self.facts = name, dict[str, Any]()
        self._bar = bar

    def advance(self, steps: int = 1) -> None:
        """Say that ``steps`` more are done."""
        if self._bar is not None:
            self._bar.update(steps)

    def note(self, **facts: Any) -> None:
        """Add to what the log says at the end."""
        self.facts |= facts


@contextmanager
def shown(progress: bool | None = True) -> Iterator[None]:
    """Show a bar for every phase inside the block, or none; ``None`` changes nothing.

    Example:
        >>> with shown():  # doctest: +SKIP
        ...     OBSImportance().collect(model, x, loader)
        collecting: 100%|██████████| 8/8 [00:01<00:00,  6.1batch/s]
    """
    before = _SHOWN.get()
    _SHOWN.set(before if progress is None else bool(progress))
    try:
        yield
    finally:
        _SHOWN.set(before)  # no token: a generator may be closed in another context


@contextmanager
def phase(
    name: str, total: int | None = None, *, unit: str | None = None, progress: bool | None = None, **facts: Any
) -> Iterator[Phase]:
    """Log a phase, and show it as a bar on stderr: in a terminal, or if asked for, here or by :func:`shown`.

    The bar is closed on any exit. A bar inside another one disappears when it is done, the others stay.

    Args:
        name: what is done, such as ``"collecting"``.
        total: how many steps there will be, if that is known.
        unit: what is counted, such as ``"batch"``; without it and ``total`` only the time is shown.
        progress: whether bars are shown inside the block, as for :func:`shown`.
        **facts: what the log says at the end, besides the duration.

    Yields:
        The :class:`Phase`.

    Example:
        >>> with phase("adding", total=3, unit="number") as running:
        ...     for number in range(3):
        ...         running.advance()
        ...     running.note(result=3)
    """
    depth = _DEPTH.get()
    level = logging.DEBUG if depth else logging.INFO
    with shown(progress):
        LOGGER.debug("%s ...", name)
        bar, start = None, time.perf_counter()
        wanted = _SHOWN.get()
        if wanted or (wanted is None and sys.stderr.isatty()):
            bar_format = None if total else _UNTOLD if unit else _UNCOUNTED
            # leave=None: the outermost bar stays
            delay = 0.0 if wanted else _DELAY
            bar = tqdm(desc=name, total=total, unit=unit or "it", leave=None, bar_format=bar_format, delay=delay)
        running = Phase(name, bar)
        running.note(**facts)
        outcome = ""
        try:
            _DEPTH.set(depth + 1)
            yield running
        except GeneratorExit:  # a loop over track() was left
            outcome = ", ended early"
            raise
        except BaseException as error:
            outcome = f", ended by {type(error).__name__}"
            raise
        finally:
            _DEPTH.set(depth)
            if bar is not None:
                bar.close()
            if LOGGER.isEnabledFor(level):
                said = "".join(f", {key.replace('_', ' ')} {value}" for key, value in running.facts.items())
                LOGGER.log(level, "%s: %.2f s%s%s", name, time.perf_counter() - start, outcome, said)


def track(
    items: Iterable[T],
    name: str,
    total: int | None = None,
    *,
    unit: str = "it",
    progress: bool | None = None,
    **facts: Any,
) -> Iterator[T]:
    """Go through ``items`` in a :func:`phase` that counts them; use it in the head of a ``for``.

    Args:
        items: what is gone through.
        name: see :func:`phase`.
        total: default: the length of ``items``, if it has one.
        unit: what is counted.
        progress: see :func:`phase`.
        **facts: see :func:`phase`.

    Example:
        >>> [2 * number for number in track([1, 2], "doubling", unit="number")]
        [2, 4]
    """
    with phase(name, total or length_hint(items) or None, unit=unit, progress=progress, **facts) as running:
        done = 0
        try:
            for item in items:
                yield item
                running.advance()
                done += 1
        finally:
            running.note(**{"batches" if unit == "batch" else f"{unit}s": done})


def shows_progress(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """For methods of objects with an attribute ``_progress``, what :func:`shown` takes.

    Not for methods that warn: the place that a warning names would be this one.
    """

    @wraps(method)
    def wrapper(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        with shown(getattr(self, "_progress", None)):
            return method(self, *args, **kwargs)

    return wrapper
