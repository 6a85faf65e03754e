"""Run a network and leave no trace of that: what a forward pass writes is put back."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .guards import HOOKS, Guard, preserved, writable

__all__ = ["generators_restored", "untouched"]

_LIBRARIES = {"numpy", "torch", *sys.stdlib_module_names}


class generators_restored(Guard):
    """Restore the global generators of random numbers, of Python, NumPy and torch, on every exit.

    Args:
        model: the network; on a GPU, the generators of its devices are restored.

    Example:
        >>> with generators_restored(nn.Linear(1, 1)):
        ...     a = torch.rand(2)
        >>> bool((a == torch.rand(2)).all())
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model = model

    def _note(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - a forward pass may draw from it
        tensors = (*self._model.parameters(), *self._model.buffers())
        devices = {t.device.index for t in tensors if t.device.type == "cuda"}
        self._torch = torch.random.fork_rng(devices=sorted(i for i in devices if i is not None))
        self._torch.__enter__()

    def _restore(self, failed: bool) -> None:
        try:
            self._torch.__exit__(None, None, None)
        finally:
            np.random.set_state(self._numpy)  # noqa: NPY002
            random.setstate(self._python)


class untouched(Guard):
    """Restore on every exit what forward passes of ``model`` can change besides its parameters' values.

    Modes, ``requires_grad`` and hooks come back as by :func:`~tp_importance.core.guards.preserved`. So do the
    attributes of all modules; what their lists, dicts, sets and plain objects hold; the values of buffers, of other
    tensors and arrays found there, and the states of the generators of random numbers, the global ones of Python,
    NumPy and torch among them. Objects that hold other objects are followed no further. Tensors are cloned: this
    costs the memory of the buffers once more.

    Made for passes that only look at the network; surgery needs :func:`~tp_importance.core.guards.preserved`.

    Args:
        model: the network.
        keep: buffers that are to keep the values they get.

    Yields:
        The same model.

    Example:
        >>> class Counts(nn.Module):
        ...     calls, seen = 0, None
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         self.seen = x
        ...         return x
        >>> net = Counts()
        >>> with untouched(net):
        ...     _ = net(torch.zeros(1))
        >>> net.calls, net.seen
        (0, None)
    """

    def __init__(self, model: nn.Module, keep: Iterable[Tensor] = ()) -> None:
        super().__init__(model)
        self._model, self._keep = model, list(keep)

    def _note(self) -> None:
        self._undo = _Memory(self._model, self._keep).undo
        self._others = ExitStack()
        self._others.enter_context(generators_restored(self._model))
        self._others.enter_context(preserved(self._model))

    def _restore(self, failed: bool) -> None:
        try:
            self._others.close()
        finally:
            for put_back in self._undo:
                put_back()


class _Memory:
    """What must be done to put everything back that hangs on a module."""

    def __init__(self, model: nn.Module, keep: Iterable[Tensor] = ()):
        self.undo: list[Callable[[], Any]] = []
        self._seen: dict[int, Any] = {id(t): t for t in keep}  # kept alive: their ids must stay theirs
        self._left: list[tuple[Any, bool]] = [(module, False) for module in model.modules()]
        while self._left:
            value, in_object = self._left.pop()
            if id(value) not in self._seen and not isinstance(value, nn.Parameter):
                self._seen[id(value)] = value
                self._remember(value, in_object)

    def _remember(self, value: Any, in_object: bool) -> None:
        if isinstance(value, Tensor):
            plain = not value.is_nested and value.layout == torch.strided and not value.is_meta
            if plain and writable(value):
                self.undo.append(partial(_put_values, value, value.detach().clone()))
        elif isinstance(value, nn.Module):
            attributes = vars(value)
            self.undo.append(partial(_put_items, attributes, list(attributes.items())))
            self._follow((v for k, v in attributes.items() if k not in HOOKS), in_object)
        elif isinstance(value, dict):
            self.undo.append(partial(_put_items, value, list(value.items())))
            self._follow(value.values(), in_object)
        elif isinstance(value, (list, deque)):
            self.undo.append(partial(_put_entries, value, list(value)))
            self._follow(value, in_object)
        elif isinstance(value, tuple):
            self._follow(value, in_object)
        elif isinstance(value, set):
            self.undo.append(partial(_put_members, value, set(value)))
        elif isinstance(value, np.ndarray):
            self.undo.append(partial(_put_array, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self.undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self.undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self.undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif _is_plain(value) and not in_object:
            self.undo.append(partial(_put_items, vars(value), list(vars(value).items())))
            self._follow(vars(value).values(), True)

    def _follow(self, values: Any, in_object: bool) -> None:
        self._left += [(v, in_object) for v in values if not isinstance(v, (int, float, str, bytes, type(None)))]


def _is_plain(value: Any) -> bool:
    """Whether it is an object of somebody's own class: those of libraries may hold locks, files and the like."""
    if isinstance(value, SimpleNamespace):
        return True
    known = type(value).__module__.split(".")[0] in _LIBRARIES
    return not known and not isinstance(value, type) and hasattr(value, "__dict__")


def _put_values(tensor: Tensor, values: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # the former alone turns gradients on
        if tensor.shape != values.shape:  # resized
            tensor.data = values
        elif not torch.equal(tensor, values):
            tensor.copy_(values)


def _put_items(items: dict[Any, Any], before: list[tuple[Any, Any]]) -> None:
    same = len(items) == len(before)
    if not same or any(k is not j or v is not w for (k, v), (j, w) in zip(items.items(), before, strict=True)):
        items.clear()
        items.update(before)


def _put_entries(entries: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(entries) != len(before) or any(a is not b for a, b in zip(entries, before, strict=True)):
        entries.clear()
        entries.extend(before)


def _put_members(members: set[Any], before: set[Any]) -> None:
    if members != before:
        members.clear()
        members.update(before)


def _put_array(array: np.ndarray, before: np.ndarray) -> None:
    if array.shape == before.shape and not np.array_equal(array, before):
        array[...] = before
