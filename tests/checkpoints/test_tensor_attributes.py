"""Tensors that modules keep without registering them."""

import warnings

import torch
from torch import nn

from tp_importance import load_pruned, save_pruned


class Detector(nn.Module):
    """Computes its anchors when the size of its input changes, as heads of YOLO do."""

    shape, anchors = None, torch.empty(0)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        if self.shape != x.shape:
            self.shape, self.anchors = x.shape, torch.arange(float(x.shape[-1]))
        return self.conv(x) + self.anchors


def test_a_network_that_has_run_runs_again(path):
    model, x = Detector(), torch.randn(1, 3, 5, 5)
    expected = model(x)
    save_pruned(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_pruned(Detector, path)
    assert torch.equal(again(x), expected) and again(x[..., :4]).shape == (1, 4, 5, 4)


def test_other_tensors_come_from_the_file_if_they_are_small(path):
    model, small, large = Detector(), Detector(), torch.zeros(2**20 + 1)
    model.anchors = torch.arange(6.0)[::2]
    save_pruned(model, path)
    assert torch.equal(load_pruned(lambda: small, path).anchors, torch.tensor([0.0, 2.0, 4.0]))
    model.anchors, small.anchors = torch.ones(2**20 + 1), large
    save_pruned(model, path)
    assert load_pruned(lambda: small, path).anchors is large
