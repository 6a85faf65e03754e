"""Attention of vision transformers whose keys are fewer tokens, a class token's only, or channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import DroppingAttention, adopt, dropout_options, linear, part, unpack
from .windows import joined, padded, windows

__all__ = [
    "ExplicitChannelAttention",
    "ExplicitClassAttention",
    "ExplicitGroupedAttention",
    "ExplicitReducedAttention",
    "ExplicitTokenAttention",
    "explicit_channels",
    "explicit_class_token",
    "explicit_groups",
    "explicit_reduced",
    "explicit_tokens",
]


class ExplicitReducedAttention(DroppingAttention):
    """Self-attention whose keys and values come from a smaller feature map: PVT, Twins.

    Args:
        reduction: what makes the feature map smaller; default nothing.
        arguments: as of the base class.
        options: as of the base class.
    """

    def __init__(self, *arguments: Any, reduction: nn.Module | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reduction = reduction

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend.

        Args:
            x: ``(N, H * W, embed_dim)``.
            size: height and width of the feature map.

        Returns:
            The outputs, shaped as ``x``.
        """
        reduced = x if self.reduction is None else self.reduction(x, size)
        q, k, v = self.project(x, reduced, reduced)
        return self.finish(self.attend(q, k, v, None, self.attention_dropout))


class Reduction(nn.Module):
    """Tokens as a map, which is pooled and convolved, and as tokens again, which are normalised.

    Args:
        pool: before the convolution; default nothing.
        sr: the convolution.
        norm: of the tokens.
        act: behind it; default nothing.
    """

    def __init__(self, pool: nn.Module | None, sr: nn.Module, norm: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.pool, self.sr, self.norm, self.act = pool, sr, norm, act

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """From ``(N, H * W, C)`` to ``(N, tokens, C)``."""
        image = x.transpose(1, 2).unflatten(-1, tuple(size))
        image = image if self.pool is None else self.pool(image)
        tokens = self.norm(self.sr(image).flatten(2).transpose(1, 2))
        return tokens if self.act is None else self.act(tokens)


class ExplicitTokenAttention(DroppingAttention):
    """Self-attention and nothing else: CAFormer, DaViT."""

    def forward(self, x: Tensor) -> Tensor:
        """From ``(..., T, embed_dim)`` to the same shape."""
        return self.finish(self.attend(*self.project(x, x, x), None, self.attention_dropout))


class ExplicitGroupedAttention(DroppingAttention):
    """Self-attention within windows of a feature map: Twins.

    Args:
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value; default ``head_dim``.
        scale: default ``head_dim ** -0.5``.
        embed_dim: width of inputs and outputs; default ``num_heads * value_dim``.
        ws: height and width of a window.
        attention_dropout: of the attention weights, in training.
        dropout: of the outputs, in training.
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
        ws: int = 7,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (num_heads, head_dim, value_dim, scale, embed_dim)
        super().__init__(*sizes, attention_dropout, dropout, device=device, dtype=dtype)
        self.ws = ws

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend.

        Args:
            x: ``(N, H * W, embed_dim)``.
            size: height and width of the feature map; padded with zeros to whole windows.

        Returns:
            The outputs, shaped as ``x``.
        """
        window = (self.ws, self.ws)
        image = padded(x.unflatten(1, tuple(size)), window)
        cut = windows(image, window)
        tokens = cut.flatten(0, 1)  # one batch, for which torch has fused kernels
        heads = self.attend(*self.project(tokens, tokens, tokens), None, self.attention_dropout)
        image = joined(heads.unflatten(0, cut.shape[:2]), window, image.shape[1:3])
        return self.finish(image[:, : size[0], : size[1]].flatten(1, 2))


class ExplicitClassAttention(DroppingAttention):
    """Attention of the first token to all of them: CaiT, XCiT, CrossViT."""

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, T, embed_dim)`` to ``(N, 1, embed_dim)``."""
        q, k, v = self.project(x[:, :1], x, x)
        return self.finish(self.attend(q, k, v, None, self.attention_dropout))


class ExplicitChannelAttention(DroppingAttention):
    """Attention between the channels of a head, by cosines times ``temperature``: XCiT, EdgeNeXt.

    Queries, keys and values have one size, ``head_dim``: what one channel looks at are channels.

    Args:
        num_heads: heads.
        head_dim: channels of a head.
        embed_dim: width of inputs and outputs; default ``num_heads * head_dim``.
        attention_dropout: of the attention weights, in training.
        dropout: of the outputs, in training.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        embed_dim: int | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_heads, head_dim, head_dim, 1.0, embed_dim, attention_dropout, dropout, **options)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, T, embed_dim)`` to the same shape."""
        q, k, v = (t.transpose(-2, -1) for t in self.project(x, x, x))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature).softmax(-1)
        out = F.dropout(weights, self.attention_dropout, self.training) @ v
        return self.finish(out.permute(0, 3, 1, 2).flatten(-2))


def explicit_reduced(old: Any) -> nn.Module:
    """The same attention, with keys and values apart.

    Args:
        old: an ``Attention`` of timm's PVT v2 or a ``GlobalSubSampleAttn`` of its Twins.
    """
    new = ExplicitReducedAttention(*_sizes(old, old.q), **dropout_options(old))
    size = old.q.out_features
    new.q_proj, new.out_proj = linear(old.q.weight, old.q.bias), linear(old.proj.weight, old.proj.bias)
    for i, name in enumerate(("k_proj", "v_proj")):
        bias = None if old.kv.bias is None else part(old.kv.bias, i * size, size)
        setattr(new, name, linear(part(old.kv.weight, i * size, size), bias))
    if old.sr is not None:
        new.reduction = Reduction(getattr(old, "pool", None), old.sr, old.norm, getattr(old, "act", None))
    return new


def explicit_tokens(old: Any) -> nn.Module:
    """The same attention, with queries, keys and values apart.

    Args:
        old: an ``Attention`` of timm's MetaFormer or a ``WindowAttention`` of its DaViT.
    """
    new = ExplicitTokenAttention(old.num_heads, old.qkv.out_features // 3 // old.num_heads, **dropout_options(old))
    unpack(new, old.qkv, old.proj)
    return new


def explicit_groups(old: Any) -> nn.Module:
    """The same attention, with queries, keys and values apart.

    Args:
        old: a ``LocallyGroupedAttn`` of timm's Twins.
    """
    new = ExplicitGroupedAttention(*_sizes(old, old.proj), ws=old.ws, **dropout_options(old))
    unpack(new, old.qkv, old.proj)
    return new


def explicit_class_token(old: Any) -> nn.Module:
    """The same attention.

    Args:
        old: a ``ClassAttn`` of timm's CaiT or a ``CrossAttention`` of its CrossViT.
    """
    q, k, v = (getattr(old, name, None) or getattr(old, f"w{name}") for name in "qkv")
    new = ExplicitClassAttention(*_sizes(old, q), **dropout_options(old))
    adopt(new, q, k, v, old.proj)
    return new


def explicit_channels(old: Any) -> nn.Module:
    """The same attention, with queries, keys and values apart.

    Args:
        old: an ``XCA`` of timm's XCiT or a ``CrossCovarianceAttn`` of its EdgeNeXt.
    """
    new = ExplicitChannelAttention(*_sizes(old, old.proj), **dropout_options(old))
    unpack(new, old.qkv, old.proj)
    new.temperature = old.temperature
    return new


def _sizes(old: Any, layer: nn.Linear) -> tuple[int, int]:
    return old.num_heads, layer.out_features // old.num_heads
