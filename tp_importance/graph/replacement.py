"""Put other modules in the places of some, and see whether the network takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..core.untouched import untouched

__all__ = ["COMPUTE_WEIGHTS", "calls_counted", "passing", "replace_modules"]

COMPUTE_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Forward pre-hooks of torch that compute a weight."""


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """A pass in eval mode that leaves no trace.

    Args:
        model: the network.
    """
    with untouched(model), torch.no_grad():
        model.eval()
        yield


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules where the old ones are, under all their names and in their mode.

    Args:
        model: the network, changed.
        new: the new module per old one.
    """
    for old, module in new.items():
        kept = set(old.modules())
        for part in module.modules():
            if part not in kept:
                part.training = old.training
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[leaf] = new[child]


@contextmanager
def calls_counted(modules: Mapping[nn.Module, nn.Module]) -> Iterator[list[nn.Module]]:
    """Which of these modules are called meanwhile.

    Args:
        modules: those that were replaced, as keys.

    Yields:
        A list that fills.
    """
    called: list[nn.Module] = []
    handles = [old.register_forward_pre_hook(lambda module, _: called.append(module)) for old in modules]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
