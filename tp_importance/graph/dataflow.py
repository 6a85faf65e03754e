"""Which operation reads which tensor in one forward pass, whether layers are modules or functions.

Torch-Pruning's graph says which channels belong together; to take a layer out, or to move a factor from one layer into
the next, one must also know what lies between: adds, pools, activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..core.batches import tensors_in
from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched
from .function_names import function_name
from .layer_kinds import CONV

__all__ = [
    "Flow",
    "Kind",
    "Op",
    "Span",
    "is_batchnorm",
    "is_question",
    "made_tensors",
    "record",
    "watched_modules",
]

Kind = Literal["layer", "relu", "same", "homogeneous", "add", "cat", "other"]

_BATCHNORM = {nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward}
_RELU = {"relu", "leaky_relu"}
_SAME = {"clone", "contiguous", "detach", "to", "float", "double", "half", "bfloat16", "type", "alias"}
_POOLS = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for n in (1, 2, 3)}
_HOMOGENEOUS = {
    *_POOLS,
    *("mean", "sum", "amax", "interpolate", "upsample", "neg", "flip", "roll", "repeat", "expand", "narrow", "select"),
    *("flatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "transpose", "movedim", "unflatten"),
    *("getitem", "chunk", "split", "unbind", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
_ADD = {"add", "radd", "iadd"}
_SCALED = {"mul", "rmul", "imul"}
_DIVIDED = {"div", "truediv", "itruediv"}
_CAT = {"cat", "concat", "concatenate"}
_POSITIVE = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "square", "exp"}
_QUESTIONS = {
    *("dim", "size", "get", "numel", "nelement", "ndimension", "stride", "len", "is_contiguous", "is_floating_point"),
    *("is_complex", "element_size", "get_device", "storage_offset", "requires_grad_", "set", "hash"),
}
"""What may be asked of a tensor without reading its values."""


@dataclass(frozen=True, eq=False)
class Op:
    """One operation.

    Attributes:
        name: qualified name of the module for a layer, else the function, without underscores.
        module: the layer, or ``None`` for a function.
        inputs: the tensors it reads, in order.
        outputs: the tensors it makes; in-place results count as new tensors.
        args: positional and keyword arguments; a tensor stands there as its :class:`Value`.
        written: tensors that it changes in place, among them others in the same memory.
        seen: whether it is one operation; ``False`` for all that a scripted function, say, does out of sight.
    """

    name: str
    module: nn.Module | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    fixed: Kind | None = None
    written: tuple[int, ...] = ()
    seen: bool = True

    @property
    def kind(self) -> Kind:
        """What it does to a positive factor on its input.

        ``relu`` is the identity for x ≥ 0; with ``same`` and ``homogeneous`` it lets a factor pass: f(r x) = r f(x).
        """
        if self.fixed is not None:
            return self.fixed
        if self.name in _SAME:
            return "same"
        if self.name in _RELU:
            return "relu"
        if self.name in _HOMOGENEOUS:
            return "homogeneous"
        if self.name == "pad" and not self.argument(3, "value", 0):
            return "homogeneous"
        if self.name in _SCALED and len(self.inputs) == 1 and (self.number or 0) > 0:
            return "homogeneous"
        if self.name in _DIVIDED and len(self.inputs) == 1 and isinstance(self.args[0], Value) and not self.kwargs:
            return "homogeneous" if (self.number or 0) > 0 else "other"
        if self.name in _ADD and not self.kwargs:
            return "add" if len(self.inputs) > 1 else "same" if self.number == 0 else "other"
        if self.name in _CAT and self.argument(1, "dim", 0) == 1:
            return "cat"
        return "other"

    @property
    def number(self) -> float | None:
        """The one Python number among the arguments, if there is one."""
        found = [a for a in self.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        return float(found[0]) if len(found) == 1 else None

    def argument(self, position: int, name: str, default: Any) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Value:
    """A tensor in :attr:`Op.args`."""

    id: int


@dataclass(frozen=True, eq=False)
class Span:
    """One call of a module that is no layer itself.

    Attributes:
        name: qualified name.
        inputs: tensors it was given.
        outputs: tensors it returned.
        ops: positions of the operations it ran, as a half-open range.
        plain: whether it was called with one tensor and nothing else, and returned one tensor.
    """

    name: str
    module: nn.Module
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ops: range
    plain: bool = True


@dataclass(frozen=True, eq=False)
class Flow:
    """Everything that ran, in order.

    Attributes:
        ops: the operations.
        spans: calls of modules that are no layers.
        shapes: shape of every tensor.
        outputs: tensors the network returned.
        calls_of_model: how often the network itself was called.
    """

    ops: list[Op]
    spans: list[Span]
    shapes: list[tuple[int, ...]]
    outputs: tuple[int, ...]
    calls_of_model: int = 1

    @cached_property
    def maker(self) -> dict[int, Op]:
        """The operation that made a tensor; inputs of the network and parameters have none."""
        return {v: op for op in self.ops for v in op.outputs}

    @cached_property
    def consumers(self) -> dict[int, list[Op]]:
        """The operations that read a tensor."""
        found: dict[int, list[Op]] = {}
        for op in self.ops:
            for v in dict.fromkeys(op.inputs):
                found.setdefault(v, []).append(op)
        return found

    @cached_property
    def nonnegative(self) -> list[bool]:
        """For every tensor whether it is ≥ 0 whatever the data."""
        known = [False] * len(self.shapes)
        for op in self.ops:
            inputs = bool(op.inputs) and all(known[v] for v in op.inputs)
            free = op.module is None and op.fixed is None
            positive = op.name in _POSITIVE and free
            if op.name in ("hardtanh", "clamp", "clamp_min", "threshold") and free:
                low = op.argument(1, "min", None) if op.name != "hardtanh" else op.argument(1, "min_val", -1.0)
                positive = op.name != "threshold" and isinstance(low, (int, float)) and low >= 0
            keeps = op.kind in ("relu", "same", "add", "cat", "homogeneous") and op.name != "neg"
            if op.name in ("interpolate", "upsample") and op.argument(3, "mode", "nearest") == "bicubic":
                keeps = False
            for v in op.outputs:
                known[v] = positive or (keeps and inputs)
        return known

    def calls(self, module: nn.Module) -> list[Op]:
        """All calls of a layer."""
        return [op for op in self.ops if op.module is module]


def is_batchnorm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a batch norm with fixed statistics in eval mode; torchvision's frozen one counts.

    A subclass that does more, such as timm's with an activation inside, does not.
    """
    known = getattr(type(module), "forward", None) in _BATCHNORM or type(module).__name__ == "FrozenBatchNorm2d"
    return known and getattr(module, "running_mean", None) is not None


def record(
    model: nn.Module,
    example_inputs: Any,
    *,
    layers: Mapping[type[nn.Module], Kind] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    within: bool = False,
) -> Flow:
    """Run ``model`` once in eval mode without gradients and write down what reads what; nothing is changed.

    Any Python control flow will do: the path taken by the example inputs is recorded.

    Args:
        model: the network.
        example_inputs: tensor, tuple of positional or dict of keyword arguments, batch dimension first.
        layers: further module types that count as one operation, besides convolutions, linear layers and batch norms,
            and what kind of operation they are.
        forward_fn: ``forward_fn(model, example_inputs)``; default calls the model.
        within: leave out what ``forward_fn`` does outside of the calls of the model; the outputs are those of its last
            call, and :attr:`Flow.calls_of_model` says how many there were.

    Returns:
        The :class:`Flow`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
        >>> [(op.name, op.kind) for op in record(net, torch.zeros(1, 3, 8, 8)).ops]
        [('0', 'layer'), ('relu', 'relu'), ('flatten', 'homogeneous')]
    """
    recorder, inputs = _Recorder(running=not within), fresh_inputs(example_inputs)
    with untouched(model), torch.no_grad(), ExitStack() as stack:
        model.eval()
        for name, module, kind in watched_modules(model, layers or {}):
            recorder.watch(stack, name, module, kind)
        recorder.watch_model(stack, model, within)
        stack.enter_context(recorder)
        output = (forward_fn or call_model)(model, inputs)
    outputs = tuple(recorder.value(t) for t in (recorder.returned if within else tensors_in(output)))
    shapes = [tuple(t.shape) for t in recorder.tensors]
    return Flow(recorder.ops, recorder.spans, shapes, outputs, recorder.calls)


def watched_modules(
    model: nn.Module, layers: Mapping[type[nn.Module], Kind]
) -> Iterator[tuple[str, nn.Module, Kind | None]]:
    """Modules to watch; those with a kind are one operation, whatever is inside."""
    known: dict[type[nn.Module], Kind] = {**dict.fromkeys((*CONV, nn.Linear), "layer"), **layers}
    whole: list[str] = []
    for name, module in model.named_modules():
        if name and not any(name.startswith(f"{layer}.") for layer in whole):
            kind = next((k for cls, k in known.items() if isinstance(module, cls)), None)
            kind = "layer" if kind is None and is_batchnorm(module) else kind
            if kind is not None:
                whole.append(name)
            yield name, module, kind


def made_tensors(name: str, given: list[Tensor], output: Any) -> list[Tensor]:
    """Tensors that a function has made or filled."""
    return [given[0]] if name == "setitem" else tensors_in(output)


def is_question(name: str, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether nothing was computed from tensors."""
    return not given or (not made and name in _QUESTIONS)


class _Recorder(TorchFunctionMode):
    def __init__(self, running: bool = True) -> None:
        super().__init__()
        self.running, self.calls, self.returned = running, 0, list[Tensor]()
        self.ops: list[Op] = []
        self.spans: list[Span] = []
        self.tensors: list[Tensor] = []  # kept alive: their ids must stay theirs
        self._value: dict[int, int] = {}
        self._open: list[tuple[tuple[int, ...], int]] = []
        self._depth = 0

    def value(self, tensor: Tensor, *, new: bool = False) -> int:
        if new or id(tensor) not in self._value:
            self._value[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._value[id(tensor)]

    def watch_model(self, stack: ExitStack, model: nn.Module, within: bool) -> None:
        """Count the calls of the network and, if asked for, run only within them."""

        def before(_module: nn.Module, _args: Any) -> None:
            self.calls += 1
            if within:
                self.running = True

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self.returned = tensors_in(output)
            if within:
                self.running = False

        stack.callback(model.register_forward_pre_hook(before, prepend=True).remove)
        stack.callback(model.register_forward_hook(after).remove)

    def watch(self, stack: ExitStack, name: str, module: nn.Module, kind: Kind | None) -> None:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.running:
                return
            self._open.append((tuple(self.value(t) for t in tensors_in((args, kwargs))), len(self.ops)))
            self._depth += kind is not None

        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self.running:
                return
            inputs, first = self._open.pop()
            self._depth -= kind is not None
            if kind is not None:
                outputs = tuple(self.value(t, new=True) for t in tensors_in(output))
                self.ops.append(Op(name, module, inputs, outputs, fixed=kind))
                return
            unseen = [t for t in tensors_in(output) if id(t) not in self._value]
            if unseen and not self._depth:  # made out of sight, by a scripted function say
                made = tuple(self.value(t) for t in unseen)
                self.ops.append(Op(f"{name} (not seen)", None, inputs, made, fixed="other", seen=False))
            outputs = tuple(self.value(t) for t in tensors_in(output))
            plain = len(args) == len(inputs) == 1 and not kwargs and isinstance(args[0], Tensor)
            plain = plain and isinstance(output, Tensor)
            self.spans.append(Span(name, module, inputs, outputs, range(first, len(self.ops)), plain))

        stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._depth or not self.running:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        inputs = tuple(self.value(t) for t in given)
        named = tree_map_only(Tensor, lambda t: Value(self.value(t)), (args, kwargs))
        output = func(*args, **kwargs)
        name = function_name(func)
        made = made_tensors(name, given, output)
        if is_question(name, given, made):
            return output
        fixed: Kind | None = None
        if "dropout" in name and len(made) == 1 and torch.equal(made[0], given[0]):
            fixed = "same"  # in eval mode: says so only by what it returns
        elif not made or (name in _SAME and not all(t.is_floating_point() for t in made)):
            fixed = "other"  # a number, float(x) say
        changed = [t for t in made if name not in _SAME and fixed is None and any(t is x for x in given)]
        aliases = self._aliases(changed)
        if aliases or name == "setitem":
            fixed = "other"
        if fixed == "same" and (kwargs.get("inplace") or args[3:4] == (True,)):
            changed = made  # by a dropout in train mode
        written = tuple(self.value(t) for t in (*changed, *aliases))
        outputs = tuple(self.value(t, new=True) for t in (*made, *aliases))
        self.ops.append(Op(name, None, inputs, outputs, named[0], named[1], fixed, written))
        return output

    def _aliases(self, changed: list[Tensor]) -> list[Tensor]:
        """What else an operation in place has changed: tensors in the same memory."""
        if not changed:
            return []
        places = {t.untyped_storage().data_ptr() for t in changed}
        known = {id(t): t for t in self.tensors if not any(t is other for other in changed)}
        return [t for t in known.values() if t.untyped_storage().data_ptr() in places]
