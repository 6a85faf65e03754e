"""What kind of layer a module is."""

from __future__ import annotations

from torch import nn

from .layer_pruners import is_frozen_norm, loses_whole_groups

__all__ = ["CONV", "COUNTED", "is_batch_norm", "is_depthwise", "is_passthrough"]

CONV = (nn.modules.conv._ConvNd,)

COUNTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
"""Modules whose multiply-accumulates are counted."""


def is_batch_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a batch norm: one of torch, or a frozen one."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (module is not None and is_frozen_norm(module))


def is_depthwise(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution with one input and one output channel per group."""
    return isinstance(module, CONV) and module.groups == module.in_channels == module.out_channels > 1


def is_passthrough(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution that hands channels on: its inputs and outputs go together.

    Example:
        >>> is_passthrough(nn.Conv2d(4, 4, 3, groups=4)), is_passthrough(nn.Conv2d(4, 8, 3, groups=4))
        (True, True)
        >>> is_passthrough(nn.Conv2d(4, 8, 3, groups=2))
        False
    """
    return is_depthwise(module) or loses_whole_groups(module)
