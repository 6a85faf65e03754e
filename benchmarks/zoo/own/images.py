"""Image to image, and small classifiers."""

from __future__ import annotations

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
    yield Network("super-resolution", "own", super_resolution, image(32, channels=1), note="pixel shuffles")
    yield Network("dcgan", "own", generator_network, tensor(2, 100, 1, 1), note="transposed convolutions", planted=True)
    yield Network("perceptron", "own", perceptron, tensor(4, 1, 28, 28))
