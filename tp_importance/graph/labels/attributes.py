"""Whole numbers that a module keeps and its code slices by: they carry their name through one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..function_names import function_name
from ..kept_statistics import STATISTICS, CallCounter, StatisticCall

__all__ = ["Named", "WatchedSizes", "named_sizes"]


_WIDTHS = ("in_channels", "out_channels", "in_features", "out_features", "num_features")
"""Of torch's own layers; surgery keeps them up to date."""


_OF_NORMS = ("normalized_shape", "num_groups")


class Named(int):
    """A whole number that knows which attribute it was computed from.

    Attributes:
        origin: name of the attribute, its value, and whether surgery keeps it up to date.
        parts: numbers that it is the sum of.
    """

    origin: tuple[str, int, bool]
    parts: tuple[Named, ...] = ()

    @classmethod
    def of(cls, value: int, name: str, start: int, kept: bool) -> Named:
        """``value``, computed from attribute ``name``, whose own value is ``start``.

        Args:
            value: the number.
            name: qualified name of the attribute.
            start: its value.
            kept: whether surgery of the layer that it belongs to keeps it up to date.
        """
        new = cls(value)
        new.origin = (name, start, kept)
        return new

    def _computed(self, value: Any) -> Any:
        return Named.of(value, *self.origin) if type(value) is int else value


def _carrying(name: str) -> Callable[..., Any]:
    plain = getattr(int, f"__{name}__")

    def method(self: Named, other: Any) -> Any:
        made = self._computed(plain(self, other))
        if name in ("add", "radd") and isinstance(made, Named) and isinstance(other, Named):
            made.parts = (self, other)
        return made

    return method


for _name in ("mul", "rmul", "floordiv", "add", "radd", "sub", "rsub"):
    setattr(Named, f"__{_name}__", _carrying(_name))


@contextmanager
def named_sizes(model: nn.Module) -> Iterator[None]:
    """Inside the block the whole numbers that modules keep are :class:`Named`; of torch's own layers, their widths.

    Args:
        model: the network; as before afterwards.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            layer = type(module).__module__.startswith("torch.nn.")
            for key, value in list(vars(module).items()):
                if key.startswith("_") or (layer and key not in (*_WIDTHS, *_OF_NORMS)):
                    continue
                new = _named(value, f"{path}.{key}".lstrip("."), layer and not _follows_alone(module, key))
                if new is not value:
                    before.append((vars(module), key, value))
                    vars(module)[key] = new
        yield
    finally:
        for attributes, key, value in before:
            if type(attributes.get(key)) in (Named, list, tuple):
                attributes[key] = value


def _follows_alone(module: Any, key: str) -> bool:
    """Whether no pruning function sets a number of a norm: they do where it has one weight per channel."""
    return key == "num_groups" or (
        key == "normalized_shape" and (module.weight is None or len(module.normalized_shape) > 1)
    )


def _named(value: Any, name: str, kept: bool) -> Any:
    if type(value) is int and value > 1:
        return Named.of(value, name, value, kept)
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(_named(v, f"{name}.{i}", kept) for i, v in enumerate(value))
    return value


class WatchedSizes(TorchFunctionMode):
    """Looks at the function that runs.

    Attributes:
        function: its name, ``""`` outside of functions.
        sizes: the :class:`Named` numbers among its arguments.
        calls: numbers the calls of functions that take statistics; whoever watches the modules tells it which one runs.
        statistic: the name of the call, if the function takes statistics.
        shape: that the function is told to give to a tensor, one number per axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.function, self.sizes = "", list[Named]()
        self.calls = CallCounter()
        self.statistic: StatisticCall | None = None
        self.shape: Sequence[Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.function = function_name(func)
        self.sizes = list(_sizes_in((args, kwargs)))
        self.statistic = self.calls.call(self.function) if self.function in STATISTICS else None
        self.shape = _shape(self.function, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self.function, self.sizes, self.statistic, self.shape = "", [], None, None


def _shape(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any] | None:
    """The shape among the arguments of ``view``, ``reshape`` and ``unflatten``, one entry per axis; ``None``: any."""
    if function == "unflatten":
        dim, sizes = [*args[1:], *(kwargs[k] for k in ("dim", "sizes") if k in kwargs)][:2]
        return [None] * (dim % args[0].dim()) + list(sizes) if isinstance(dim, int) else None
    if function not in ("view", "reshape"):
        return None
    given = args[1:] or (kwargs.get("shape") or kwargs.get("size") or (),)
    return given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def _sizes_in(value: Any) -> Iterator[Named]:
    if isinstance(value, Named):
        yield from _sizes_in(value.parts) if value.parts else (value,)
    elif isinstance(value, torch.Tensor):
        return
    elif isinstance(value, dict):
        for part in value.values():
            yield from _sizes_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _sizes_in(part)
    elif isinstance(value, slice):
        for part in (value.start, value.stop, value.step):
            yield from _sizes_in(part)
