"""Weights and inputs without usable values: NaN, infinity, no values at all, values that nobody may write."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from torch import nn

from tp_importance import Budget, prunable_groups, prune, recalibrate_batchnorm
from tp_importance.core.copies import copied
from tp_importance.core.guards import written
from tp_importance.errors import TracingError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 2)
    )


def half(model: nn.Module, **options: object) -> float:
    done = prune(model, X, [X, X], budget=Budget(macs=0.5), **options)
    return done.report.cost.macs / done.report.dense.macs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers(value):
    """Nothing can be verified; the reason says why."""
    groups = prunable_groups(network(), X * value)
    assert not groups.names
    assert all("look for NaN and inf in the weights and in example_inputs" in e.reason for e in groups.excluded[1:])


class Masked(nn.Module):
    """Forbids one of its classes, as a detector or a language model does."""

    def __init__(self, leaks=False):
        super().__init__()
        self.body, self.leaks = network(), leaks

    def forward(self, x):
        forbidden = torch.tensor([False, True])
        if self.leaks:  # where infinity stands depends on how many channels there are
            forbidden = torch.tensor([self.body[0].out_channels == 8, True])
        return self.body(x).masked_fill(forbidden, -float("inf"))


def test_infinite_outputs_can_be_compared():
    groups = prunable_groups(Masked(), X)
    assert groups.names == ["body.0", "body.3"]
    assert half(Masked()) <= 0.5
    leaking = prunable_groups(Masked(leaks=True), X)
    assert "body.0" not in leaking.names
    assert "is infinite elsewhere than in the masked network" in {e.name: e.reason for e in leaking.excluded}["body.0"]


@pytest.mark.parametrize("x", [X, X.to("meta")])
def test_weights_without_values(x):
    with pytest.raises(TracingError, match="the weights are on the device meta, where tensors have no values: load"):
        prunable_groups(network().to("meta"), x)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(*sizes, 3, dtype=torch.complex64) for sizes in ((3, 8), (8, 2)))

    def forward(self, x):
        return self.b(self.a(x))


def test_complex_weights_are_not_followed():
    x = X.to(torch.complex64)
    with pytest.raises(
        ValueError, match=r"Complex has no group that can be pruned \(.*complex and quantized weights are"
    ):
        prune(Complex(), x, [x], budget=Budget(macs=0.5))


def inference_network() -> nn.Sequential:
    with torch.inference_mode():
        return network()


def test_a_network_made_in_inference_mode_is_pruned_but_not_written_into():
    assert half(inference_network(), refit=None) <= 0.5
    for refit in ("sequential", "parallel", "batchnorm"):
        model = inference_network()
        before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
        with pytest.raises(ValueError, match=r"0.weight was made in torch.inference_mode\(\).*give copy.deepcopy"):
            half(model, refit=refit)
        after = model.state_dict(keep_vars=True)
        assert all(id(after[name]) == i and torch.equal(after[name], t) for name, (i, t) in before.items())
    with pytest.raises(ValueError, match=r"0.weight was made in torch.inference_mode"):
        recalibrate_batchnorm(inference_network(), [X])
    assert half(copy.deepcopy(inference_network())) <= 0.5


def test_tensors_of_inference_mode_are_put_back():
    with torch.inference_mode():
        x = torch.zeros(2)
    with pytest.raises(KeyboardInterrupt), written([x]):
        with torch.inference_mode():
            x.fill_(1.0)
        raise KeyboardInterrupt
    assert x.tolist() == [0.0, 0.0]


class Writes(nn.Module):
    """Keeps a tensor with a gradient that is no parameter, and writes into it."""

    def __init__(self):
        super().__init__()
        self.body, self.seen = network(), torch.zeros(2, requires_grad=True)

    def forward(self, x):
        with torch.no_grad():
            self.seen.add_(1.0)
        return self.body(x)


def test_tensors_with_gradients_that_are_no_parameters_are_put_back():
    model = Writes()
    assert prunable_groups(model, X).names == ["body.0", "body.3"]
    assert model.seen.tolist() == [0.0, 0.0] and model.seen.requires_grad


def test_an_exported_network_is_refused():
    exported = torch.export.export(network().eval(), (X,)).module()
    with pytest.raises(TypeError, match=r"model was made by torch\.export and has neither layers nor an eval mode"):
        prunable_groups(exported, X)


def test_a_tensor_with_a_graph_in_a_deque_is_copied():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    net[0].seen = deque([net[0](torch.randn(1, 3, 4, 4))])
    assert copied(net)[0].seen[0].is_leaf and prunable_groups(net, torch.randn(1, 3, 4, 4)).names == ["0"]
