"""Several processes of ``torch.distributed``: what each finds out from its own data differs from the others'."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["levels_up", "process_count", "warn_of_processes", "warned_once"]

_warned: ContextVar[list[bool] | None] = ContextVar("_warned", default=None)

_OURS = ("tp_importance", "nni_plugins")


def process_count() -> int:
    """Number of processes of ``torch.distributed``, 1 if it is not in use.

    Example:
        >>> process_count()
        1
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


@contextmanager
def warned_once() -> Iterator[None]:
    """Around a call, also as its decorator: what passes over the data it takes, :func:`warn_of_processes` warns once.

    Example:
        >>> with warned_once():
        ...     warn_of_processes("batches")
    """
    token = _warned.set([]) if _warned.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _warned.reset(token)


def warn_of_processes(what: str) -> None:
    """Warn if there are several processes: nothing here is exchanged between them.

    Args:
        what: what each of them takes for itself, in the plural.

    Warns:
        UserWarning: naming the two ways out; once inside :func:`warned_once`.
    """
    count, warned = process_count(), _warned.get()
    if count == 1 or warned:
        return
    if warned is not None:
        warned.append(True)
    warnings.warn(
        f"torch.distributed runs {count} processes, and each takes its own {what}: with others it gets another "
        "network, without an error. Prune in one process before the network is wrapped; or give every process the same "
        "batches, and afterwards the weights of one: torch.distributed.broadcast of every tensor in model.state_dict()",
        stacklevel=levels_up(),
    )


def levels_up() -> int:
    """``stacklevel`` for :func:`warnings.warn`: the first caller outside of this package, whatever lies between."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__")).split(".")[0]
        if name not in (*_OURS, "contextlib", "torch", "tqdm"):
            break
        level, frame = level + 1, frame.f_back
    return level
