"""Every call of a layer in a forward pass, and the multiply-accumulates of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import checked_model
from ..core.batches import sample_count
from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched
from .function_macs import attention_products
from .layer_kinds import CONV, COUNTED
from .operations import Operations

__all__ = ["Call", "CallRecorder", "batch_size", "count_ops", "per_sample", "record_calls"]


@dataclass(frozen=True)
class Call:
    """One call of one leaf module during the traced forward pass.

    Attributes:
        name: the module's qualified name.
        in_shape: shape of its first tensor argument.
        out_shape: shape of its (first) output.
        macs: multiply-accumulates of this call, whole batch, for :data:`COUNTED` modules; 0 for other modules.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    macs: int


def batch_size(example_inputs: Any) -> int:
    """First dimension of the first tensor in ``example_inputs`` (tensor, sequence or dict).

    Raises:
        TypeError: if there is no tensor with at least one dimension.
        ValueError: if it is empty.
    """
    values: Iterable[Any] = ()
    if isinstance(example_inputs, Mapping):
        values = example_inputs.values()
    elif isinstance(example_inputs, (Tensor, tuple, list)):
        values = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    count = sample_count(values)
    if count == 0:
        raise ValueError("example_inputs hold no sample: the first dimension of the first tensor is 0")
    if count is not None:
        return count
    raise TypeError(
        f"example_inputs of type {type(example_inputs).__name__} hold no batched tensor; pass a tensor, "
        "a tuple of positional arguments or a dict of keyword arguments, batch dimension first"
    )


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((t for t in map(_first_tensor, value) if t is not None), None)
    return None


def _call_macs(module: nn.Module, x: Tensor, out: Tensor) -> int:
    if isinstance(module, CONV):
        per_position = module.weight.numel() // module.weight.shape[0]
        return per_position * (x.numel() if module.transposed else out.numel())
    if isinstance(module, nn.Linear):
        return out.numel() * module.in_features
    return 0


def _attention_macs(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """The four projections, which run inside one functional call."""
    return (2 * query.numel() + key.numel() + value.numel()) * module.embed_dim


def _attention_products(module: Any, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return attention_products(query, key, module.embed_dim, batch_first=module.batch_first)


def per_sample(calls: Iterable[Call], functional: Mapping[str, int], products: int, n: int) -> int:
    """Multiply-accumulates of one sample of a batch of ``n``.

    Args:
        calls: of the layers.
        functional: of functions, by parameter, whole batch.
        products: of data with data, whole batch.
        n: samples.

    Raises:
        ValueError: if they do not divide by the batch.
    """
    macs = sum(call.macs for call in calls) + sum(functional.values()) + products
    if macs % n:
        raise ValueError(
            f"{macs} MACs do not divide by the batch of {n}: the first dimension of example_inputs is not the batch"
        )
    return macs // n


class CallRecorder:
    """Forward hooks that write down every call of every leaf module (and attention), and what functions cost."""

    def __init__(self, model: nn.Module):
        self.calls: list[Call] = []
        self._operations, self._called = Operations(model), dict[str, nn.Module]()
        self._handles = []
        for name, module in model.named_modules():
            if isinstance(module, COUNTED):
                self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))
            elif module._parameters and not module._modules:
                self._handles.append(module.register_forward_pre_hook(partial(self._meet, name)))
            if isinstance(module, COUNTED) or not any(True for _ in module.children()):
                self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def run(self, model: nn.Module, inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None) -> Any:
        """Run the model and look at the functions that it calls."""
        with self._operations:
            return (forward_fn or call_model)(model, inputs)

    def functional(self, n: int) -> tuple[dict[str, int], dict[str, str]]:
        """Multiply-accumulates of functions per parameter, and reasons for what is not counted."""
        self._operations.finish(self._called)
        macs, uncounted = dict(self._operations.macs), dict(self._operations.uncounted)
        for name in [name for name, count in macs.items() if count % n]:
            uncounted[name.rpartition(".")[0] or name] = f"the operations on {name} do not grow with the batch"
            del macs[name]
        return macs, uncounted

    @property
    def products(self) -> int:
        """Multiply-accumulates of data with data, whole batch."""
        return self._operations.products

    def per_sample(self, n: int, *, attention: bool = True) -> int:
        """Multiply-accumulates of one sample of a batch of ``n``.

        Args:
            n: samples.
            attention: with products of data with data.

        Raises:
            ValueError: if they do not divide by the batch.
        """
        return per_sample(self.calls, self.functional(n)[0], self.products if attention else 0, n)

    def _enter(self, *_: Any) -> None:
        self._operations.inside += 1

    def _leave(self, *_: Any) -> None:
        self._operations.inside -= 1

    def _meet(self, name: str, module: nn.Module, *_: Any) -> None:
        if not self._operations.inside:
            self._called[name] = module

    def _hook(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x, out = _first_tensor((args, kwargs)), _first_tensor(output)
            if x is not None and out is not None:
                if isinstance(module, nn.MultiheadAttention):
                    macs = _attention_macs(module, *args, **kwargs)
                    self._operations.products += _attention_products(module, *args, **kwargs)
                else:
                    macs = _call_macs(module, x, out)
                self.calls.append(Call(name, tuple(x.shape), tuple(out.shape), macs))

        return record

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()


def count_ops(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    attention: bool = True,
) -> tuple[int, int]:
    """Count what one sample costs, by running the model.

    MACs are multiply-accumulates of data with parameters: of convolutions, linear layers and the projections of
    ``nn.MultiheadAttention``, of recurrent and bilinear layers, deformable convolutions, and of functions as
    ``F.conv2d(x, self.weight)``, ``x @ self.weight`` or ``torch.einsum`` with two operands; and, unless ``attention``
    is False, of matrix products of data with data: QKᵀ and AV for all pairs of positions. Bias, normalisation and
    activations are not counted; nor are kernels of other libraries, see
    :attr:`~tp_importance.graph.tracing.Trace.uncounted`. A module called twice costs its MACs twice and its
    parameters once.

    Args:
        model: the network.
        example_inputs: as for :func:`~tp_importance.graph.tracing.trace`; the batch dimension is divided out.
        forward_fn: ``forward_fn(model, example_inputs)``; default calls the model.
        attention: count products of data with data.

    Returns:
        ``(macs, params)``: MACs per sample and the number of parameters.

    Raises:
        TypeError: if the model is none, or compiled: compiled code hides its layers.

    Example:
        >>> count_ops(nn.Linear(10, 5), torch.zeros(4, 10))
        (50, 55)
    """
    checked_model(model)
    n = batch_size(example_inputs)
    recorder = record_calls(model, example_inputs, forward_fn)
    return recorder.per_sample(n, attention=attention), sum(math.prod(p.shape) for p in model.parameters())


def record_calls(
    model: nn.Module, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None = None
) -> CallRecorder:
    """Run the model once, in eval mode and without gradients; nothing is changed.

    Args:
        model: the network.
        example_inputs: as for :func:`count_ops`.
        forward_fn: ``forward_fn(model, example_inputs)``; default calls the model.

    Returns:
        What was called.
    """
    with untouched(model), torch.no_grad():
        model.eval()
        recorder = CallRecorder(model)
        try:
            recorder.run(model, fresh_inputs(example_inputs), forward_fn)
        finally:
            recorder.remove()
    return recorder
