"""Networks that predict the noise in an image: group norms, concatenated skips, attention where the image is small."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Network


class TimedBlock(nn.Module):
    """Residual block of a diffusion model: group norms, and a shift by the time step."""

    def __init__(self, c_in: int, c_out: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(time, c_out)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialAttention(nn.Module):
    """Every pixel looks at all others; one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class DiffusionUNet(nn.Module):
    """Predicts the noise in an image at a time step.

    Args:
        widths: of the levels; each one halves the image.
        groups: norm groups everywhere.
        time: width of the embedded time step.
    """

    def __init__(self, widths: Sequence[int] = (32, 64), groups: int = 8, time: int = 128) -> None:
        super().__init__()
        self.frequencies, first, last = widths[0] // 2, widths[0], widths[-1]
        self.embed = nn.Sequential(nn.Linear(2 * self.frequencies, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, first, 3, padding=1)
        steps = list(pairwise([first, *widths]))
        self.down = nn.ModuleList(TimedBlock(a, b, time, groups) for a, b in steps)
        self.pool = nn.ModuleList(nn.Conv2d(b, b, 3, 2, 1) for b in widths)
        self.middle = nn.ModuleList(TimedBlock(last, last, time, groups) for _ in range(2))
        self.attention = SpatialAttention(last, groups)
        self.up = nn.ModuleList(TimedBlock(2 * b, a, time, groups) for a, b in reversed(steps))
        self.norm, self.head = nn.GroupNorm(groups, first), nn.Conv2d(first, 3, 3, padding=1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        n = self.frequencies
        angles = steps[:, None] * torch.exp(-math.log(1e4) * torch.arange(n, device=x.device) / n)
        t = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        x, skips = self.stem(x), []
        for block, pool in zip(self.down, self.pool, strict=True):
            skips.append(block(x, t))
            x = pool(skips[-1])
        x = self.middle[1](self.attention(self.middle[0](x, t)), t)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1), t)
        return self.head(F.silu(self.norm(x)))


def _noisy(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([17.0, 400.0])


def networks() -> Iterator[Network]:
    yield Network("diffusion-unet", "own", DiffusionUNet, _noisy, note="group norms, attention, two inputs")
    for first in (64, 128):
        widths = (first, 2 * first, 4 * first)
        build = partial(DiffusionUNet, widths, 32, 4 * first)
        note = f"widths {', '.join(map(str, widths))}, 32 norm groups, attention"
        yield Network(f"diffusion-unet-{first}", "own", build, _noisy, note=note)
