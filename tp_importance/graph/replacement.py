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

__all__ = ["COMPUTE_WEIGHTS", "calls_counted", "passing", "replace_modules", "report_text"]

COMPUTE_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Forward pre-hooks of torch that compute a weight."""


def report_text(did: str, what: str, done: Mapping[str, str], left_out: Mapping[str, str]) -> str:
    """Lines of a report on modules that were replaced.

    Args:
        did: to them.
        what: they are.
        done: by name, what was replaced.
        left_out: by name, why not.
    """
    lines = [f"{did} {len(done)} of {len(done) + len(left_out)} {what}"]
    lines += [f"  {name}: {said}" for name, said in done.items()]
    lines += [f"left alone: {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


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
