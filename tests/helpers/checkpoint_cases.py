"""Pruned networks for tests of files."""

from functools import partial

import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18

resnet = partial(resnet18, num_classes=10)
mobilenet = partial(mobilenet_v3_small, num_classes=10)


def assert_same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name
    assert [str(m) for m in a.modules()] == [str(m) for m in b.modules()]


class Split(nn.Module):
    def __init__(self, sizes=(4, 4), label="dense"):
        super().__init__()
        self.sizes = list(sizes)
        self.counts = tuple(sizes)
        self.label = label
        self.enabled = True
        self.scale = nn.Parameter(torch.randn(sum(sizes)))
        self.weights = nn.ParameterList([torch.randn(s) for s in sizes])
        self.blocks = nn.ModuleList([nn.Linear(s, 2) for s in sizes])
        self.register_buffer("mask", torch.rand(sum(sizes)), persistent=False)

    def forward(self, x):
        parts = torch.split(x * self.scale * self.mask, self.sizes, dim=1)
        return sum(block(part * w) for block, part, w in zip(self.blocks, parts, self.weights, strict=True))
