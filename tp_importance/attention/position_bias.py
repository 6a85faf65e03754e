"""One number per head and relative position of two tokens, that is added to the products of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ContinuousPositionBias", "RelativePositionBias"]


class RelativePositionBias(nn.Module):
    """One number per head and relative position, from a table.

    Args:
        window_size: height and width of the window of tokens.
        num_heads: heads.
        device: of the table.
        dtype: of the table.
    """

    index: Tensor

    def __init__(self, window_size: Sequence[int], num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        height, width = window_size
        rows = (2 * height - 1) * (2 * width - 1)
        self.table = nn.Parameter(torch.zeros(rows, num_heads, device=device, dtype=dtype))
        self.register_buffer("index", _relative_positions(window_size, device))

    def forward(self) -> Tensor:
        """The bias, ``(num_heads, T, T)`` for T tokens."""
        return _per_head(self.table[self.index])


class ContinuousPositionBias(nn.Module):
    """One number per head and relative position, from a small network on coordinates: Swin V2.

    Args:
        window_size: height and width of the window of tokens.
        num_heads: heads.
        hidden: units of the network.
        device: of the parameters.
        dtype: of the parameters.
    """

    index: Tensor
    coordinates: Tensor

    def __init__(
        self, window_size: Sequence[int], num_heads: int, hidden: int = 512, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        axes = [torch.arange(1 - n, n, device=device) / max(n - 1, 1) * 8 for n in window_size]
        scaled = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        coordinates = scaled.sign() * (scaled.abs() + 1).log2() / 3
        self.register_buffer("coordinates", coordinates.to(dtype or torch.get_default_dtype()))
        self.register_buffer("index", _relative_positions(window_size, device))
        self.mlp = nn.Sequential(
            nn.Linear(2, hidden, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(hidden, num_heads, bias=False, device=device, dtype=dtype),
        )

    def forward(self) -> Tensor:
        """The bias, ``(num_heads, T, T)`` for T tokens."""
        return _per_head(16 * self.mlp(self.coordinates).flatten(0, -2).sigmoid()[self.index])


def _relative_positions(window_size: Sequence[int], device: Any) -> Tensor:
    """Row of the table per pair of tokens, ``(T * T,)``."""
    height, width = window_size
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    return (down * (2 * width - 1) + right).flatten()


def _per_head(rows: Tensor) -> Tensor:
    """``(T * T, heads)`` as ``(heads, T, T)``."""
    tokens = math.isqrt(rows.shape[0])
    return rows.unflatten(0, (tokens, tokens)).permute(2, 0, 1)
