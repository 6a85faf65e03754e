"""Refit the layers that stay to the removal of others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...core.copies import copied
from ...refitting.report import RefitReport
from ...refitting.settings import Refit
from ...refitting.towards import refit_towards
from .block import ResConv2d, replace_module, resconv_layers

__all__ = ["refit_to_removal"]


def refit_to_removal(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    factors: Mapping[str, float],
    settings: Refit,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> RefitReport:
    r"""Refit, in place, all layers behind the first of those that are about to be removed, see :func:`.refit_towards`.

    Removing is masking: with :math:`s = 0` a layer hands on a times its input, in a network of the same operations. So
    the layers that stay are refitted there, and the removal comes afterwards. What a removed layer would have added to
    a residual stream, those that still add to it make up for.

    Args:
        model: a converted network.
        example_inputs: as for the pruner.
        loader: re-iterable of batches.
        factors: what each layer to be removed hands on.
        settings: of a sequential refit.
        forward_fn: ``forward_fn(model, batch)``.

    Source: ours.
    """
    layers = resconv_layers(model)
    with _opened(model, {name: layer for name, layer in layers.items() if name not in factors}):
        dense = copied(model)
        with _masked({layers[name]: factor for name, factor in factors.items()}):
            gone = [f"{name}.conv" for name in factors]
            return refit_towards(model, dense, example_inputs, loader, gone, settings, forward_fn=forward_fn)


@contextmanager
def _opened(model: nn.Module, layers: Mapping[str, ResConv2d]) -> Iterator[None]:
    """Inside, layers that no training has changed are their convolution and batch norm: sums of them are plain."""
    plain = {}
    for name, layer in layers.items():
        if layer.s.item() == 1 and layer.a.item() == 0:
            plain[name] = nn.Sequential(OrderedDict(conv=layer.conv, bn=layer.bn))
            plain[name].training = layer.training
    try:
        for name, module in plain.items():
            replace_module(model, name, module)
        yield
    finally:
        for name in plain:
            replace_module(model, name, layers[name])


@contextmanager
def _masked(factors: Mapping[ResConv2d, float]) -> Iterator[None]:
    """Inside, layers hand on a factor times their input."""
    before = {layer: (layer.s.detach().clone(), layer.a.detach().clone()) for layer in factors}
    try:
        with torch.no_grad():
            for layer, factor in factors.items():
                layer.s.zero_()
                layer.a.fill_(factor)
        yield
    finally:
        with torch.no_grad():
            for layer, (s, a) in before.items():
                layer.s.copy_(s)
                layer.a.copy_(a)
