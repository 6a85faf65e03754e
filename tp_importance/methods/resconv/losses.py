"""What is lost with each residual convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.forward import run_model
from ...core.untouched import untouched
from ...graph.counting import batch_size
from ...graph.dataflow import record
from ...statistics.labels import LabelFn
from ...statistics.observe import Watch, WatchFn, observe
from .block import ResConv2d
from .elimination import eliminated
from .fusion import layer_loss
from .passes import passes_of
from .removal import LAYERS

__all__ = ["LayerImportance", "output_losses", "removal_controls", "scale_losses"]

LEAST_CONTROL = 1e-3
"""Smallest factor a removed layer hands on."""

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
    """:func:`~tp_importance.methods.resconv.fusion.layer_loss` of every layer, its input measured in one pass.

    Args:
        model: the network.
        layers: its residual convolutions by name.
        loader: re-iterable of batches; ``None``: the example inputs are measured.
        example_inputs: as for the pruner.
        forward_fn: ``forward_fn(model, batch)``, also called with the example inputs.

    Raises:
        ValueError: if the input of a layer is not finite, or its a negative.

    Source: ours.
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
    *,
    controls: Mapping[str, float] | None = None,
) -> dict[str, float]:
    r"""How much the network's output has changed by the time a layer goes, in a greedy elimination of all of them.

    With R the layers removed so far, the next one is that of least

    .. math:: e(R) = \sum \|f_{-R}(x) - f(x)\|^2 / \sum \|f(x)\|^2

    where :math:`f_{-R}` has s = 0 in R, and a as :func:`removal_controls` says. The loss of a layer is
    the largest e seen up to its turn. A layer often costs nothing once its neighbour is gone, as in a residual branch
    that is dead already; so after each removal the layers of the same block are asked anew, and from the others only
    those that come next (their old answers order them: lazy greedy). From e > 1 on, where the network is no good any
    more, the old answers are taken.

    A quarter of the samples says which layers may come next (at least one batch: give several); those are asked on
    further batches until the best one has been asked on all, so the loss of a layer is that of all samples up to e = 1.
    Only what comes behind the layer in question is run, from activations that are kept (up to 1 GiB with the batches),
    and layers that are gone are one multiplication: see :mod:`tp_importance.methods.resconv.passes`. Where a network
    cannot be replayed in parts (it reads values of tensors, draws random numbers or keeps a state), it runs as a whole;
    the log says so.

    Args:
        model: the network; its (first) output is compared.
        layers: its residual convolutions by name.
        loader: re-iterable of batches in a fixed order; ``None``: the example inputs.
        example_inputs: as for the pruner.
        forward_fn: ``forward_fn(model, batch)``, also called with the example inputs.
        controls: what :func:`removal_controls` gives for these layers, if that is known.

    Source: ours.
    """
    if controls is None:
        controls = removal_controls(model, layers, loader, example_inputs, forward_fn)
    batches, run, _ = _batches(loader, example_inputs, forward_fn)
    with untouched(model), torch.no_grad(), _scalars_kept(layers):
        model.eval()
        return eliminated(passes_of(model, layers, controls, batches, run), list(layers))


def removal_controls(
    model: nn.Module,
    layers: Mapping[str, ResConv2d],
    loader: Iterable[Any] | None,
    example_inputs: Any,
    forward_fn: ForwardFn | None = None,
) -> dict[str, float]:
    r"""The factor a with which each layer would be removed.

    That of the layer, if training has made it positive. Else, with data, what suits the consumer of the output y best.
    If that is an add, the nearest multiple of the input, :math:`\max(\langle y, x \rangle / \langle x, x \rangle,
    10^{-3})`; it must be positive to be moved into other layers. If not, the multiple of the size it is used to,
    :math:`rms(y) / rms(x)`, y behind the activation. Without data 1, the identity.

    Args:
        model: the network.
        layers: its residual convolutions by name.
        loader: re-iterable of batches.
        example_inputs: as for the pruner.
        forward_fn: ``forward_fn(model, batch)``, also called with the example inputs.

    Source: ours.
    """
    controls = {name: layer.a.item() or 1.0 for name, layer in layers.items()}
    untrained = [name for name, layer in layers.items() if layer.a.item() == 0]
    if not untrained or loader is None:
        return controls
    flow = record(model, example_inputs, layers=LAYERS, forward_fn=forward_fn)
    consumers = {op.name: {r.kind for r in flow.consumers.get(op.outputs[0], [])} for op in flow.ops if op.outputs}
    sums: dict[str, Tensor] = {}

    def add(name: str) -> WatchFn:
        def fn(x: Tensor, out: Tensor, _labels: Tensor) -> None:
            seen = out.clamp(min=0) if consumers[name] == {"relu"} else out
            found = torch.stack([(x * out).sum(), x.square().sum(), seen.square().sum()]).cpu().double()
            sums[name] = sums.get(name, torch.zeros(3, dtype=torch.float64, device="cpu")) + found

        return fn

    watches = [Watch(name, layers[name], add(name)) for name in untrained]
    observe(model, loader, watches, need_labels=False, forward_fn=forward_fn)
    for name, (xy, xx, yy) in sums.items():
        xx = xx.clamp(min=1e-300)
        value = xy / xx if "add" in consumers[name] else (yy / xx).sqrt()
        controls[name] = max(float(value), LEAST_CONTROL)
    return controls


@contextmanager
def _scalars_kept(layers: Mapping[str, ResConv2d]) -> Iterator[None]:
    """Put s and a back on any exit."""
    before = {name: (layer.s.clone(), layer.a.clone()) for name, layer in layers.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, (s, a) in before.items():
                layers[name].s.copy_(s)
                layers[name].a.copy_(a)


def _batches(
    loader: Iterable[Any] | None, example_inputs: Any, forward_fn: ForwardFn | None
) -> tuple[Iterable[Any], ForwardFn | None, LabelFn | None]:
    """The loader, or the example inputs as if they were one."""
    if loader is not None:
        return loader, forward_fn, None
    n = batch_size(example_inputs)
    return (
        [None],
        lambda model, _: run_model(model, example_inputs, forward_fn),
        lambda _: torch.zeros(n, dtype=torch.int64, device="cpu"),
    )
