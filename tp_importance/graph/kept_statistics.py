"""Statistics over channels (mean, variance, norm) that a masked network takes over the channels that are kept.

A channel that is removed in front of a layer norm changes the statistics of all others. So *masked* means: every
statistic over channels runs over those that are left. The passes are counted as follows. While a network runs, every
call of a function of :data:`STATISTICS` has a name: the module that runs, the function, and how many calls of it that
module has made before. The pass with labels writes down which channels a call runs over; later passes find it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["STATISTICS", "CallCounter", "Kept", "KeptStatistics", "StatisticCall", "function_name"]

_NORMS = ("layer_norm", "rms_norm", "group_norm")
_REDUCTIONS = ("mean", "var", "std", "var_mean", "std_mean", "norm", "vector_norm", "linalg_vector_norm")
STATISTICS = frozenset((*_NORMS, *_REDUCTIONS, "normalize"))
"""Functions of torch, by name, that may run over the kept channels alone."""


class StatisticCall(NamedTuple):
    """A call of a function that takes statistics.

    Attributes:
        module: that runs, by qualified name.
        function: name of the function.
        number: how many calls of it this run of the module has made before.
    """

    module: str
    function: str
    number: int

    def __str__(self) -> str:
        return f"{self.function} in {self.module or 'the network'}"


def function_name(func: Any) -> str:
    """What a function of torch is called, without underscores around it."""
    return getattr(func, "__name__", str(func)).strip("_")


class CallCounter:
    """Names the calls of functions by the module that runs."""

    def __init__(self) -> None:
        self._open: list[tuple[str, Counter[str]]] = [("", Counter())]

    def enter(self, module: str) -> None:
        """A module begins to run."""
        if not module:  # the network itself: whatever an earlier pass left behind, by an exception, does not count
            self._open = []
        self._open.append((module, Counter()))

    def leave(self, module: str) -> None:
        """A module has run."""
        while len(self._open) > 1 and self._open[-1][0] != module:  # left by an exception that somebody caught
            self._open.pop()
        if len(self._open) > 1:
            self._open.pop()

    def call(self, function: str) -> StatisticCall:
        """The name of a call that begins."""
        module, counts = self._open[-1] if self._open else ("", Counter())
        counts[function] += 1
        return StatisticCall(module, function, counts[function] - 1)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a statistic runs over.

    Attributes:
        axis: of the channels in the function's first argument, counted from the end.
        channels: that are kept, ascending, shape (k,), on the CPU.
        width: of the axis.
        groups: norm groups of which something is kept, for ``group_norm``.
    """

    axis: int
    channels: Tensor
    width: int
    groups: int = 1


class KeptStatistics(TorchFunctionMode):
    """While it is active in a pass that :meth:`watch` follows, statistics run over kept channels.

    What a norm returns for the other channels is zero.

    Args:
        kept: per call; of other calls nothing changes.

    Example:
        >>> net, x = nn.Sequential(nn.LayerNorm(3)), torch.tensor([[1.0, 5.0, 3.0]])
        >>> kept = Kept(-1, torch.tensor([0, 2]), 3)
        >>> with KeptStatistics({StatisticCall("0", "layer_norm", 0): kept}).running(net):
        ...     net(x).round()
        tensor([[-1.,  0.,  1.]])
    """

    def __init__(self, kept: Mapping[StatisticCall, Kept]) -> None:
        super().__init__()
        self.kept = dict(kept)
        self._calls = CallCounter()

    def watch(self, model: nn.Module) -> Callable[[], None]:
        """Follow which module runs; returns what takes the hooks out again."""
        stack = ExitStack()
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(self._enter, name), prepend=True).remove)
            stack.callback(module.register_forward_hook(partial(self._leave, name), always_call=True).remove)
        return stack.close

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Active inside the block, for passes of a network; does nothing if there is nothing to do."""
        if not self.kept:
            yield
            return
        unwatch = self.watch(model)
        try:
            with self:
                yield
        finally:
            unwatch()

    def _enter(self, name: str, _module: nn.Module, _args: Any) -> None:
        self._calls.enter(name)

    def _leave(self, name: str, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._calls.leave(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name not in STATISTICS:
            return func(*args, **kwargs)
        kept = self.kept.get(self._calls.call(name))
        return func(*args, **kwargs) if kept is None else _over_kept(func, name, kept, args, kwargs)


def _over_kept(func: Any, name: str, kept: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function on kept channels."""
    rest, named = list(args), dict(kwargs)
    x: Tensor = rest.pop(0) if rest else named.pop("input")
    if x.dim() < -kept.axis or x.shape[kept.axis] != kept.width:
        raise RuntimeError(
            f"{name} is given {tuple(x.shape)} where the traced network had {kept.width} channels on axis {kept.axis}: "
            "the network takes another way than on its example inputs"
        )
    at = kept.channels.to(x.device)
    small = x.index_select(kept.axis, at)
    if name not in (*_NORMS, "normalize"):
        return func(small, *rest, **named)
    if name == "normalize":
        made = func(small, *rest, **named)
    elif name == "group_norm":
        given = dict(zip(("num_groups", "weight", "bias", "eps"), rest, strict=False)) | named
        given |= {key: given[key].index_select(0, at) for key in ("weight", "bias") if given.get(key) is not None}
        made = func(small, **{**given, "num_groups": kept.groups})
    else:
        keys = ("normalized_shape", "weight", "bias", "eps") if name == "layer_norm" else _RMS
        given = dict(zip(keys, rest, strict=False)) | named
        given["normalized_shape"] = tuple(small.shape[-len(given["normalized_shape"]) :])
        for key in ("weight", "bias"):
            if given.get(key) is not None and given[key].dim() >= -kept.axis:
                given[key] = given[key].index_select(kept.axis, at)
        made = func(small, **given)
    return made.new_zeros(x.shape).index_copy(kept.axis % x.dim(), at, made)


_RMS = ("normalized_shape", "weight", "eps")
