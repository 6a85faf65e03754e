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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .function_names import function_name

__all__ = ["NORMS", "STATISTICS", "CallCounter", "Kept", "KeptStatistics", "StatisticCall"]

NORMS = ("layer_norm", "rms_norm", "group_norm")
"""Functions that are norms as a whole."""
_REDUCTIONS = ("mean", "var", "std", "var_mean", "std_mean", "norm", "vector_norm", "linalg_vector_norm")
_OTHER = "another network"
STATISTICS = frozenset((*NORMS, *_REDUCTIONS, "normalize"))
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


class CallCounter:
    """Names the calls of functions by the module that runs."""

    def __init__(self) -> None:
        self._open: list[tuple[str, Counter[str]]] = [("", Counter())]

    def watch(self, model: nn.Module) -> Callable[[], None]:
        """Follow which module of a network runs; returns what takes the hooks out again."""

        def entering(name: str, _module: nn.Module, _args: Any) -> None:
            self.enter(name)

        def leaving(name: str, _module: nn.Module, _args: Any, _output: Any) -> None:
            self.leave(name)

        stack = ExitStack()
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(entering, name), prepend=True).remove)
            stack.callback(module.register_forward_hook(partial(leaving, name), always_call=True).remove)
        return stack.close

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
    """While it is active in a pass that its :attr:`calls` follow, statistics run over kept channels.

    Args:
        kept: per call; of other calls nothing changes.
        others: what a norm returns for the channels that are not kept: ``"zero"``, or ``"norm"``: what it would make of
            them with the statistics of the kept ones (of a norm group that goes as a whole, with its own).

    Example:
        >>> net, x = nn.Sequential(nn.LayerNorm(3)), torch.tensor([[1.0, 5.0, 3.0]])
        >>> kept = Kept(-1, torch.tensor([0, 2]), 3)
        >>> with KeptStatistics({StatisticCall("0", "layer_norm", 0): kept}).running(net):
        ...     net(x).detach().round()
        tensor([[-1.,  0.,  1.]])
    """

    def __init__(self, kept: Mapping[StatisticCall, Kept], *, others: Literal["zero", "norm"] = "zero") -> None:
        super().__init__()
        self.kept = dict(kept)
        self.calls = CallCounter()
        self._make = _over_kept if others == "zero" else _by_kept

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Active inside the block, for passes of a network; does nothing if there is nothing to do."""
        if not self.kept:
            yield
            return
        unwatch = self.calls.watch(model)
        try:
            with self:
                yield
        finally:
            unwatch()

    @contextmanager
    def apart(self, other: nn.Module) -> Iterator[None]:
        """Passes of another network inside the block take statistics over all channels."""
        enter = other.register_forward_pre_hook(lambda *_: self.calls.enter(_OTHER), prepend=True)
        leave = other.register_forward_hook(lambda *_: self.calls.leave(_OTHER), always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name not in STATISTICS:
            return func(*args, **kwargs)
        kept = self.kept.get(self.calls.call(name))
        return func(*args, **kwargs) if kept is None else self._make(func, name, kept, args, kwargs)


def _split(name: str, kept: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Any], Any]:
    """The tensor that a function is given, checked, and its other arguments."""
    rest, named = list(args), dict(kwargs)
    x: Tensor = rest.pop(0) if rest else named.pop("input")
    if x.dim() < -kept.axis or x.shape[kept.axis] != kept.width:
        raise RuntimeError(
            f"{name} is given {tuple(x.shape)} where the traced network had {kept.width} channels on axis {kept.axis}: "
            "the network takes another way than on its example inputs"
        )
    return x, rest, named


def _arguments(name: str, rest: list[Any], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a norm, behind the first, by name."""
    return dict(zip(_KEYS[name], rest, strict=False)) | named


def _over_kept(func: Any, name: str, kept: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function on kept channels."""
    x, rest, named = _split(name, kept, args, kwargs)
    at = kept.channels.to(x.device)
    small = x.index_select(kept.axis, at)
    if name not in (*NORMS, "normalize"):
        return func(small, *rest, **named)
    if name == "normalize":
        made = func(small, *rest, **named)
    elif name == "group_norm":
        given = _arguments(name, rest, named)
        given |= {key: given[key].index_select(0, at) for key in ("weight", "bias") if given.get(key) is not None}
        made = func(small, **{**given, "num_groups": kept.groups})
    else:
        given = _arguments(name, rest, named)
        given["normalized_shape"] = tuple(small.shape[-len(given["normalized_shape"]) :])
        for key in ("weight", "bias"):
            if given.get(key) is not None and given[key].dim() >= -kept.axis:
                given[key] = given[key].index_select(kept.axis, at)
        made = func(small, **given)
    return made.new_zeros(x.shape).index_copy(kept.axis % x.dim(), at, made)


def _by_kept(func: Any, name: str, kept: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a norm to all channels, with statistics of those that are kept."""
    if name not in (*NORMS, "normalize"):
        return _over_kept(func, name, kept, args, kwargs)
    x, rest, named = _split(name, kept, args, kwargs)
    given, at = _arguments(name, rest, named), kept.channels.to(x.device)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    small = wide.index_select(kept.axis, at)
    weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps")
    if name == "normalize":
        length = small.norm(given.get("p", 2.0), given.get("dim", 1), keepdim=True)
        made = wide / length.clamp_min(1e-12 if eps is None else eps)
    elif name == "rms_norm":
        dims = tuple(range(-len(given["normalized_shape"]), 0))
        eps = torch.finfo(wide.dtype).eps if eps is None else eps  # torch computes halves in float32, this too
        made = wide * torch.rsqrt(small.square().mean(dims, keepdim=True) + eps)
    elif name == "layer_norm":
        dims = tuple(range(-len(given["normalized_shape"]), 0))
        variance, mean = torch.var_mean(small, dims, correction=0, keepdim=True)
        made = (wide - mean) * torch.rsqrt(variance + (1e-5 if eps is None else eps))
    else:
        made = _group_norm(wide, at, given["num_groups"], 1e-5 if eps is None else eps)
        shape = (-1, *[1] * (x.dim() - 2))
        weight, bias = (None if t is None else t.view(shape) for t in (weight, bias))
    made = made if weight is None else made * weight
    made = made if bias is None else made + bias
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return made.to(func(x, *rest, **named).dtype if autocast else x.dtype)  # devices differ in what they make of it


def _group_norm(x: Tensor, kept: Tensor, groups: int, eps: float) -> Tensor:
    """Group norm without weights, (N, C, ...), with statistics of the kept channels of every group that has any."""
    counts = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device).index_fill(0, kept, 1.0).view(groups, -1)
    counts = torch.where(counts.any(1, keepdim=True), counts, 1.0)[None, :, :, None]
    rows = x.reshape(len(x), groups, counts.shape[2], -1)
    number = counts.sum(2, keepdim=True) * rows.shape[3]
    centred = rows - (rows * counts).sum((2, 3), keepdim=True) / number
    variance = (centred.square() * counts).sum((2, 3), keepdim=True) / number
    return (centred * torch.rsqrt(variance + eps)).view(x.shape)


_KEYS = {
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("normalized_shape", "weight", "eps"),
    "group_norm": ("num_groups", "weight", "bias", "eps"),
    "normalize": ("p", "dim", "eps"),
}
