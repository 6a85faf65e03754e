"""What kind of layer a module is."""

from __future__ import annotations

from torch import nn

from .layer_pruners import is_frozen_norm

__all__ = ["CONV", "COUNTED", "is_batch_norm", "is_channelwise", "is_depthwise"]

CONV = (nn.modules.conv._ConvNd,)

COUNTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
"""Modules whose multiply-accumulates are counted."""


def is_batch_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a batch norm: one of torch, or a frozen one."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (module is not None and is_frozen_norm(module))


def is_channelwise(module: nn.Module) -> bool:
    """Whether a convolution has one input and one output per group, so that one position says all of a channel."""
    return isinstance(module, CONV) and module.groups == module.in_channels == module.out_channels > 1


def is_depthwise(module: nn.Module) -> bool:
    """Whether Torch-Pruning treats ``module`` as depthwise (each channel its own group)."""
    return isinstance(module, CONV) and module.groups == module.out_channels > 1
