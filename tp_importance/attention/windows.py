"""Attention with a bias per relative position, over tokens or over shifted windows of an image (Swin, MaxViT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import DroppingAttention, dropout_options, unpack
from .position_bias import ContinuousPositionBias, RelativePositionBias

__all__ = [
    "ExplicitBiasedAttention",
    "ExplicitMaskedAttention",
    "ExplicitSharedBiasAttention",
    "ExplicitWindowAttention",
    "explicit_biased",
    "explicit_cosine",
    "explicit_shared_bias",
    "explicit_windows",
]

_LARGEST = math.log(100.0)
"""Of ``logit_scale``: cosines are multiplied by 100 at most."""
_SEAM = -100.0
"""What Swin adds where pixels of one window were no neighbours before the image was rolled."""


def padded(x: Tensor, window_size: Sequence[int]) -> Tensor:
    """``(N, H, W, C)`` with zeros below and to the right, in whole windows."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % window_size[1], 0, -x.shape[1] % window_size[0]))


def windows(x: Tensor, window_size: Sequence[int]) -> Tensor:
    """``(N, H, W, ...)`` as ``(N, windows, T, ...)``."""
    x = x.unflatten(2, (-1, window_size[1])).unflatten(1, (-1, window_size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def joined(x: Tensor, window_size: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """``(N, windows, T, ...)`` as ``(N, H, W, ...)``, with H and W in ``sizes``."""
    height, width = window_size
    x = x.unflatten(2, (height, width)).unflatten(1, (sizes[0] // height, sizes[1] // width))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class ExplicitBiasedAttention(DroppingAttention):
    """Self-attention over a window of tokens, with a bias per relative position.

    Args:
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value; default ``head_dim``.
        scale: default ``head_dim ** -0.5``; 1 for cosines.
        embed_dim: width of inputs and outputs; default ``num_heads * value_dim``.
        window_size: height and width of the window of tokens.
        attention_dropout: of the attention weights, in training.
        dropout: of the outputs, in training.
        cosine: whether products are cosines times a factor per head, ``logit_scale``, as in Swin V2.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        scale: float | None = None,
        embed_dim: int | None = None,
        window_size: Sequence[int] = (7, 7),
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        cosine: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        scale = 1.0 if cosine and scale is None else scale
        sizes = (num_heads, head_dim, value_dim, scale, embed_dim)
        super().__init__(*sizes, attention_dropout, dropout, device=device, dtype=dtype)
        self.window_size, self.cosine = tuple(window_size), cosine
        kind = ContinuousPositionBias if cosine else RelativePositionBias
        self.position_bias: nn.Module | None = kind(window_size, num_heads, device=device, dtype=dtype)
        if cosine:
            self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10), device=device, dtype=dtype))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: ``(..., T, embed_dim)`` for T tokens.
            mask: added to the products; broadcast to ``(..., num_heads, T, T)``.

        Returns:
            The outputs, shaped as ``x``.
        """
        leading = x.shape[:-2]
        if mask is None:  # one batch, for which torch has fused kernels
            x = x.reshape(-1, *x.shape[-2:])
        q, k, v = self.project(x, x, x)
        if self.cosine:
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=_LARGEST).exp()
            k = F.normalize(k, dim=-1)
        if self.position_bias is not None:
            bias = self.position_bias()[None]  # four dimensions: for these kernels, too
            mask = bias if mask is None else bias + mask
        out = self.finish(self.attend(q, k, v, mask, self.attention_dropout))
        return out.reshape(*leading, *out.shape[-2:])


class ExplicitMaskedAttention(ExplicitBiasedAttention):
    """Self-attention over tokens of windows that somebody else has cut: Swin V2 of timm.

    The arguments are those of :class:`ExplicitBiasedAttention`.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: ``(N * windows, T, embed_dim)``.
            mask: ``(windows, T, T)``, added to the products of all heads.

        Returns:
            The outputs, shaped as ``x``.
        """
        if mask is None:
            return super().forward(x)
        return super().forward(x.unflatten(0, (-1, len(mask))), mask[:, None]).flatten(0, 1)


class ExplicitSharedBiasAttention(ExplicitBiasedAttention):
    """Self-attention with a bias per relative position of its own, of the whole network, or none: BEiT.

    The arguments are those of :class:`ExplicitBiasedAttention`.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``(..., T, embed_dim)`` for T tokens.
            shared_rel_pos_bias: added to the products; broadcast to ``(..., num_heads, T, T)``.

        Returns:
            The outputs, shaped as ``x``.
        """
        return super().forward(x, shared_rel_pos_bias)


class ExplicitWindowAttention(ExplicitBiasedAttention):
    """Self-attention within windows of an image, which is rolled before and back afterwards, of any size: Swin.

    Args:
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value; default ``head_dim``.
        scale: default ``head_dim ** -0.5``; 1 for cosines.
        embed_dim: width of inputs and outputs; default ``num_heads * value_dim``.
        window_size: height and width of a window.
        shift_size: by how many pixels the image is rolled up and to the left.
        attention_dropout: of the attention weights, in training.
        dropout: of the outputs, in training.
        cosine: whether products are cosines times a factor per head, ``logit_scale``, as in Swin V2.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> ExplicitWindowAttention(2, 8, window_size=(4, 4), shift_size=(2, 2))(torch.randn(1, 9, 11, 16)).shape
        torch.Size([1, 9, 11, 16])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        scale: float | None = None,
        embed_dim: int | None = None,
        window_size: Sequence[int] = (7, 7),
        shift_size: Sequence[int] = (0, 0),
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        cosine: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (num_heads, head_dim, value_dim, scale, embed_dim)
        super().__init__(*sizes, window_size, attention_dropout, dropout, cosine, device=device, dtype=dtype)
        self.shift_size = tuple(shift_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within the windows of images.

        Args:
            x: ``(N, H, W, embed_dim)``; padded with zeros below and to the right to whole windows.
            mask: added to the products; broadcast to ``(N, windows, num_heads, T, T)`` for T pixels of a window.

        Returns:
            The outputs, shaped as ``x``.
        """
        height, width = x.shape[1], x.shape[2]
        x = padded(x, self.window_size)
        sizes = x.shape[1:3]
        # one window along an axis has no neighbour to look into
        shifts = [s if w < n else 0 for s, w, n in zip(self.shift_size, self.window_size, sizes, strict=True)]
        rolled = any(shifts)
        if rolled:
            x = x.roll([-s for s in shifts], (1, 2))
            seams = self._seams(sizes, shifts, x)
            mask = seams if mask is None else mask + seams
        x = joined(super().forward(windows(x, self.window_size), mask), self.window_size, sizes)
        if rolled:
            x = x.roll(shifts, (1, 2))
        return x[:, :height, :width].contiguous()

    def _seams(self, sizes: Sequence[int], shifts: Sequence[int], x: Tensor) -> Tensor:
        """What keeps pixels apart that only the roll has brought together, ``(windows, 1, T, T)``."""
        below, right = (torch.arange(n, device=x.device) >= n - s for n, s in zip(sizes, shifts, strict=True))
        region = windows((2 * below[:, None] + right)[None], self.window_size)[0]
        apart = region[:, None, :] != region[:, :, None]
        return torch.zeros(apart.shape, device=x.device, dtype=x.dtype).masked_fill(apart, _SEAM)[:, None]


def explicit_windows(old: Any) -> nn.Module:
    """The same attention within windows, with queries, keys and values apart.

    Args:
        old: a ``ShiftedWindowAttention`` or ``ShiftedWindowAttentionV2`` of torchvision.
    """
    cosine = hasattr(old, "logit_scale")
    width, heads = old.qkv.in_features, old.num_heads
    new: Any = ExplicitWindowAttention(
        heads,
        width // heads,
        window_size=old.window_size,
        shift_size=old.shift_size,
        attention_dropout=old.attention_dropout,
        dropout=old.dropout,
        cosine=cosine,
        device="meta",
    )
    unpack(new, old.qkv, old.proj)
    if cosine:
        new.logit_scale = old.logit_scale
        new.k_proj.bias = None  # V2 sets it to zero in every pass
        new.position_bias.mlp = old.cpb_mlp
        new.position_bias.coordinates = old.relative_coords_table
    else:
        new.position_bias.table = old.relative_position_bias_table
    new.position_bias.index = old.relative_position_index
    return new


def explicit_biased(old: Any) -> nn.Module:
    """The same attention over tokens with relative positions, with queries, keys and values apart.

    Args:
        old: a ``RelativePositionalMultiHeadAttention`` of torchvision.
    """
    window = (old.size, old.size)
    new: Any = ExplicitBiasedAttention(
        old.n_heads, old.head_dim, scale=old.scale_factor, window_size=window, device="meta"
    )
    unpack(new, old.to_qkv, old.merge)
    new.position_bias.table = old.relative_position_bias_table
    new.position_bias.index = old.relative_position_index.flatten()
    return new


def explicit_cosine(old: Any) -> nn.Module:
    """The same attention over tokens with cosines, with queries, keys and values apart.

    Args:
        old: a ``WindowAttention`` of timm's Swin V2.
    """
    heads, size = old.num_heads, old.qkv.out_features // 3
    new: Any = ExplicitMaskedAttention(
        heads,
        size // heads,
        window_size=old.window_size,
        cosine=True,
        **dropout_options(old),
    )
    unpack(new, old.qkv, old.proj)
    new.q_proj.bias, new.v_proj.bias = old.q_bias, old.v_bias
    new.logit_scale, new.position_bias.mlp = old.logit_scale, old.cpb_mlp
    new.position_bias.coordinates = old.relative_coords_table
    new.position_bias.index = old.relative_position_index.flatten()
    return new


def explicit_shared_bias(old: Any) -> nn.Module:
    """The same attention, with queries, keys and values apart.

    Args:
        old: an ``Attention`` of timm's BEiT.
    """
    heads, size = old.num_heads, old.qkv.out_features // 3
    new: Any = ExplicitSharedBiasAttention(
        heads,
        size // heads,
        window_size=old.window_size or (1, 1),
        **dropout_options(old),
    )
    unpack(new, old.qkv, old.proj)
    new.q_proj.bias, new.v_proj.bias = old.q_bias, old.v_bias
    if old.relative_position_bias_table is None:
        new.position_bias = None
    else:
        new.position_bias.table = old.relative_position_bias_table
        new.position_bias.index = old.relative_position_index.flatten()
    return new
