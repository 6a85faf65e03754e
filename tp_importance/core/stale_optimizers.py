"""Warn when an optimizer trains parameters that pruning has replaced.

Surgery makes new parameters. An optimizer that was built before goes on with the old ones, which no network reads any
more: the loss may even fall, for what was not replaced is still trained, but the pruned layers stand still, and nothing
says so. So whoever replaces parameters notes the old ones (:func:`replacing`), and a hook that torch calls before every
step of every optimizer looks for them.

It is cheap: the hook is installed by the first surgery of the process; it looks at the parameters of an optimizer once
after each surgery, at every other step at a number. The old parameters are only referred to weakly: nothing is kept
alive, and what nobody holds is forgotten. An optimizer that was given the new parameters, as
:meth:`tp_importance.PSAPPruner.finish` does, holds nothing that was noted.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["replacing"]

SHOWN = 3
"""How many names the warning lists."""


class _Replaced:
    """The parameters that surgeries have replaced and somebody still holds."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._looked_at: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._surgeries = 0

    def add(self, parameters: dict[str, nn.Parameter], owner: str) -> None:
        if not self._surgeries:
            register_optimizer_step_pre_hook(self.look)
        self._surgeries += 1
        # not by callbacks of the references: Ctrl-C inside one would be lost
        self._names = {key: entry for key, entry in self._names.items() if entry[0]() is not None}
        for name, parameter in parameters.items():
            self._names[id(parameter)] = weakref.ref(parameter), f"{owner}.{name}"

    def name(self, parameter: Tensor) -> str | None:
        """What a replaced parameter was called; ``None`` for one that is in use."""
        reference, name = self._names.get(id(parameter), (None, ""))
        return name if reference is not None and reference() is parameter else None

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        """The hook."""
        if torch.compiler.is_compiling() or self._looked_at.get(optimizer) == self._surgeries:
            return
        self._looked_at[optimizer] = self._surgeries
        held = [p for group in optimizer.param_groups for p in group["params"]]
        dead = [name for name in map(self.name, held) if name is not None]
        if dead:
            listed = ", ".join(dead[:SHOWN]) + (", ..." if len(dead) > SHOWN else "")
            warnings.warn(
                f"{type(optimizer).__name__} trains {len(dead)} of {len(held)} parameters that pruning has replaced "
                f"({listed}): the pruned layers learn nothing. It was built before the pruning; build it afterwards, "
                f"e.g. {type(optimizer).__name__}(model.parameters(), ...)",
                stacklevel=3,
            )


_REPLACED = _Replaced()
_INSIDE: ContextVar[bool] = ContextVar("tp_importance.replacing", default=False)


@contextmanager
def replacing(model: nn.Module, owner: str | None = None) -> Iterator[None]:
    """Note the parameters of ``model`` that the block replaces or removes; nothing if it raises.

    Inside another such block nothing is noted: that one sees the result, or puts the old parameters back.

    Args:
        model: the network.
        owner: what the warning calls it; default: its type.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with replacing(net):
        ...     net.weight = nn.Parameter(net.weight.detach()[:, :2])
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     optimizer.step()
        >>> str(caught[0].message).partition(":")[0]
        'SGD trains 1 of 2 parameters that pruning has replaced (Linear.weight)'
    """
    if _INSIDE.get():
        yield
        return
    before = dict(model.named_parameters())
    _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.set(False)
    now = {id(p) for p in model.parameters()}
    gone = {name: p for name, p in before.items() if id(p) not in now}
    if gone:
        _REPLACED.add(gone, owner or type(model).__name__)
