"""Torch-Pruning's own pruners on our groups, for networks on which its search for groups fails or does not end."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from types import FunctionType, SimpleNamespace
from typing import Any

import torch_pruning as tp

from .graph.groups import Verifier
from .graph.label_graph import LabelGraph

__all__ = ["label_groups"]

_MUTABLE = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")
"""Arguments whose defaults are dictionaries that all pruners of a process share and write into."""

_OPTIONS: ContextVar[Mapping[str, Any] | None] = ContextVar("tp_importance.label_groups", default=None)


@contextmanager
def label_groups(
    *, verify: bool | Verifier = True, allow_stale: bool = False, progress: bool | None = None
) -> Iterator[None]:
    """Pruners of Torch-Pruning that are built inside the block work on :func:`~tp_importance.prunable_groups`.

    It is for networks on which Torch-Pruning's own search for coupled channels does not end, fails, or gives groups
    that break the network. ``BasePruner`` and all pruners derived from it, importances, sparse training, iterative and
    interactive steps, and the pruning history work as usual, inside the block and after it. Layers, forward functions,
    pruning functions, heads and parameters that the pruner is given count. Channels that cannot be removed safely, the
    outputs of the network among them, are not offered: ``pruner.DG.excluded`` says which, and why.

    Only this thread, and only the construction of pruners, is affected: ``tp.DependencyGraph`` is as before.

    Args:
        verify: compare masked and pruned copies, and leave out groups for which they differ, or ask a function
            that knows; see :func:`~tp_importance.prunable_groups`.
        allow_stale: also offer channels that layers read in training mode only.
        progress: show progress bars; by default in a terminal.

    Raises:
        ValueError: if a pruner is given ``prune_num_heads=True``: heads are units of the groups anyway.
        RuntimeError: if this version of Torch-Pruning builds its pruners in another way.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> with label_groups():
        ...     pruner = tp.pruner.BasePruner(net, torch.randn(1, 3, 8, 8), tp.importance.MagnitudeImportance())
        >>> pruner.step()
        >>> net[3].in_channels, [(e.name, e.reason) for e in pruner.DG.excluded]
        (4, [('3', "produces the network's output")])
    """
    token = _OPTIONS.set({"verify": verify, "allow_stale": allow_stale, "progress": progress})
    try:
        with _HOOK:
            yield
    finally:
        _OPTIONS.reset(token)


class _Hook:
    """The constructor of ``BasePruner``, exchanged for one of ours while any thread is inside a block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._original: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._original = tp.pruner.BasePruner.__init__
                tp.pruner.BasePruner.__init__ = _constructor(self._original)
            self._inside += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                tp.pruner.BasePruner.__init__ = self._original


_HOOK = _Hook()


def _constructor(original: Any) -> Any:
    """The constructor of ``BasePruner``, which asks :data:`_OPTIONS` whose groups to take.

    The code is Torch-Pruning's; only the name by which it reaches ``DependencyGraph`` means something else in it.
    """
    if not isinstance(original, FunctionType) or not {"dependency", "DependencyGraph"} <= set(
        original.__code__.co_names
    ):
        raise RuntimeError("label_groups knows Torch-Pruning 1.6, and this version builds its pruners in another way")
    signature = inspect.signature(original)

    @wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        options = _OPTIONS.get()
        if options is None:
            original(self, *args, **kwargs)
            return
        given = signature.bind(self, *args, **kwargs)
        if given.arguments.get("prune_num_heads"):
            raise ValueError(
                "prune_num_heads=True: inside label_groups whole heads are units like all others, which pruning_ratio "
                "takes; leave num_heads and prune_num_heads out, or pass num_heads alone for dimensions of all heads"
            )
        for name in _MUTABLE:
            given.arguments.setdefault(name, {})
        make = partial(
            LabelGraph,
            ignored_layers=given.arguments.get("ignored_layers"),
            num_heads=dict(given.arguments["num_heads"]),
            out_channel_groups=given.arguments["out_channel_groups"],
            **options,
        )
        names = {**original.__globals__, "dependency": SimpleNamespace(DependencyGraph=make)}
        ours = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
        ours.__kwdefaults__ = original.__kwdefaults__
        ours(*given.args, **given.kwargs)

    return constructor
