"""Modules whose insides are not looked at: recurrent layers, and those with a pruning function of the user's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layer_pruners import input_weights
from .calls import Layers, Run
from .contractions import consumed, match
from .layers import on_axis

__all__ = ["customized", "recurrence"]


def recurrence(run: Run, module: nn.Module, x: Any, given: list[Tensor], where: str) -> None:
    """Tie the channels of the input to the input weights; the hidden size stays.

    Args:
        run: the pass.
        module: the layer.
        x: its input.
        given: all tensors that it was called with.
        where: for people.
    """
    if isinstance(x, Tensor):
        data = consumed(run, x, x.dim() - 1)
        for name in input_weights(module):
            weight = getattr(module, name)
            if weight.shape[1] > 1:
                match(run, data, consumed(run, weight, 1), where)
    for tensor in given:
        if tensor is not x:
            packed = "is given it packed" if not isinstance(x, Tensor) else "takes it for its hidden state"
            for layer in run.layers(tensor):
                run.flag(layer, "mixed", f"{where} {packed}: these channels stay")


def customized(
    run: Run, name: str, module: nn.Module, pruner: Any, given: list[Tensor], made: list[Tensor], where: str
) -> list[tuple[Tensor, Layers]]:
    """A module that a pruning function of the user's cuts, on one side or on both alike.

    Args:
        run: the pass.
        name: qualified name.
        module: the module.
        pruner: its pruning function, a ``tp.BasePruningFunc``.
        given: tensors that it was called with.
        made: tensors that it returned.
        where: for people.

    Returns:
        Layers of what it returned. Sites are called ``<name>.in`` and ``<name>.out``.
    """
    together = pruner.prune_in_channels == pruner.prune_out_channels
    sites: dict[str, Tensor] = {}
    for role, width in (("in", pruner.get_in_channels(module)), ("out", pruner.get_out_channels(module))):
        key = "out" if together else role
        if width and width > 1 and key not in sites:
            sites[key] = run.ledger.add_site(f"{name}.{key}", 0, int(width), torch.device("cpu"))
    inputs = sites.get("out" if together else "in")
    for tensor in given[:1]:
        axis = _channel_axis(tensor, None if inputs is None else len(inputs))
        if axis is None or inputs is None:
            for layer in run.layers(tensor):
                said = (
                    f"says that it has {pruner.get_in_channels(module)} inputs, and it is given {tuple(tensor.shape)}"
                )
                run.flag(layer, "mixed", f"the pruning function of {where} {said}")
        else:
            match(run, consumed(run, tensor, axis), inputs.to(tensor.device), where)
    found: list[tuple[Tensor, Layers]] = []
    for tensor in made[:1]:
        axis = _channel_axis(tensor, len(sites["out"]) if "out" in sites else None)
        if axis is not None:
            found.append((tensor, (on_axis(sites["out"].to(tensor.device), axis, tensor.shape),)))
    return found


def _channel_axis(tensor: Tensor, width: int | None) -> int | None:
    """Axis 1 if it has as many entries, else the last."""
    axes = [axis for axis in (1, tensor.dim() - 1) if 0 <= axis < tensor.dim() and tensor.shape[axis] == width]
    return axes[0] if axes else None
