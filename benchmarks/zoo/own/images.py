"""Image to image, and small classifiers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Network, image, tensor


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class PaddedBlock(nn.Module):
    """Residual block of the CIFAR ResNets; where the shape changes the shortcut is padded with zeros (option A)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.stride, self.more = (1, 0) if c_in == c_out else (2, c_out - c_in)
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, self.stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(y + x)


def padded_resnet(blocks: int) -> nn.Module:
    """CIFAR ResNet of 6·blocks + 2 layers."""
    widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
    layers = [PaddedBlock(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(conv_bn(3, 16), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class UNet(nn.Module):
    """Four levels, transposed convolutions upwards, concatenated skips."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(nn.Sequential(conv_bn(a, b), conv_bn(b, b)) for a, b in pairwise([3, *widths]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.join = nn.ModuleList(nn.Sequential(conv_bn(2 * a, a), conv_bn(a, a)) for a in widths[:-1])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, join, skip in reversed(list(zip(self.up, self.join, skips[:-1], strict=True))):
            x = join(torch.cat([skip, up(x)], 1))
        return self.head(x)


class TimedBlock(nn.Module):
    """Residual block of a diffusion model: group norms, and a shift by the time step."""

    def __init__(self, c_in: int, c_out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(time, c_out)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(8, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class DiffusionUNet(nn.Module):
    """Predicts the noise in an image at a time step."""

    def __init__(self, width: int = 32, time: int = 128) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.down2 = TimedBlock(width, width, time), TimedBlock(width, 2 * width, time)
        self.pool1, self.pool2 = nn.Conv2d(width, width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 2, 1)
        self.middle1, self.middle2 = TimedBlock(2 * width, 2 * width, time), TimedBlock(2 * width, 2 * width, time)
        self.attention = SpatialAttention(2 * width)
        self.up2, self.up1 = TimedBlock(4 * width, width, time), TimedBlock(2 * width, width, time)
        self.norm, self.head = nn.GroupNorm(8, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        half = self.width // 2
        angles = steps[:, None] * torch.exp(-math.log(1e4) * torch.arange(half, device=x.device) / half)
        t = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        one = self.down1(self.stem(x), t)
        two = self.down2(self.pool1(one), t)
        y = self.middle2(self.attention(self.middle1(self.pool2(two), t)), t)
        y = self.up2(torch.cat([F.interpolate(y, scale_factor=2.0), two], 1), t)
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2.0), one], 1), t)
        return self.head(F.silu(self.norm(y)))


def _noisy(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([17.0, 400.0])


def super_resolution() -> nn.Module:
    """Three times as many pixels, by a pixel shuffle in the middle and one at the end."""
    return nn.Sequential(
        *(nn.Conv2d(1, 64, 5, padding=2), nn.ReLU(), nn.Conv2d(64, 36, 3, padding=1), nn.PixelShuffle(3), nn.ReLU()),
        *(nn.Conv2d(4, 32, 3, 3, padding=1), nn.PReLU(32), nn.Conv2d(32, 9, 3, padding=1), nn.PixelShuffle(3)),
    )


def generator_network() -> nn.Module:
    """An image from noise, by transposed convolutions (DCGAN)."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(100, 256, 4, bias=False), nn.BatchNorm2d(256), nn.ReLU(True)]
    for a, b in pairwise((256, 128, 64, 32)):
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())


def perceptron() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128), nn.GELU()),
        nn.Linear(128, 10),
    )


def networks() -> Iterator[Network]:
    padded = "shortcuts padded with zeros"
    yield Network("resnet20-option-a", "own", lambda: padded_resnet(3), image(32, n=2), note=padded)
    yield Network("unet", "own", UNet, image(96), planted=True)
    yield Network("diffusion-unet", "own", DiffusionUNet, _noisy, note="group norms, attention, two inputs")
    yield Network("super-resolution", "own", super_resolution, image(32, channels=1), note="pixel shuffles")
    yield Network("dcgan", "own", generator_network, tensor(2, 100, 1, 1), note="transposed convolutions", planted=True)
    yield Network("perceptron", "own", perceptron, tensor(4, 1, 28, 28))
