"""Attention from four linear layers that keeps the number and the sizes of its heads as attributes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DroppingAttention", "HeadAttention", "adopt", "dropout_options", "linear", "part", "unpack"]


class HeadAttention(nn.Module):
    r"""Projections, heads and their sizes; what derived classes do with them is their ``forward``.

    A head h computes :math:`\operatorname{softmax}(s\, Q_h K_h^\top + M)\, V_h`; the heads lie behind each other in the
    outputs of the projections. No size is derived from the width of an input, so a head can go (``num_heads``), a
    dimension of all queries and keys (``head_dim``), or one of all values (``value_dim``). The factor s is a number of
    its own and stays as it is.

    Attributes:
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value.
        scale: the factor s.
        q_proj: to ``num_heads * head_dim`` channels.
        k_proj: to as many.
        v_proj: to ``num_heads * value_dim`` channels.
        out_proj: from as many.

    Args:
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value; default ``head_dim``.
        scale: default ``head_dim ** -0.5``.
        embed_dim: width of queries and output; default ``num_heads * value_dim``.
        kdim: width of keys; default ``embed_dim``.
        vdim: width of values; default ``embed_dim``.
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
        kdim: int | None = None,
        vdim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        width = num_heads * self.value_dim if embed_dim is None else embed_dim
        self.q_proj = nn.Linear(width, num_heads * head_dim, device=device, dtype=dtype)
        self.k_proj = nn.Linear(width if kdim is None else kdim, num_heads * head_dim, device=device, dtype=dtype)
        self.v_proj = nn.Linear(width if vdim is None else vdim, num_heads * self.value_dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(num_heads * self.value_dim, width, device=device, dtype=dtype)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values per head.

        Args:
            query: ``(..., L, embed_dim)``.
            key: ``(..., S, kdim)``.
            value: ``(..., S, vdim)``.

        Returns:
            ``(..., num_heads, L, head_dim)``, ``(..., num_heads, S, head_dim)``, ``(..., num_heads, S, value_dim)``.
        """
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q = q.reshape(*q.shape[:-1], self.num_heads, self.head_dim)
        k = k.reshape(*k.shape[:-1], self.num_heads, self.head_dim)
        v = v.reshape(*v.shape[:-1], self.num_heads, self.value_dim)
        return q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """What the heads make of it, side by side, before the output projection.

        Args:
            q: ``(..., num_heads, L, head_dim)``.
            k: ``(..., num_heads, S, head_dim)``.
            v: ``(..., num_heads, S, value_dim)``.
            mask: added to the products; broadcast to ``(..., num_heads, L, S)``.
            dropout: of the weights, in training.

        Returns:
            ``(..., L, num_heads * value_dim)``.
        """
        p = dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=self.scale)
        return out.transpose(-3, -2).flatten(-2)


class DroppingAttention(HeadAttention):
    """Attention with two rates of dropout.

    Args:
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value; default ``head_dim``.
        scale: default ``head_dim ** -0.5``.
        embed_dim: width of inputs and outputs; default ``num_heads * value_dim``.
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
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, value_dim, scale, embed_dim, device=device, dtype=dtype)
        self.attention_dropout, self.dropout = attention_dropout, dropout

    def finish(self, heads: Tensor) -> Tensor:
        """Output projection and dropout of ``(..., L, num_heads * value_dim)``."""
        return F.dropout(self.out_proj(heads), self.dropout, self.training)


def linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A layer with these very parameters.

    Args:
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``, or none.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer


def part(parameter: Tensor, start: int, size: int) -> nn.Parameter:
    """Rows of a parameter as a parameter of their own, trained if that one is.

    Args:
        parameter: ``(rows, ...)``.
        start: the first row.
        size: how many.
    """
    rows = parameter.detach()[start : start + size].clone()
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


def adopt(new: HeadAttention, q: Any, k: Any, v: Any, out: Any) -> None:
    """Give an attention the weights of four layers.

    Args:
        new: the attention, changed.
        q: to queries.
        k: to keys.
        v: to values.
        out: the output projection.
    """
    for name, layer in zip(("q_proj", "k_proj", "v_proj", "out_proj"), (q, k, v, out), strict=True):
        setattr(new, name, linear(layer.weight, layer.bias))


def unpack(new: HeadAttention, packed: nn.Linear, out: Any) -> None:
    """Give an attention the weights of one layer for queries, keys and values, and those of its output projection.

    Args:
        new: the attention, changed.
        packed: to queries, keys and values behind each other.
        out: the output projection.
    """
    size = packed.out_features // 3
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        bias = None if packed.bias is None else part(packed.bias, i * size, size)
        setattr(new, name, linear(part(packed.weight, i * size, size), bias))
    new.out_proj = linear(out.weight, out.bias)


def dropout_options(old: Any) -> dict[str, Any]:
    """Both rates of dropout of a module of timm, and that the parameters of the new one need no memory.

    Args:
        old: with ``attn_drop`` and ``proj_drop``, or without.
    """
    rates = {name: getattr(old, name, None) for name in ("attn_drop", "proj_drop")}
    p = {name: 0.0 if layer is None else layer.p for name, layer in rates.items()}
    return {"attention_dropout": p["attn_drop"], "dropout": p["proj_drop"], "device": "meta"}
