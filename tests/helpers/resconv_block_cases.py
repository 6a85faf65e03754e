"""Small chains with residual convolutions."""

import torch
from torch import nn

from tp_importance.testing.networks import conv_bn_relu, head, randomise_batchnorm

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net(*middle: nn.Module, width: int = 8) -> nn.Sequential:
    """Stem, then `middle`, then a head."""
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn_relu(3, width), *middle, head(width))
    randomise_batchnorm(model, X)
    return model


def conv(kernel: int = 3, width: int = 8, **options) -> nn.Conv2d:
    options.setdefault("padding", options.get("dilation", 1) * (kernel - 1) // 2)
    return nn.Conv2d(width, width, kernel, **options)


def plain() -> nn.Sequential:
    return net(conv(bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.ReLU())
