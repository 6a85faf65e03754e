"""Several inputs, several outputs, layers that run several times."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Network
from benchmarks.zoo.own.images import conv_bn


class Siamese(nn.Module):
    """Compares two images that one encoder has read."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 32), conv_bn(32, 64, stride=2), conv_bn(64, 64, stride=2))
        self.head = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = (self.encoder(x).mean((2, 3)) for x in (left, right))
        return self.head(torch.cat([(a - b).abs(), a * b], 1))


class SeveralTasks(nn.Module):
    """One trunk; a mask and classes in a dictionary. Its first layer sees the four pixels of every square."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(12, 32), conv_bn(32, 64, stride=2), conv_bn(64, 64))
        self.gate = nn.Conv2d(64, 1, 7, padding=3)
        self.mask = nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 2, 1))
        self.classes = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        squares = [image[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = self.trunk(torch.cat(squares, 1))
        x = x * torch.sigmoid(self.gate(x))
        return {"mask": self.mask(x), "classes": self.classes(F.adaptive_avg_pool2d(x, 1).flatten(1))}


def _pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32, generator=generator), torch.randn(2, 3, 32, 32, generator=generator)


def _named(generator: torch.Generator) -> dict[str, Tensor]:
    return {"image": torch.randn(2, 3, 64, 64, generator=generator)}


def networks() -> Iterator[Network]:
    yield Network("siamese", "own", Siamese, _pair, note="two inputs, one encoder that runs twice", planted=True)
    yield Network("several-tasks", "own", SeveralTasks, _named, note="inputs and outputs by name, a spatial gate")
