"""Multiply-accumulates of functions that read parameters: what no hook on a layer sees."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.weak import WeakIdKeyDictionary

from ..core.batches import tensors_in

__all__ = ["Operations"]

Macs = Callable[..., int]

_ADDED = ("addmm", "addmv", "baddbmm")
"""Products that are added to the first argument."""


def _conv(out: Tensor, _input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight[0].numel()


def _conv_transpose(_out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return input.numel() * weight[0].numel()


def _linear(out: Tensor, _input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight.shape[-1]


def _product(out: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * left.shape[-1]


def _product_from_right(out: Tensor, _right: Tensor, left: Tensor, **__: Any) -> int:
    return out.numel() * left.shape[-1]


def _sum_and_product(out: Tensor, _added: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * left.shape[-1]


def _contraction(out: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * math.isqrt(left.numel() * right.numel() // max(out.numel(), 1))


def _einsum(out: Tensor, equation: str, *operands: Any, **__: Any) -> int:
    """The product of the sizes of all indices, for two operands."""
    given = _operands_of((equation, *operands))
    sizes: dict[str, int] = {}
    for term, tensor in zip(equation.replace(" ", "").split("->")[0].split(","), given, strict=True):
        front, _, back = term.partition("...") if "..." in term else (term, "", "")
        inner = tensor.shape[len(front) : tensor.dim() - len(back)]
        shape = [*tensor.shape[: len(front)], *tensor.shape[tensor.dim() - len(back) :]]
        places = [f".{i}" for i in range(len(inner), 0, -1)]  # counted from the right, as they are broadcast
        for letter, size in zip([*front, *back, *places], [*shape, *inner], strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())


def _bilinear(out: Tensor, _left: Tensor, _right: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight[0].numel()


def _recurrent(_out: Tensor, input: Tensor, *given: Any, **__: Any) -> int:
    rows = input.numel() // max(input.shape[-1], 1)  # time steps of all sequences
    return rows * sum(w.numel() for w in tensors_in(given) if isinstance(w, nn.Parameter) and w.dim() == 2)


def _attention(_out: Tensor, query: Tensor, key: Tensor, value: Tensor, width: int, *_: Any, **__: Any) -> int:
    """The four projections, as for ``nn.MultiheadAttention``."""
    return (2 * query.numel() + key.numel() + value.numel()) * width


_COUNTED: dict[str, Macs] = {
    **{f"conv{n}d": _conv for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose for n in (1, 2, 3)},
    "deform_conv2d": _conv,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), _product),
    "rmatmul": _product_from_right,
    **dict.fromkeys(_ADDED, _sum_and_product),
    **dict.fromkeys(("tensordot", "inner"), _contraction),
    "einsum": _einsum,
    "bilinear": _bilinear,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent),
    "multi_head_attention_forward": _attention,
}
_UNKNOWN = {"addbmm", "cdist", "chain_matmul", "multi_dot", "conv_tbc", "embedding_bag", "solve", "lstsq", "kron"}
"""Functions of torch that multiply and accumulate, and of which we do not say how often."""

_WEIGHTS: dict[str, slice] = {
    **{f"conv{n}d": slice(1, 2) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": slice(1, 2) for n in (1, 2, 3)},
    **dict.fromkeys(("linear", "deform_conv2d"), slice(1, 2)),
    **dict.fromkeys(_ADDED, slice(1, 3)),
    "bilinear": slice(2, 3),
}
"""Which arguments may be the weight, where a bias stands beside it."""
_KERNELS = _WEIGHTS.keys() - set(_ADDED)
"""Functions of which one argument is meant to be a weight: one made of data is no product of data with data."""
_CASTS = ("to", "type_as")
"""Methods that take no more than the type and the device from their second argument."""


class Operations(TorchFunctionMode):
    """Count, in one forward pass, what functions do with parameters outside of the layers that are counted anyway.

    Only operations of a weight (a parameter, or what is made of parameters and constants alone) with data count. Those
    of weights with each other cost the same for any batch, those of data with data have no weights, as QKᵀ. Matrix
    products count if they sum over the last axis of the data, and are named if they sum over another one. Named are
    also kernels of convolutions and the like that are made of data and parameters together or are buffers, scripts of
    ``torch.jit`` that read parameters, and what runs under ``torch.vmap``, where shapes lack the mapped dimension.

    Attributes:
        macs: multiply-accumulates per parameter, whole batch.
        uncounted: reason per module or parameter of whose operations the number is not known.
        inside: how many counted layers are running; what they do is not looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: dict[str, int] = defaultdict(int)
        self.uncounted: dict[str, str] = {}
        self.inside = 0
        self._read: set[str] = set()
        # tensors that depend on no input, kept alive for their ids, and the parameters and buffers they are made of
        self._fixed: dict[int, tuple[Tensor, frozenset[str]]] = {}
        for name, buffer in model.named_buffers():
            self._fixed[id(buffer)] = (buffer, frozenset([name]))
        for name, parameter in model.named_parameters():
            self._fixed[id(parameter)] = (parameter, frozenset([name]))
        self._parameters = dict(model.named_parameters())
        # tensors made of data and parameters, and the last weight that came in. Most are activations: they may go
        self._joint = WeakIdKeyDictionary()

    def __enter__(self) -> Self:
        _watch_scripts()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _unwatch_scripts()

    def finish(self, called: Mapping[str, nn.Module]) -> None:
        """Name the weights of modules that were called and read out of sight, by kernels of their own, say.

        Args:
            called: modules that were called, have no others inside and are not counted as a whole, by name. (Weights of
                larger ones may simply be unused.)
        """
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for name, module in called.items():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and names[id(parameter)] not in self._read:
                    self.uncounted.setdefault(name or key, f"{type(module).__name__} reads its {key} out of sight")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        self.follow(name, args, kwargs, output, opaque=name in _UNKNOWN or _is_foreign(func))
        return output

    def follow(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, *, opaque: bool) -> None:
        """Note what a function made of what, and count its multiply-accumulates.

        Args:
            name: what it is called.
            args: its positional arguments.
            kwargs: its keyword arguments.
            output: what it returned.
            opaque: whether it may multiply parameters in a way that nobody sees.
        """
        given = tensors_in((args, kwargs))
        if name in _CASTS:
            given = given[:1]
        made = [given[0]] if name == "setitem" else tensors_in(output)
        if not given and name.startswith("rand"):  # noise, or inputs that forward_fn draws: data
            return
        if all(self._origin(t) is not None for t in given):
            origin = self._made_of(given)
            self._fixed.update((id(t), (t, origin)) for t in made)
        elif made:
            weight = self._joined(given)
            for tensor in made:
                self._fixed.pop(id(tensor), None)  # constants that data were written into
                if weight is not None:
                    self._joint[tensor] = weight
            self._read |= self._made_of(given)
            mapped = any(map(_is_mapped, given))
            # the calls of counted layers are counted by their shapes, which are wrong under vmap
            if (not self.inside or mapped) and (name in _COUNTED or opaque):
                self._count(name, _positional(name, args, kwargs), made[0], mapped)

    def _origin(self, tensor: Tensor) -> frozenset[str] | None:
        """The parameters and buffers that a tensor is made of; None if it depends on data."""
        return next((self._fixed[id(t)][1] for t in _layers_of(tensor) if id(t) in self._fixed), None)

    def _made_of(self, given: Sequence[Tensor]) -> frozenset[str]:
        return frozenset().union(*(self._origin(t) or () for t in given))

    def _weights_of(self, given: Sequence[Tensor]) -> frozenset[str]:
        return self._made_of(given) & self._parameters.keys()

    def _largest(self, weights: frozenset[str]) -> str:
        return max(sorted(weights), key=lambda found: self._parameters[found].numel())

    def _joint_of(self, given: Sequence[Tensor]) -> str | None:
        layers = (layer for tensor in given for layer in _layers_of(tensor))
        return next((self._joint[layer] for layer in layers if layer in self._joint), None)

    def _joined(self, given: Sequence[Tensor]) -> str | None:
        """The parameter to name for what is made of these and data: the last weight, rather than a scale or a bias."""
        weights = self._weights_of(given)
        large = frozenset(weight for weight in weights if self._parameters[weight].dim() > 1)
        if large:
            return self._largest(large)
        return self._joint_of(given) or (self._largest(weights) if weights else None)

    def _count(self, name: str, operands: list[Any], out: Tensor, mapped: bool) -> None:
        factors = tensors_in(operands[_WEIGHTS.get(name, slice(None))])
        weights = self._weights_of(factors)
        if not weights:
            if name in _KERNELS and not self.inside:
                self._name_kernel(name, factors)
            return
        weight = self._largest(weights)
        if name in _COUNTED and not mapped:
            try:
                if _sums_over_last(name, operands, lambda t: bool(self._weights_of([t]))):
                    self.macs[weight] += _COUNTED[name](out, *operands)
                    return
            except (NotImplementedError, TypeError, ValueError, IndexError):  # called in a way we do not know
                pass
        if name in _COUNTED or self._parameters[weight].dim() > 1:
            under = " under vmap" if mapped else ""
            self._name(weight, f"the operations of {name} on {weight}{under} are not counted")

    def _name_kernel(self, name: str, kernels: Sequence[Tensor]) -> None:
        """Name a kernel without a parameter to count it for, unless it is data alone."""
        joint = self._joint_of(kernels)
        if joint is not None:
            self._name(joint, f"the operations of {name} on a kernel computed from data and {joint} are not counted")
            return
        # no cost follows the width of a buffer
        buffers = self._made_of(kernels)
        if buffers and kernels[0].dim() > 1:
            buffer = min(buffers)
            self._name(buffer, f"the operations of {name} on a kernel that is a buffer ({buffer}) are not counted")

    def _name(self, key: str, reason: str) -> None:
        self.uncounted[key.rpartition(".")[0] or key] = reason


def _layers_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor and those that the transforms of ``torch.func`` wrapped to make it, innermost last."""
    yield tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def _is_mapped(tensor: Tensor) -> bool:
    """Whether its shape lacks a dimension that vmap runs over. Other transforms of torch.func leave shapes alone."""
    return any(map(torch._C._functorch.is_batchedtensor, _layers_of(tensor)))


# No mode of torch sees the call of a script, so the class itself has to tell while a pass is looked at.
_call_script: Callable[..., Any] = torch.jit.ScriptFunction.__call__
_watchers, _watching = 0, threading.Lock()


def _call_and_tell(script: Any, *args: Any, **kwargs: Any) -> Any:
    output = _call_script(script, *args, **kwargs)
    for mode in _get_current_function_mode_stack():  # of this thread: others may run scripts as well
        if isinstance(mode, Operations):
            with torch._C.DisableTorchFunction():  # what we ask the tensors is none of the network's operations
                mode.follow(f"script {script.name}", args, kwargs, output, opaque=True)
    return output


def _watch_scripts() -> None:
    global _watchers
    with _watching:
        _watchers += 1
        torch.jit.ScriptFunction.__call__ = _call_and_tell  # type: ignore[method-assign, assignment]


def _unwatch_scripts() -> None:
    global _watchers
    with _watching:
        _watchers -= 1
        if not _watchers:
            torch.jit.ScriptFunction.__call__ = _call_script  # type: ignore[method-assign]


def _sums_over_last(name: str, operands: Sequence[Any], is_weight: Callable[[Tensor], bool]) -> bool:
    """Whether a product sums over the last axes of the data, as a linear layer does.

    Products along other axes run once per channel: their number changes when channels of other layers go.
    """
    if name in ("matmul", "mm", "bmm", "mv", "dot", "vdot", "rmatmul", *_ADDED):
        left, right = operands[1:3] if name in _ADDED else operands[:2]
        if name == "rmatmul":
            left, right = right, left
        return right.dim() == 1 or is_weight(right)
    if name == "tensordot":
        data, _, dims = operands
        if is_weight(data):
            return False
        last = data.dim()
        axes = list(range(last - dims, last)) if isinstance(dims, int) else [axis % last for axis in dims[0]]
        return sorted(axes) == list(range(last - len(axes), last))
    if name == "einsum":
        terms, arrow, result = operands[0].replace(" ", "").partition("->")
        (term, other), (first, second) = terms.split(","), _operands_of(operands)
        if is_weight(first):
            term, other, first, second = other, term, second, first
        summed = {letter for letter in term if letter in other and letter not in result and letter != "."}
        return bool(arrow) and is_weight(second) and set(term[len(term) - len(summed) :]) == summed
    return True


def _operands_of(operands: Sequence[Any]) -> list[Tensor]:
    """The two tensors of an einsum, given one by one or in a list."""
    given = operands[1:]
    found = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)
    if len(found) != 2:
        raise NotImplementedError
    return found


def _positional(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments in the order of the formulas, also if given by keyword."""
    known: dict[str, tuple[str, ...]] = {
        "linear": ("input", "weight"),
        "bilinear": ("input1", "input2", "weight"),
        "tensordot": ("a", "b", "dims"),
        "multi_head_attention_forward": ("query", "key", "value", "embed_dim_to_check"),
        **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), ("input", "weight")),
        **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), ("input", "weight")),
    }
    names = known.get(name)
    if names is None:
        return [*args, *kwargs.values()]
    return [*args, *(kwargs[key] for key in names[len(args) :] if key in kwargs)]


def _is_foreign(func: Any) -> bool:
    """Whether it is an operation that somebody added to torch."""
    space = str(getattr(func, "__module__", None) or "")
    return space.startswith("torch._ops.") and space.rpartition(".")[2] not in ("aten", "prims", "prim")
