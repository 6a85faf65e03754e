"""Statistics over kept channels whenever a network runs, also in part, as activation checkpointing does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.overrides import _get_current_function_mode, _pop_mode

from .kept_statistics import Kept, KeptStatistics, StatisticCall

__all__ = ["GatedStatistics"]


class GatedStatistics:
    """Lets statistics over channels run over those that are kept, until :meth:`remove`.

    Unlike :meth:`.KeptStatistics.running` it needs no block around the passes: hooks on the modules that take the
    statistics turn it on while these run, and hooks on the modules inside of them keep the numbers of the calls right.
    So it also holds where backward passes run single modules again. Other modules bear no hooks, and nothing happens
    where all channels are kept. Norms apply to all channels, so that gates behind them feel what a masked one would do.

    A statistic in the code of a module counts while that module runs: checkpoint modules, not functions that take
    statistics and that a module calls. (Without reentry torch notices that: it saves other tensors than at first.)

    Args:
        model: the network.
        calls: that may change.

    Attributes:
        kept: per call; of other calls nothing changes. May be replaced between passes.
    """

    def __init__(self, model: nn.Module, calls: Iterable[StatisticCall]) -> None:
        self.kept: Mapping[StatisticCall, Kept] = {}
        self._hooks = ExitStack()
        owners = {call.module for call in calls}
        for name, module in model.named_modules():
            inside = any(name == owner or not owner or name.startswith(f"{owner}.") for owner in owners)
            if inside or (owners and not name):
                before, after = self._before(name), self._after(name)
                self._hooks.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                self._hooks.callback(module.register_forward_hook(after, always_call=True).remove)

    def remove(self) -> None:
        """Take the hooks out."""
        self.kept = {}
        self._drop()
        self._hooks.close()

    # Hooks are closures, so that copies of the model share this object.

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            if not name:  # an interrupt may have left something
                self._drop()
            running = _active().get(id(self))
            if running is None:
                if not self.kept:
                    return
                running = _active()[id(self)] = _Running(self.kept)
                running.__enter__()
            running.enter(name)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            running = _active().get(id(self))
            if running is not None and running.left(name):
                self._drop()

        return hook

    def _drop(self) -> None:
        running = _active().pop(id(self), None)
        if running is not None:
            running.kept = {}  # should another mode lie above
            if _get_current_function_mode() is running:
                _pop_mode()


def _active() -> dict[int, _Running]:
    """What runs in this thread, by the id of the :class:`GatedStatistics`; autograd has threads of its own."""
    if not hasattr(_THREAD, "active"):
        _THREAD.active = {}
    active: dict[int, _Running] = _THREAD.active
    return active


_THREAD = threading.local()


class _Running(KeptStatistics):
    """Is active while some module runs.

    Args:
        kept: per call.
    """

    def __init__(self, kept: Mapping[StatisticCall, Kept]) -> None:
        super().__init__(kept, others="norm")
        self._names: list[str] = []

    def enter(self, name: str) -> None:
        """A module begins to run."""
        self._names.append(name)
        self.calls.enter(name)

    def left(self, name: str) -> bool:
        """A module has run; whether it was the outermost one."""
        if name in self._names:  # else it raised before the hook that enters
            self.calls.leave(name)
            while self._names.pop() != name:
                pass
        return not self._names
