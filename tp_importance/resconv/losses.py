"""What is lost with each residual convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import call_model, iterate, run_batch, tensors_in
from ..functional.resconv import layer_loss
from ..guards import preserved
from ..observe import LabelFn, Watch, WatchFn, observe
from ..tracing import batch_size
from .block import ResConv2d

__all__ = ["LayerImportance", "output_losses", "scale_losses"]

LayerImportance = Callable[[nn.Module, dict[str, ResConv2d]], Mapping[str, float]]
"""``importance(model, layers)``: what is lost with each layer, ≥ 0 and on one scale."""
ForwardFn = Callable[[nn.Module, Any], Any]


def scale_losses(
    model: nn.Module,
    layers: Mapping[str, ResConv2d],
    loader: Iterable[Any] | None,
    example_inputs: Any,
    forward_fn: ForwardFn | None = None,
) -> dict[str, float]:
    """:func:`~tp_importance.functional.resconv.layer_loss` of every layer, its input measured in one pass.

    Args:
        model: the network.
        layers: its residual convolutions by name.
        loader: re-iterable of batches; ``None``: the example inputs are measured.
        example_inputs: as for the pruner.
        forward_fn: ``forward_fn(model, batch)``, also called with the example inputs.

    Raises:
        ValueError: if the input of a layer is not finite, or its a negative.

    Source: METHODS §4.
    """
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(key: str, x: Tensor) -> None:
        total = x.square().sum(dtype=torch.float32 if x.device.type == "mps" else torch.float64)
        squares[key] = total if key not in squares else squares[key] + total
        counts[key] = counts.get(key, 0) + x.numel()

    def inputs_of(name: str) -> WatchFn:
        return lambda x, _out, _labels: add(name, x)

    def outputs_of(name: str) -> WatchFn:
        return lambda _x, out, _labels: add(f"{name}/branch", out)

    watches = [Watch(name, layer, inputs_of(name)) for name, layer in layers.items()]
    bare = {name: layer for name, layer in layers.items() if getattr(layer.bn, "weight", None) is None}
    watches += [Watch(name, layer.conv, outputs_of(name)) for name, layer in bare.items()]
    batches, run, labels = _batches(loader, example_inputs, forward_fn)
    observe(model, batches, watches, need_labels=False, forward_fn=run, label_fn=labels)
    rms = {key: float(total / counts[key]) ** 0.5 for key, total in squares.items()}
    found = {}
    for name, layer in layers.items():
        try:
            found[name] = layer_loss(layer.s.item(), layer.a.item(), _branch(name, layer, rms), max(rms[name], 1e-12))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}; look for NaN in the weights and the batches") from error
    return found


def _branch(name: str, layer: ResConv2d, rms: Mapping[str, float]) -> float:
    """rms(γ) of the batch norm; without one, that of the convolution's output."""
    gamma: Any = getattr(layer.bn, "weight", None)
    return rms[f"{name}/branch"] if gamma is None else float(gamma.detach().double().square().mean().sqrt())


def output_losses(
    model: nn.Module,
    layers: Mapping[str, ResConv2d],
    loader: Iterable[Any] | None,
    example_inputs: Any,
    forward_fn: ForwardFn | None = None,
) -> dict[str, float]:
    r"""How much the network's output changes without each layer, alone: one pass per layer and one more.

    .. math:: \sum \|f_{-l}(x) - f(x)\|^2 / \sum \|f(x)\|^2

    where :math:`f_{-l}` has s = 0 in layer l, and a = 1 if it was 0, as a removal would do.

    Args:
        model: the network; its (first) output is compared.
        layers: its residual convolutions by name.
        loader: re-iterable of batches in a fixed order; ``None``: the example inputs.
        example_inputs: as for the pruner.
        forward_fn: ``forward_fn(model, batch)``, also called with the example inputs.

    Source: ours.
    """
    batches, run, _ = _batches(loader, example_inputs, forward_fn)
    found: dict[str, float] = {}
    with preserved(model), torch.no_grad():
        model.eval()
        dense = [tensors_in(run_batch(model, batch, run))[0].double() for batch in iterate(batches)]
        total = sum(float(y.square().sum()) for y in dense)
        for name, layer in layers.items():
            s, a = layer.s.clone(), layer.a.clone()
            try:
                layer.s.zero_()
                layer.a.copy_(torch.where(a == 0, torch.ones_like(a), a))
                changed = 0.0
                for batch, y in zip(iterate(batches), dense, strict=True):
                    changed += float((tensors_in(run_batch(model, batch, run))[0].double() - y).square().sum())
            finally:
                layer.s.copy_(s)
                layer.a.copy_(a)
            found[name] = changed / max(total, 1e-300)
    return found


def _batches(
    loader: Iterable[Any] | None, example_inputs: Any, forward_fn: ForwardFn | None
) -> tuple[Iterable[Any], ForwardFn | None, LabelFn | None]:
    """The loader, or the example inputs as if they were one."""
    if loader is not None:
        return loader, forward_fn, None
    n, run = batch_size(example_inputs), forward_fn or call_model
    return [None], lambda model, _: run(model, example_inputs), lambda _: torch.zeros(n, dtype=torch.int64)
