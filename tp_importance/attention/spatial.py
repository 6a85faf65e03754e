"""Attention between the pixels of a feature map, from convolutions (YOLO)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ExplicitSpatialAttention", "explicit_spatial"]


class ExplicitSpatialAttention(nn.Module):
    """Attention between the pixels of each of a few areas, plus a depthwise convolution of the values.

    The outputs of ``qkv`` are those of one head after the other: queries, keys and values.

    Attributes:
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value.
        scale: by which products are multiplied; stays as it is.
        area: how many areas of consecutive rows the pixels are divided into.

    Args:
        qkv: to ``num_heads * (2 * head_dim + value_dim)`` channels.
        proj: from ``num_heads * value_dim`` channels.
        pe: from as many to as many.
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value.
        scale: by which products are multiplied.
        area: how many areas.
    """

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        pe: nn.Module,
        num_heads: int,
        head_dim: int,
        value_dim: int,
        scale: float,
        area: int = 1,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.value_dim, self.scale, self.area = (
            num_heads,
            head_dim,
            value_dim,
            scale,
            area,
        )
        self.qkv, self.proj, self.pe = qkv, proj, pe

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: ``(N, C, H, W)``, with pixels for as many areas of one size.

        Returns:
            ``(N, C', H, W)``.
        """
        batch, _, height, width = x.shape
        packed = self.qkv(x).reshape(batch, self.num_heads, -1, self.area, height * width // self.area)
        q, k, v = packed.split([self.head_dim, self.head_dim, self.value_dim], 2)
        queries, keys, values = (t.permute(0, 3, 1, 4, 2).flatten(0, 1) for t in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        out = out.unflatten(0, (batch, self.area)).permute(0, 2, 4, 1, 3)
        maps = [t.flatten(3).flatten(1, 2).unflatten(-1, (height, width)) for t in (out, v)]
        return self.proj(maps[0] + self.pe(maps[1]))


def explicit_spatial(old: Any) -> nn.Module:
    """The same attention; its layers keep their names.

    Args:
        old: an ``Attention`` or ``AAttn`` of ultralytics.
    """
    key_dim = getattr(old, "key_dim", old.head_dim)
    scale = getattr(old, "scale", key_dim**-0.5)
    area = getattr(old, "area", 1)
    return ExplicitSpatialAttention(old.qkv, old.proj, old.pe, old.num_heads, key_dim, old.head_dim, scale, area)
