"""Functions that read parameters, in modules, for tests of counting."""

import torch
from torch import nn
from torchvision.ops import deform_conv2d

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """One function of an input of shape (2, 6, 8) and a parameter."""

    def __init__(self, fn, *shapes):
        super().__init__()
        self.fn = fn
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.register_buffer("constant", torch.randn(8, 8))

    def forward(self, x):
        return self.fn(self, x, *self.weights)


def mean(x):
    return x.mean((0, 2, 3))


def deform(m, x):
    return deform_conv2d(x, x.new_zeros(len(x), 18, 8, 8), m.w * mean(x)[:, None, None], padding=1)
