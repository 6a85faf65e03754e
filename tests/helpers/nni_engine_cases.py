"""Networks that NNI's ModelSpeedup fails on, or that our own engine has to get right."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tp_importance.testing.networks import conv_bn_relu, head


def shuffled(x: Tensor) -> Tensor:
    """The channel shuffle of ShuffleNet, two groups."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)


class ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        depthwise = [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width)]
        self.branch = nn.Sequential(conv_bn_relu(width, width, 1), *depthwise, conv_bn_relu(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, dim=1)
        return shuffled(torch.cat([kept, self.branch(x)], 1))


class ShuffleNet(nn.Module):
    """Two units of ShuffleNet-v2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = conv_bn_relu(3, 16), nn.Sequential(ShuffleUnit(8), ShuffleUnit(8))
        self.last, self.fc = conv_bn_relu(16, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.units(self.stem(x))).mean((2, 3)))


class Twice(nn.Module):
    """A convolution that runs twice, the second time on its own outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.tail = conv_bn_relu(3, 8), conv_bn_relu(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.shared(self.shared(self.stem(x))))


class SharedHead(nn.Module):
    """A head that two levels of a pyramid share."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv_bn_relu(3, 8), conv_bn_relu(8, 8)
        self.head, self.out = conv_bn_relu(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        return torch.cat([self.out(self.head(level)).mean((2, 3)) for level in (fine, coarse)], 1)


class SuperResolution(nn.Module):
    """A convolution, PixelShuffle, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.up, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.PReLU(4)
        self.tail = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.act(F.pixel_shuffle(self.up(F.relu(self.body(x))), 2)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches, class token, positions, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.rand(1, 1, 16))
        self.positions = nn.Parameter(torch.rand(1, 5, 16))
        self.blocks, self.norm = nn.Sequential(TransformerBlock(), TransformerBlock()), nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def convnext() -> nn.Module:
    block = pytest.importorskip("torchvision.models.convnext").CNBlock
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), block(16, 1.0, 0.0), block(16, 1.0, 0.0), head(16))


class Scaled(nn.Module):
    """A raw parameter with one entry per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(F.relu(self.conv(x)) * self.scale)


class Branching(nn.Module):
    """Control flow on tensors, which no symbolic trace follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        negative = bool((x < 0).any())
        x = self.conv(x)
        return self.tail(F.relu(x) if negative else x)


def dead_consumer() -> nn.Module:
    """NNI takes a convolution of zeros for dead, and everything before it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    nn.init.zeros_(model[2].weight)
    return model


def channel_shuffle() -> nn.Module:
    """A channel shuffle as a module."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1))


def pixel_unshuffle() -> nn.Module:
    """Every channel becomes four."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(32, 4, 1))
