"""Sound and text: one-dimensional convolutions and recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Network, image, tensor
from benchmarks.zoo.own.images import conv_bn


class DilatedBlock(nn.Module):
    """Gated residual block of a WaveNet."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation)
        self.out, self.norm = nn.Conv1d(width, width, 1), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return x + self.norm(self.out(torch.tanh(value) * torch.sigmoid(gate)))


class Audio(nn.Module):
    """Classifies a waveform."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        stem = [nn.Conv1d(1, 32, 80, 16, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(4)]
        self.stem = nn.Sequential(
            *stem, nn.Conv1d(32, width, 3, padding=1, bias=False), nn.BatchNorm1d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(DilatedBlock(width, 2**i) for i in range(4)))
        self.depthwise = nn.Sequential(nn.Conv1d(width, width, 5, padding=2, groups=width), nn.Conv1d(width, 128, 1))
        self.head = nn.Linear(128, 35)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.depthwise(self.blocks(self.stem(x)))).mean(2))


class CRNN(nn.Module):
    """Reads a line of text: convolutions, then two LSTMs over the columns."""

    def __init__(self, classes: int = 37) -> None:
        super().__init__()
        pool = nn.MaxPool2d((2, 1))
        self.features = nn.Sequential(
            *(conv_bn(1, 32), nn.MaxPool2d(2), conv_bn(32, 64), nn.MaxPool2d(2)),
            *(conv_bn(64, 128), pool, conv_bn(128, 128), pool),
        )
        self.lstm = nn.LSTM(256, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)  # (n, channels, height, columns)
        return self.head(self.lstm(y.permute(0, 3, 1, 2).flatten(2))[0])


class TextCNN(nn.Module):
    """Embedded words, convolutions of three lengths, the largest value of each."""

    def __init__(self, words: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 48, k) for k in (3, 4, 5))
        self.head = nn.Linear(3 * 48, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).amax(2) for conv in self.convs], 1))


def _words(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 1000, (4, 40), generator=generator)


def networks() -> Iterator[Network]:
    yield Network("audio", "own", Audio, tensor(2, 1, 16000), note="one-dimensional, gated")
    yield Network(
        "crnn", "own", CRNN, lambda g: image(32, channels=1, n=2)(g).repeat(1, 1, 1, 4), note="convolutions and LSTMs"
    )
    yield Network("text-cnn", "own", TextCNN, _words, note="integer inputs, an embedding")
