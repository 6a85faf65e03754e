"""Copies of networks that share the values of their parameters."""

import copy

import torch
import torch_pruning as tp
from torch import nn

from tp_importance import prunable_groups
from tp_importance.core.copies import copied
from tp_importance.graph import oracle


def network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Conv2d(2, 2, 1))
    net[3].weight.requires_grad_(False)
    net.append(nn.Conv2d(2, 2, 1))[5].weight = net[4].weight
    return net.eval()


def test_other_parameters_in_the_same_memory():
    net = network()
    twin = copied(net, shared=[net[0].weight, net[3].weight, net[4].weight])
    for at in (0, 3, 4):
        own, other = net[at].weight, twin[at].weight
        assert other is not own and other.data_ptr() == own.data_ptr()
        assert isinstance(other, nn.Parameter) and other.requires_grad == own.requires_grad
    assert twin[5].weight is twin[4].weight  # what is tied stays tied
    assert twin[0].bias.data_ptr() != net[0].bias.data_ptr()
    assert twin[1].running_mean.data_ptr() != net[1].running_mean.data_ptr()


def test_other_kinds_of_parameters_are_copied():
    net = nn.Linear(2, 2)
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    assert copied(net).weight.data_ptr() != net.weight.data_ptr()
    assert copied(frozen, shared=frozen.parameters()).weight.data_ptr() != frozen.weight.data_ptr()


def test_verification_copies_no_weights(monkeypatch):
    net, shares = network(), []

    def noting(model, *, shared=()):
        shared = list(shared)
        shares.append({id(p) for p in shared})
        assert shares[-1] == {id(p) for p in model.parameters()}
        return copied(model, shared=shared)

    monkeypatch.setattr(oracle, "copied", noting)
    before = copy.deepcopy(net.state_dict())
    assert prunable_groups(net, torch.randn(1, 3, 8, 8)).names == ["0"]
    assert shares
    assert all(torch.equal(before[name], now) for name, now in net.state_dict().items())


def test_pruners_of_the_users_get_weights_of_their_own(monkeypatch):
    """Nobody knows what these write into."""

    class Mine(nn.Conv2d):
        pass

    net = network()
    net[3].__class__ = Mine
    lengths = []

    def noting(model, *, shared=()):
        lengths.append(len(list(shared)))
        return copied(model)

    monkeypatch.setattr(oracle, "copied", noting)
    prunable_groups(net, torch.randn(1, 3, 8, 8), customized_pruners={Mine: tp.function.ConvPruner()})
    assert lengths and not any(lengths)
