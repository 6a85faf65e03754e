"""What code of networks does to tensors between their layers; sizes follow the tensor unless they are given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    return x.clone().add_(y)


def multiply(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def concatenate(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def gate(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.sigmoid(y)


def scale(x: Tensor, factors: Tensor) -> Tensor:
    """Per channel; the factors have shape (C,)."""
    return x * factors.view(-1, *[1] * (x.dim() - 2))


def pooled(x: Tensor) -> Tensor:
    """Mean over all pixels, shape (n, C)."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


def pooled_map(x: Tensor) -> Tensor:
    """The same with axes of length one."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def as_map(x: Tensor, dims: int) -> Tensor:
    """Shape (n, C) with axes of length one behind."""
    return x[(...,) + (None,) * dims]


def channel_mean(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def chunk(x: Tensor, pieces: int) -> tuple[Tensor, ...]:
    return x.chunk(pieces, 1)


def split_at(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """At places that the code fixes."""
    return x.split(sizes, 1)


def slice_of(x: Tensor, start: int | None, stop: int | None) -> Tensor:
    return x[:, start:stop]


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """By slices at half of the width."""
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle; the number of groups is fixed."""
    n, c, *pixels = x.shape
    return x.view(n, groups, c // groups, *pixels).transpose(1, 2).reshape(n, c, *pixels)


def flip(x: Tensor) -> Tensor:
    return x.flip(1)


def pad_channels(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.dim() - 2) + [before, after])


def flatten(x: Tensor) -> Tensor:
    return x.flatten(1)


def merge_pixels(x: Tensor) -> Tensor:
    return x.flatten(2)


def to_map(x: Tensor, pixels: tuple[int, ...]) -> Tensor:
    """Features back to a map of any number of channels."""
    return x.view(x.shape[0], -1, *pixels)


def to_fixed_map(x: Tensor, channels: int, pixels: tuple[int, ...]) -> Tensor:
    """Features back to a map of so many channels."""
    return x.unflatten(1, (channels, *pixels))


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def maximum_pool(x: Tensor) -> Tensor:
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3](x, 2)


def average_pool(x: Tensor) -> Tensor:
    return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3](x, 2)


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def root_mean_square(x: Tensor) -> Tensor:
    """RMS norm of every pixel, written out."""
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def unit_length(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(1)


def total(*parts: Tensor) -> Tensor:
    return torch.stack(parts).sum(0)
