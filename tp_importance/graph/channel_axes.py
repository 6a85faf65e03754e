"""Where the channels of convolutions and linear layers are: in tensors, and in weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layer_kinds import CONV

__all__ = ["channel_dim", "scale_inputs", "scale_outputs"]


def channel_dim(module: nn.Module) -> int:
    """Channel dimension of inputs and outputs of a convolution or linear layer, counted from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, CONV) else -1


def scale_inputs(module: Any, factor: Tensor) -> Tensor:
    """``factor``, shape (C_in,), in a shape that multiplies the weight of a convolution or linear layer."""
    if not isinstance(module, CONV):
        return factor
    ones = [1] * len(module.kernel_size)
    if module.transposed:
        return factor.view(-1, 1, *ones)
    return _per_block(factor, module.groups, module.out_channels).view(module.out_channels, -1, *ones)


def scale_outputs(module: Any, factor: Tensor) -> Tensor:
    """``factor``, shape (C_out,), in a shape that multiplies the weight of a convolution or linear layer."""
    if not isinstance(module, CONV):
        return factor.view(-1, 1)
    ones = [1] * len(module.kernel_size)
    if not module.transposed:
        return factor.view(-1, 1, *ones)
    return _per_block(factor, module.groups, module.in_channels).view(module.in_channels, -1, *ones)


def _per_block(factor: Tensor, blocks: int, rows: int) -> Tensor:
    """Of a grouped convolution, each block of rows sees its own part of ``factor``; shape (rows, C / blocks)."""
    return factor.view(blocks, 1, -1).expand(-1, rows // blocks, -1).reshape(rows, -1)
