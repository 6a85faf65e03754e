"""Multiply-accumulates of functions that read parameters: what no hook on a layer sees."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from ..core.batches import tensors_in
from .function_macs import FORMULAS, KERNELS, PRODUCTS, RECURRENT, UNKNOWN, WEIGHTS, positional, sums, sums_over_last
from .function_names import function_name

__all__ = ["Operations"]

_CASTS = ("to", "type_as")
"""Methods that take no more than the type and the device from their second argument."""


class Operations(TorchFunctionMode):
    """Count, in one forward pass, what functions do with parameters outside of the layers that are counted anyway.

    Operations of a weight (a parameter, or what is made of parameters and constants alone) with data count, and matrix
    products of data with data, as QKᵀ. Those of weights with each other cost the same for any batch. Matrix
    products with a weight count if they sum over the last axis of the data, else they are named. Named are
    also kernels of convolutions and the like that are made of data and parameters together or are buffers, scripts of
    ``torch.jit`` that read parameters, and what runs under ``torch.vmap``, where shapes lack the mapped dimension.

    Attributes:
        macs: multiply-accumulates per parameter, whole batch.
        products: multiply-accumulates of data with data, whole batch.
        uncounted: reason per module or parameter of whose operations the number is not known.
        inside: how many counted layers are running; what they do is not looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: dict[str, int] = defaultdict(int)
        self.uncounted: dict[str, str] = {}
        self.inside, self.products = 0, 0
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
        name = function_name(func)
        with _disable_current_modes():  # what we ask the tensors is none of the network's operations
            self.follow(name, args, kwargs, output, opaque=name in UNKNOWN or _is_foreign(func))
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
            if (not self.inside or mapped) and (name in FORMULAS or name in PRODUCTS or opaque):
                self._count(name, positional(name, args, kwargs), made[0], mapped)

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
        factors = tensors_in(operands[WEIGHTS.get(name, slice(None))])
        weights = self._weights_of(factors)
        # what is attended is multiplied entry by entry for every sample, even if queries are learned
        attended = name == "scaled_dot_product_attention"
        if name in PRODUCTS and not mapped and (attended or all(self._origin(t) is None for t in factors[:2])):
            self._count_product(name, operands, out)
            return
        if not weights:
            if name in KERNELS and not self.inside:
                self._name_kernel(name, factors)
            return
        weight = self._largest(weights)
        if name in FORMULAS and not mapped:
            try:
                if name in RECURRENT:
                    for factor in factors:
                        for single in self._weights_of([factor]) if factor.dim() == 2 else ():
                            self.macs[single] += FORMULAS[name](out, operands[0], factor)
                    return
                if sums_over_last(name, operands, lambda t: bool(self._weights_of([t]))):
                    self.macs[weight] += FORMULAS[name](out, *operands)
                    return
            except (NotImplementedError, TypeError, ValueError, IndexError):  # called in a way we do not know
                pass
        if name in FORMULAS or self._parameters[weight].dim() > 1:
            under = " under vmap" if mapped else ""
            self._name(weight, f"the operations of {name} on {weight}{under} are not counted")

    def _count_product(self, name: str, operands: list[Any], out: Tensor) -> None:
        """Data with data, as QKᵀ."""
        if name == "einsum" and not sums(operands[0]):
            return
        try:
            self.products += PRODUCTS[name](out, *operands)
        except (NotImplementedError, TypeError, ValueError, IndexError):  # called in a way we do not know
            return

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


def _is_foreign(func: Any) -> bool:
    """Whether it is an operation that somebody added to torch."""
    space = str(getattr(func, "__module__", None) or "")
    return space.startswith("torch._ops.") and space.rpartition(".")[2] not in ("aten", "prims", "prim")
