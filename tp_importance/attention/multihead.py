"""``torch.nn.MultiheadAttention`` with sizes that are attributes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import HeadAttention, linear, part

__all__ = ["ExplicitMultiheadAttention", "explicit_multihead"]


class ExplicitMultiheadAttention(HeadAttention):
    """What ``torch.nn.MultiheadAttention`` computes, with the same arguments of its forward pass.

    ``nn.TransformerEncoderLayer`` does not hand it to the fused kernel of torch, which knows one size of heads only: it
    calls it in eval mode, too. Nested tensors, which ``nn.TransformerEncoder`` makes of padded batches, are padded here
    and nested again.

    Args:
        num_heads: heads.
        head_dim: size of a query and of a key.
        value_dim: size of a value; default ``head_dim``.
        scale: default ``head_dim ** -0.5``.
        embed_dim: width of queries and output; default ``num_heads * value_dim``.
        kdim: width of keys; default ``embed_dim``.
        vdim: width of values; default ``embed_dim``.
        dropout: of the attention weights, in training.
        batch_first: whether inputs and outputs are (batch, sequence, width) or (sequence, batch, width).
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> attention, x = ExplicitMultiheadAttention(4, 8, batch_first=True), torch.randn(2, 5, 32)
        >>> [t.shape for t in attention(x, x, x)]
        [torch.Size([2, 5, 32]), torch.Size([2, 5, 5])]
    """

    _qkv_same_embed_dim = False
    """Read by ``nn.TransformerEncoderLayer``: keeps it from the fused kernel."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        scale: float | None = None,
        embed_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        batch_first: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, value_dim, scale, embed_dim, kdim, vdim, device=device, dtype=dtype)
        self.dropout, self.batch_first = dropout, batch_first

    @property
    def embed_dim(self) -> int:
        """Width of the queries."""
        return self.q_proj.in_features

    @property
    def kdim(self) -> int:
        """Width of the keys."""
        return self.k_proj.in_features

    @property
    def vdim(self) -> int:
        """Width of the values."""
        return self.v_proj.in_features

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The weights of queries, keys and values below each other, if they fit: ``nn.TransformerEncoder`` asks."""
        weights: list[Tensor] = [layer.weight for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return torch.cat(weights) if len({w.shape[1] for w in weights}) == 1 else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The biases behind each other, if there are any."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        return torch.cat(biases) if biases else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: ``(N, L, embed_dim)``, ``(L, N, embed_dim)`` unless ``batch_first``, or without N.
            key: with S for L and ``kdim``.
            value: with S for L and ``vdim``.
            key_padding_mask: ``(N, S)`` or ``(S,)``: true where a key is padding, or numbers that are added.
            need_weights: whether to return the weights as well.
            attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``: true where a query may not look, or numbers.
            average_attn_weights: whether the weights are averaged over the heads.
            is_causal: says that ``attn_mask`` is the causal one.

        Returns:
            The outputs, shaped as ``query``; and the weights, ``(N, L, S)`` or ``(N, num_heads, L, S)``, or ``None``.

        Raises:
            ValueError: if a mask or an input has another shape, or nested tensors are no plain self-attention.
            RuntimeError: for ``is_causal`` without a mask, as by torch.
        """
        if any(x.is_nested for x in (query, key, value)):
            if query is not key or key is not value or key_padding_mask is not None or attn_mask is not None:
                raise ValueError("nested tensors are attended to in self-attention without masks only")
            return self._nested(query, need_weights, average_attn_weights)
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            raise ValueError(
                "query, key and value must have 3 dimensions each, or 2 without a batch, not "
                f"{query.dim()}, {key.dim()} and {value.dim()}"
            )
        batched, rows_first = query.dim() == 3, query.dim() == 3 and not self.batch_first
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif rows_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self.project(query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says what attn_mask is; give the mask, too")
        by_flag = is_causal and key_padding_mask is None and not need_weights
        mask = None if by_flag else self._merged(attn_mask, key_padding_mask, q, k)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            products = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.dropout((products if mask is None else products + mask).softmax(-1), p)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=p, is_causal=by_flag, scale=self.scale
            )
        out = self.out_proj(out.transpose(1, 2).flatten(-2))  # samples first, for whoever watches the layer
        # sequence first in memory, as by torch: dropout behind it draws its numbers in that order
        out = out.transpose(0, 1).contiguous()
        out = out if rows_first else out.transpose(0, 1)
        return (out, weights) if batched else (out[0], None if weights is None else weights[0])

    def _merged(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added, broadcast to ``(N, num_heads, L, S)``."""
        batch, rows, columns = q.shape[0], q.shape[2], k.shape[2]
        mask = None
        if attn_mask is not None:
            every = (batch * self.num_heads, rows, columns)
            if attn_mask.shape not in (every, every[1:]):
                raise ValueError(f"attn_mask must have shape {every[1:]} or {every}, not {tuple(attn_mask.shape)}")
            mask = _added(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.reshape(batch, self.num_heads, rows, columns)
        if padding is not None:
            if padding.shape != (batch, columns):
                raise ValueError(f"key_padding_mask must have shape {(batch, columns)}, not {tuple(padding.shape)}")
            ends = _added(padding, q.dtype)[:, None, None]
            mask = ends if mask is None else mask + ends
        return mask

    def _nested(self, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        lengths = [len(sequence) for sequence in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        out, weights = self(padded, padded, padded, padding, need_weights, None, average)
        sequences = [sequence[:length] for sequence, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(sequences), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def explicit_multihead(old: Any) -> nn.Module:
    """The same attention from linear layers.

    Args:
        old: an ``nn.MultiheadAttention``.

    Raises:
        ValueError: if it adds keys and values of its own.
    """
    if old.bias_k is not None or old.bias_v is not None or old.add_zero_attn:
        raise ValueError("it adds a key and a value of its own (add_bias_kv or add_zero_attn)")
    width = old.embed_dim
    new = ExplicitMultiheadAttention(
        old.num_heads,
        width // old.num_heads,
        dropout=old.dropout,
        batch_first=old.batch_first,
        device="meta",
    )
    weights = [old.q_proj_weight, old.k_proj_weight, old.v_proj_weight]
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        packed = weights[i] is None
        weight = part(old.in_proj_weight, i * width, width) if packed else weights[i]
        bias = None if old.in_proj_bias is None else part(old.in_proj_bias, i * width, width)
        setattr(new, name, linear(weight, bias))
    new.out_proj = linear(old.out_proj.weight, old.out_proj.bias)
    return new
