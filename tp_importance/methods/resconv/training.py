"""The training before layers are removed: a proximal step that drives scaling factors to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .block import ResConv2d
from .fusion import soft_threshold

__all__ = ["factors_apart", "proximal_step"]


def factors_apart(
    model: nn.Module, layers: Mapping[str, ResConv2d], weight_decay: float, scalars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: all but the factors s and a, and these, without weight decay.

    Args:
        model: a converted network.
        layers: its residual convolutions.
        weight_decay: of all other parameters.
        scalars: further options of the group with s and a.
    """
    scales = [p for layer in layers.values() for p in (layer.s, layer.a)]
    own = {id(p) for p in scales}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [
        {"params": rest, "weight_decay": weight_decay},
        {"params": scales, "weight_decay": 0.0, **scalars},
    ]


@torch.no_grad()
def proximal_step(layers: Mapping[str, ResConv2d], optimizer: torch.optim.Optimizer, reg: float) -> None:
    """Bring every factor s closer to 0 and keep every a at least at 0, see :meth:`.ResConvPruner.regularize`.

    Args:
        layers: residual convolutions; those whose s is frozen keep it.
        optimizer: gives the learning rate of s, and loses the momentum of what became 0.
        reg: λ.

    Raises:
        ValueError: if the optimizer does not hold the factors.
    """
    rate = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    missing = [name for name, layer in layers.items() if layer.s.requires_grad and id(layer.s) not in rate]
    if missing:
        raise ValueError(
            f"the optimizer does not hold the factor of layer {missing[0]}; build it after the pruner, from "
            "pruner.parameter_groups()"
        )
    for layer in layers.values():
        if layer.s.requires_grad:
            layer.s.copy_(soft_threshold(layer.s, rate[id(layer.s)] * reg))
            _stop_momentum(optimizer.state.get(layer.s, {}), layer.s)
        layer.a.clamp_(min=0)


def _stop_momentum(state: Mapping[str, Any], s: Tensor) -> None:
    """Zero the first moments where s is 0, or it would be carried through."""
    for key in ("momentum_buffer", "exp_avg"):
        moment = state.get(key)
        if isinstance(moment, Tensor) and moment.shape == s.shape:
            moment.masked_fill_(s == 0, 0.0)
