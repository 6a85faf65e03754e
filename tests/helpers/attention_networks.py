"""Small networks with norms over channels and attention, in the ways in which libraries write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed(nn.Module):
    """One projection for queries, keys and values, reshaped to (3, heads, dimensions), as in timm."""

    def __init__(self, width: int, heads: int, dim: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.all, self.scale, self.fused = heads, dim, heads * dim, dim**-0.5, fused
        self.qkv, self.proj = nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, self.all))


class Separate(nn.Module):
    """Three projections, and a mask of positions that count, as in BERT; the scale follows the number of dimensions."""

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.q, self.k, self.v = (nn.Linear(width, heads * dim) for _ in range(3))
        self.out = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], -1, self.dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.mT / self.dim**0.5
        if counts is not None:
            scores = scores.masked_fill(~counts[:, None, None, :], -1e4)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """Several heads of queries share one of keys and values; rotary positions, as in Llama."""

    def __init__(self, width: int, heads: int, shared: int, dim: int) -> None:
        super().__init__()
        self.dim, self.times, self.scale = dim, heads // shared, dim**-0.5
        self.q, self.out = nn.Linear(width, heads * dim, bias=False), nn.Linear(heads * dim, width, bias=False)
        self.k, self.v = (nn.Linear(width, shared * dim, bias=False) for _ in range(2))
        self.register_buffer("frequencies", 10.0 ** -torch.linspace(0, 1, dim // 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], -1, self.dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1], device=x.device).to(x.dtype)[:, None] * self.frequencies
        angle = torch.cat([angle, angle], -1)
        q, k = (t * angle.cos() + self._rotated(t) * angle.sin() for t in (q, k))
        k, v = (t.repeat_interleave(self.times, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:-1], -1))

    @staticmethod
    def _rotated(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat([-x[..., half:], x[..., :half]], -1)


class Windows(nn.Module):
    """Shifted windows of 4 positions with a table of relative positions per head, as in Swin."""

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim, self.scale = heads, dim, dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)
        self.table = nn.Parameter(torch.randn(7, heads))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4) + 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        windows = x.roll(-2, 1).view(b * (n // 4), 4, c)
        qkv = self.qkv(windows).reshape(windows.shape[0], 4, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = q * self.scale @ k.mT + self.table[self.index.flatten()].view(4, 4, -1).permute(2, 0, 1)
        apart = torch.zeros(n // 4, 4, 4, device=x.device, dtype=x.dtype)
        apart[-1, :2, 2:] = apart[-1, 2:, :2] = -100.0
        scores = scores.view(b, n // 4, self.heads, 4, 4) + apart[None, :, None]
        y = scores.view(-1, self.heads, 4, 4).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(windows.shape[0], 4, -1)).view(b, n, c).roll(2, 1)


class NormedQueries(nn.Module):
    """Queries and keys are normalised over the dimensions of a head, as in ViT-22B."""

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.q, self.k, self.v = (nn.Linear(width, heads * dim) for _ in range(3))
        self.q_norm, self.k_norm = RMSNorm(dim), RMSNorm(dim)
        self.out = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


class RMSNorm(nn.Module):
    """Written out, as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and added to the stream."""

    def __init__(self, attention: nn.Module, width: int, hidden: int, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = attention, norm(width), norm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Images of 16 x 16 pixels in patches, with a class token and positions, or bare tokens."""

    def __init__(self, *blocks: nn.Module, width: int = 24, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), norm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Tokens(nn.Module):
    """The same without class token and positions: 16 tokens, averaged in the end."""

    def __init__(self, *blocks: nn.Module, width: int = 24, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), norm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


ATTENTION = {
    "packed": lambda: Encoder(*(Block(Packed(24, 3, 8, fused=False), 24, 40) for _ in range(2))),
    "packed, fused": lambda: Encoder(*(Block(Packed(24, 3, 8, fused=True), 24, 40) for _ in range(2))),
    "separate": lambda: Encoder(*(Block(Separate(24, 3, 8), 24, 40) for _ in range(2))),
    "grouped queries, rotary": lambda: Tokens(
        *(Block(Grouped(24, 6, 3, 8), 24, 40, RMSNorm) for _ in range(2)), norm=RMSNorm
    ),
    "shifted windows": lambda: Tokens(*(Block(Windows(24, 3, 8), 24, 40) for _ in range(2))),
    "normalised queries": lambda: Tokens(Block(NormedQueries(24, 3, 8), 24, 40)),
}
"""Networks of one or two blocks: three heads of eight dimensions, stream of 24, MLPs of 40; inputs (b, 3, 16, 16)."""
