"""Random values for all that is constant in a fresh network: what is 0 or 1 everywhere hides mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 1e-2
"""Constants below are starting values of branches that shall not be seen at first; here they must be seen."""


@torch.no_grad()
def scramble(model: nn.Module, run: Callable[[], Any], generator: torch.Generator) -> None:
    """Give constant parameters distinct random values, and batch norms the statistics of one pass, disturbed.

    Args:
        model: the network, changed in place; it ends up in the mode it was in.
        run: runs it.
        generator: of the values.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            value = float(parameter.flatten()[0])
            drawn = distinct(parameter.numel(), generator).reshape(parameter.shape)
            new = 0.4 * (drawn - 0.5) if abs(value) < SMALL else value * (0.5 + drawn)
            parameter.copy_(new)
    handles = []
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            if isinstance(module.weight, Tensor) and not isinstance(module.weight, nn.Parameter):  # a frozen norm
                module.weight.copy_(0.5 + distinct(len(module.weight), generator))
                module.bias.copy_(0.4 * (distinct(len(module.bias), generator) - 0.5))
            handles.append(module.register_forward_pre_hook(_statistics(generator)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def distinct(n: int, generator: torch.Generator) -> Tensor:
    """n different values in [0, 1), in random order."""
    return (torch.randperm(n, generator=generator) + 0.9 * torch.rand(n, generator=generator)) / n


def _statistics(generator: torch.Generator) -> Callable[..., None]:
    """A hook that sets running statistics to those of the input, each a little off."""

    def hook(norm: Any, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().transpose(0, 1).flatten(1)
        mean, variance = rows.mean(1), rows.var(1, correction=0)
        variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        n = len(mean)
        norm.running_mean.copy_(mean + 0.2 * variance.sqrt() * (distinct(n, generator) - 0.5))
        norm.running_var.copy_(variance * (0.75 + 0.5 * distinct(n, generator)))

    return hook
