"""Attention whose queries and keys are turned by their positions, and attention with a learned bias of positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import DroppingAttention, adopt, dropout_options, unpack

__all__ = ["ExplicitPositionAttention", "ExplicitRotaryAttention", "explicit_positions", "explicit_rotary", "rotated"]


class ExplicitRotaryAttention(DroppingAttention):
    """Self-attention with rotary positions: EVA-02, and the DINOv3 models of timm.

    Args:
        arguments: as of the base class.
        prefix_tokens: tokens in front that have no position.
        rotate_half: whether entry i of a query is turned with entry i + d / 2, rather than 2 i with 2 i + 1.
        options: as of the base class.

    Attributes:
        q_norm: of every query; default nothing.
        k_norm: of every key; default nothing.
        norm: of the heads side by side; default nothing.
        gate: from inputs to what the heads side by side are multiplied with, before a sigmoid; default nothing.
    """

    def __init__(self, *arguments: Any, prefix_tokens: int = 1, rotate_half: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prefix_tokens, self.rotate_half = prefix_tokens, rotate_half
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.gate: nn.Module | None = None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(N, T, embed_dim)``.
            rope: sines and cosines behind each other, ``(..., T - prefix_tokens, 2 * head_dim)``.
            attn_mask: added to the products, or where it is boolean, of what is looked at.
            is_causal: look at no later token.

        Returns:
            The outputs, shaped as ``x``.
        """
        q, k, v = self.project(x, x, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._turned(t, rope).type_as(v) for t in (q, k))
        p = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, p, is_causal, scale=self.scale)
        heads = self.norm(out.transpose(-3, -2).flatten(-2))
        return self.finish(heads if self.gate is None else heads * self.gate(x).sigmoid())

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        first = x[..., : self.prefix_tokens, :]
        return torch.cat([first, rotated(x[..., self.prefix_tokens :, :], rope, half=self.rotate_half)], -2)


class ExplicitPositionAttention(DroppingAttention):
    """Self-attention with a bias per head and pair of positions: the relative position models of timm.

    Args:
        arguments: as of the base class.
        options: as of the base class.

    Attributes:
        q_norm: of every query; default nothing.
        k_norm: of every key; default nothing.
        rel_pos: its ``get_bias()`` makes the bias; default nothing.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.rel_pos: Any = None

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``(N, T, embed_dim)``.
            shared_rel_pos: the bias, if this module makes none.

        Returns:
            The outputs, shaped as ``x``.
        """
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        q, k, v = self.project(x, x, x)
        return self.finish(self.attend(self.q_norm(q), self.k_norm(k), v, bias, self.attention_dropout))


def rotated(x: Tensor, rope: Tensor, *, half: bool) -> Tensor:
    r"""Pairs of entries turned by an angle: :math:`x \cos\varphi + J x \sin\varphi`, where J maps (a, b) to (-b, a).

    Args:
        x: ``(..., d)``.
        rope: sines and cosines behind each other, ``(..., 2 * d)``.
        half: whether entry i belongs to i + d / 2, rather than 2 i to 2 i + 1.
    """
    sine, cosine = rope.chunk(2, -1)
    if half:
        one, other = x.chunk(2, -1)
        turned = torch.cat([-other, one], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cosine + turned * sine


def explicit_rotary(old: Any) -> nn.Module:
    """The same attention, with queries, keys and values apart.

    Args:
        old: an ``EvaAttention`` of timm.
    """
    options = {"prefix_tokens": old.num_prefix_tokens, "rotate_half": getattr(old, "rotate_half", False)}
    sizes = (old.num_heads, old.head_dim, None, old.scale, old.proj.out_features)
    new = ExplicitRotaryAttention(*sizes, **options, **dropout_options(old))
    if old.qkv is None:
        adopt(new, old.q_proj, old.k_proj, old.v_proj, old.proj)
    else:
        unpack(new, old.qkv, old.proj)
        new.q_proj.bias, new.v_proj.bias = old.q_bias, old.v_bias  # that of keys is a buffer of zeros
    new.q_norm, new.k_norm, new.norm, new.gate = old.q_norm, old.k_norm, old.norm, getattr(old, "gate", None)
    return new


def explicit_positions(old: Any) -> nn.Module:
    """The same attention, with queries, keys and values apart.

    Args:
        old: a ``RelPosAttention`` of timm.
    """
    sizes = (old.num_heads, old.head_dim, None, old.scale, old.proj.out_features)
    new = ExplicitPositionAttention(*sizes, **dropout_options(old))
    unpack(new, old.qkv, old.proj)
    new.q_norm, new.k_norm, new.rel_pos = old.q_norm, old.k_norm, old.rel_pos
    return new
