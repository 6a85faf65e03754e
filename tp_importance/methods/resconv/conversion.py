"""Give the convolutions of a network shortcuts of their own, and turn them into ordinary ones again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.arguments import checked_model
from ...core.guards import transaction
from ...core.stale_optimizers import replacing
from ...graph.classes import ignored_modules
from ...graph.dataflow import Flow, is_batchnorm, record
from ...graph.option_checks import check_ignored
from ...graph.reparametrised import computed_tensors
from .block import ResConv2d, conv_problem, replace_module, resconv_layers

__all__ = ["ConversionReport", "convert_to_resconv", "fuse"]


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_to_resconv` did.

    Attributes:
        converted: names of the layers that are a :class:`ResConv2d` now.
        batchnorms: per converted layer the name of the batch norm it took in (an ``nn.Identity`` is left there).
        left_out: per convolution that was left alone, why.
    """

    converted: list[str]
    batchnorms: dict[str, str]
    left_out: dict[str, str]

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} of {len(self.converted) + len(self.left_out)} convolutions"]
        lines += [f"left alone: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


@torch.inference_mode(False)  # what is made there could take no gradient
def convert_to_resconv(
    model: nn.Module,
    example_inputs: Any,
    *,
    s: float = 1.0,
    a: float = 0.0,
    ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> nn.Module:
    """Give every eligible convolution of ``model`` a shortcut of its own, in place.

    Eligible is an ``nn.Conv2d`` of stride 1 with as many inputs as outputs that keeps the size, is called once, does
    not read the network's input, shares no weight and has no forward hooks. If its output goes to a batch norm and
    nowhere else, the batch norm becomes part of it, and an ``nn.Identity`` stays in its place. With the default
    scalars the function stays exactly what it was; for training from scratch take ``a=1`` (ours). What was left
    out, and why, is at ``model.resconv_report``.

    Args:
        model: the network; build the optimizer afterwards, see :meth:`~tp_importance.ResConvPruner.parameter_groups`.
        example_inputs: tensor, tuple or dict, batch dimension first.
        s: initial layer scaling factor.
        a: initial information control, ≥ 0.
        ignored_layers: modules, parameters or module types to leave alone.
        forward_fn: ``forward_fn(model, example_inputs)``.

    Returns:
        The same model.

    Raises:
        TypeError: if the model is none, or compiled.
        ValueError: if nothing is eligible, the model was converted before, ``s`` or ``a`` is not finite, ``a`` is
            negative, or the model does not call what was put in (it keeps its layers in a plain list, say); the model
            is then as before.

    Example:
        >>> conv, bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), conv, bn, nn.ReLU())
        >>> type(convert_to_resconv(net, torch.randn(1, 3, 8, 8))[2]).__name__, net.resconv_report.left_out
        ('ResConv2d', {'0': "reads the network's input"})
    """
    check_ignored(checked_model(model), ignored_layers)
    if resconv_layers(model):
        raise ValueError(
            f"the model was converted before ({next(iter(resconv_layers(model)))} is a ResConv2d); convert it once, or "
            "call fuse(model) first"
        )
    if not (math.isfinite(s) and math.isfinite(a) and a >= 0):
        raise ValueError(f"s={s} and a={a} must be finite and a >= 0: a removed layer hands on a times its input")
    flow = record(model, example_inputs, forward_fn=forward_fn)
    report = _examine(model, flow, ignored_modules(model, ignored_layers))
    if not report.converted:
        raise ValueError(_not_applicable(model, report.left_out))
    modules = dict(model.named_modules())
    with transaction(model):
        for name in report.converted:
            bn_name = report.batchnorms.get(name)
            if bn_name:  # first: afterwards the block holds it, too
                replace_module(model, bn_name, nn.Identity().train(modules[bn_name].training))
            replace_module(model, name, ResConv2d(modules[name], modules[bn_name] if bn_name else None, s=s, a=a))
        flow = record(model, example_inputs, layers={ResConv2d: "layer"}, forward_fn=forward_fn)
        for name, layer in resconv_layers(model).items():
            if len(flow.calls(layer)) != 1:
                raise ValueError(
                    f"{type(model).__name__} still calls the old layer {name} after it was replaced; keep layers in "
                    "attributes or an nn.ModuleList, not in a list, or pass it in ignored_layers"
                )
    model.resconv_report = report  # type: ignore[assignment]
    return model


def _examine(model: nn.Module, flow: Flow, ignored: set[nn.Module]) -> ConversionReport:
    converted, batchnorms, left_out = [], {}, {}
    names = {module: name for name, module in model.named_modules()}
    given = {v for v in range(len(flow.shapes)) if v not in flow.maker}
    shared = shared_parameters(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        calls = flow.calls(module)
        reason = "is in ignored_layers" if module in ignored else _reason(module, calls, given, shared)
        if reason:
            left_out[name] = reason
            continue
        converted.append(name)
        consumers = flow.consumers.get(calls[0].outputs[0], [])
        if len(consumers) == 1 and is_batchnorm(consumers[0].module) and calls[0].outputs[0] not in flow.outputs:
            bn = consumers[0].module
            assert bn is not None
            if len(flow.calls(bn)) == 1 and bn not in ignored and not _entangled(bn, shared):
                batchnorms[name] = names[bn]
    return ConversionReport(converted, batchnorms, left_out)


def _not_applicable(model: nn.Module, left_out: Mapping[str, str]) -> str:
    """Why a network cannot be converted, and what can prune it."""
    found = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no nn.Conv2d at all"
    return (
        f"ResConv is not applicable to {type(model).__name__}: it has no convolution that could take a shortcut "
        f"({found}). ResConv removes convolutions that keep the shape of their input, never linear layers or "
        "attention; tp_importance.prune(model, x, loader, budget=...) prunes channels, MLPs and heads"
    )


def _reason(conv: nn.Conv2d, calls: list[Any], given: set[int], shared: set[nn.Parameter]) -> str | None:
    plain = all(getattr(type(conv), key) is getattr(nn.Conv2d, key) for key in ("forward", "_conv_forward"))
    if not plain or "forward" in vars(conv) or hasattr(conv, "parametrizations") or "weight" not in conv._parameters:
        by = next((f"its {c.leaf} is computed: {c.by}" for c in computed_tensors(conv)), type(conv).__name__)
        return f"its weight or forward pass is not that of a plain nn.Conv2d ({by})"
    problem = _entangled(conv, shared)
    if problem:
        return problem
    if len(calls) != 1:
        return "is not called by the example inputs" if not calls else f"is called {len(calls)} times"
    if given.intersection(calls[0].inputs):
        return "reads the network's input"
    return conv_problem(conv)


def _entangled(layer: nn.Module, shared: set[nn.Parameter]) -> str | None:
    """What of a layer would be lost if fusing replaced it."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has forward hooks, which fusing would lose"
    return "shares its weights with another layer" if shared.intersection(layer.parameters()) else None


def shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that several modules of ``model`` hold."""
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    return {p for p, count in owners.items() if count > 1}


@torch.inference_mode(False)  # what is made there could take no gradient
def fuse(model: nn.Module) -> nn.Module:
    """Turn every :class:`ResConv2d` into one ordinary convolution, in place; the function in eval mode stays.

    Their batch norms are gone afterwards, so :func:`~tp_importance.recalibrate_batchnorm` cannot act there any more,
    and training needs a smaller learning rate: train first, fuse at the end. Build the optimizer anew.

    Args:
        model: a converted network, in eval mode (``model.train()`` afterwards to train on).

    Returns:
        The same model.

    Raises:
        TypeError: if the model is none, compiled or wrapped.
        ValueError: if there is nothing to fuse, or a batch norm is in train mode; the model is then as before.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
        >>> x = torch.randn(1, 3, 8, 8)
        >>> y = net(x)
        >>> fuse(convert_to_resconv(net, x))[2], torch.allclose(net(x), y, atol=1e-6)
        (Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)), True)
    """
    layers = resconv_layers(checked_model(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no ResConv2d to fuse: it was fused, all were removed, or it was never "
            "converted; call convert_to_resconv first, or leave fuse out"
        )
    with transaction(model), torch.no_grad(), replacing(model):
        for name, layer in layers.items():
            try:
                replace_module(model, name, layer.fused())
            except ValueError as error:
                raise ValueError(f"layer {name} cannot be fused: {error}") from error
    return model
