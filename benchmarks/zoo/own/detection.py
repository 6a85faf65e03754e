"""A small detector with the decoding head of YOLOv7, written in two ways."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Network, image
from benchmarks.zoo.own.images import conv_bn

ANCHORS = torch.tensor([[[12, 16], [19, 36], [40, 28]], [[36, 75], [76, 55], [72, 146]]], dtype=torch.float32)
VALUES = 85
"""Of an anchor: box, objectness, 80 classes; three anchors make 255 channels."""


class Layers(nn.Module):
    """Two branches over one input, all of their stages concatenated (ELAN)."""

    def __init__(self, c_in: int, width: int) -> None:
        super().__init__()
        self.left, self.right = conv_bn(c_in, width, 1), conv_bn(c_in, width, 1)
        self.more = nn.ModuleList(conv_bn(width, width) for _ in range(2))
        self.out = conv_bn(4 * width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.left(x), self.right(x)]
        for layer in self.more:
            parts.append(layer(parts[-1]))
        return self.out(torch.cat(parts, 1))


class Decoder(nn.Module):
    """Boxes from the 255 channels of a scale.

    Args:
        widths: channels of each scale.
        slices: decode by writing into slices, as YOLOv7 does; else by split and cat.
    """

    def __init__(self, widths: tuple[int, ...], slices: bool) -> None:
        super().__init__()
        self.slices = slices
        self.convs = nn.ModuleList(nn.Conv2d(width, 3 * VALUES, 1) for width in widths)
        self.register_buffer("anchors", ANCHORS)

    def forward(self, scales: list[Tensor]) -> Tensor:
        found = []
        for i, (conv, x) in enumerate(zip(self.convs, scales, strict=True)):
            x = conv(x)
            n, _, height, width = x.shape
            y = x.view(n, 3, VALUES, height, width).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            grid, size = torch.stack([columns, rows], 2).to(y), self.anchors[i].view(1, 3, 1, 1, 2)
            stride = 8 * 2**i
            if self.slices:
                y[..., 0:2] = (y[..., 0:2] * 2.0 - 0.5 + grid) * stride
                y[..., 2:4] = (y[..., 2:4] * 2) ** 2 * size
            else:
                centre, extent, rest = y.split((2, 2, VALUES - 4), 4)
                y = torch.cat([(centre * 2.0 - 0.5 + grid) * stride, (extent * 2) ** 2 * size, rest], 4)
            found.append(y.view(n, -1, VALUES))
        return torch.cat(found, 1)


class Detector(nn.Module):
    def __init__(self, slices: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2))
        self.eighth = nn.Sequential(Layers(32, 32), conv_bn(64, 64, stride=2))
        self.sixteenth = nn.Sequential(Layers(64, 64), conv_bn(128, 128, stride=2))
        self.down, self.joined = conv_bn(128, 64, 1), Layers(128, 64)
        self.head = Decoder((128, 128), slices)

    def forward(self, x: Tensor) -> Tensor:
        eighth = self.eighth(self.stem(x))
        sixteenth = self.sixteenth(eighth)
        up = nn.functional.interpolate(self.down(sixteenth), scale_factor=2.0)
        return self.head([self.joined(torch.cat([up, eighth], 1)), sixteenth])


def networks() -> Iterator[Network]:
    written = "decodes by view, permute, sigmoid and writing into slices"
    yield Network("yolov7-head", "own", lambda: Detector(True), image(320), note=written, quick=True)
    split = "decodes 255 channels by split and cat"
    yield Network("yolov7-head-split", "own", lambda: Detector(False), image(320), note=split, quick=True)
