"""Modules whose insides are not looked at: recurrent layers, and those with a pruning function of the user's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calls import Layers, Run
from .contractions import consumed, match
from .layers import on_axis

__all__ = ["RECURRENT", "customized", "recurrence"]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def recurrence(run: Run, module: Any, given: list[Tensor], where: str) -> None:
    """Tie the channels of the first input to the input weights; the hidden size stays.

    Args:
        run: the pass.
        module: the layer.
        given: tensors that it was called with; the first is the sequence.
        where: for people.
    """
    x = given[0]
    data = consumed(run, x, x.dim() - 1) if x.dim() else None
    cell = isinstance(module, nn.RNNCellBase)
    directions = ("",) if cell else ("_l0", "_l0_reverse")[: 1 + module.bidirectional]
    for direction in directions:
        weight = getattr(module, f"weight_ih{direction}")
        within = consumed(run, weight, 1) if weight.shape[1] > 1 else None
        if x.shape[-1] > 1:
            match(run, data, within, where)
    for state in given[1:]:
        for layer in run.layers(state):
            run.flag(layer, "mixed", f"{where} takes it for its hidden state, whose size stays")


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
                run.flag(layer, "mixed", f"{where} has no inputs that its pruning function can cut")
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
