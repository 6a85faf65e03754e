"""Transformers and a ConvNeXt as people write them by hand: norms written out, rotated queries, shared keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Network, image


class WrittenRMSNorm(nn.Module):
    """Root mean square norm over the last axis, in plain arithmetic."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: dimension i and the one half a head further, turned by the angle of the position."""
    cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], -1) * sin


class GroupedQueryAttention(nn.Module):
    """Several query heads share the keys and values of one; queries and keys are rotated by their positions."""

    def __init__(self, width: int, heads: int, kv_heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q = nn.Linear(width, heads * dim, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * dim, bias=False) for _ in range(2))
        self.out = nn.Linear(heads * dim, width, bias=False)
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(dim // 2) * 2 / dim))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            layer(x).view(n, t, heads, -1).transpose(1, 2)
            for layer, heads in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        angles = torch.arange(t, device=x.device)[:, None] * self.frequencies
        q, k = rotated(q, angles), rotated(k, angles)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, kv_heads: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = WrittenRMSNorm(width), WrittenRMSNorm(width)
        self.attention = GroupedQueryAttention(width, heads, kv_heads, dim)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class WordTransformer(nn.Module):
    """Classifies a text."""

    def __init__(
        self,
        width: int = 96,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 16,
        hidden: int = 192,
        depth: int = 3,
        words: int = 500,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(Block(width, heads, kv_heads, dim, hidden) for _ in range(depth)))
        self.norm, self.head = WrittenRMSNorm(width), nn.Linear(width, 7)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(words))).mean(1))


class ChannelsLastBlock(nn.Module):
    """Block of a ConvNeXt: a depthwise convolution; then channels last for a norm and an MLP, scaled by channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.Module):
    """Layer norm over the second axis, written out."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        y = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * y + self.bias[:, None, None]


class PermutedConvNeXt(nn.Module):
    """Layer norms over channels of both kinds: behind a permutation, and written out."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128), depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), ChannelsFirstNorm(widths[0]))
        self.stages = nn.ModuleList(nn.Sequential(*(ChannelsLastBlock(w) for _ in range(depth))) for w in widths)
        self.pools = nn.ModuleList(
            nn.Sequential(ChannelsFirstNorm(a), nn.Conv2d(a, b, 2, 2)) for a, b in pairwise(widths)
        )
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.stem(x))
        for pool, stage in zip(self.pools, self.stages[1:], strict=True):
            x = stage(pool(x))
        return self.head(self.norm(x.mean((2, 3))))


def _words(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 500, (2, 24), generator=generator)


def networks() -> Iterator[Network]:
    note = "norms written out, rotary embedding, grouped-query attention"
    yield Network("word-transformer", "own", WordTransformer, _words, note=note)
    yield Network("permuted-convnext", "own", PermutedConvNeXt, image(64, n=2), note="layer norms over channels")
