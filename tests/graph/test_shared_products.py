"""Weights that all heads, or all channels of another axis, are multiplied with: the cost follows how many are left."""

import copy

import pytest
import torch
from torch import nn

from tp_importance import count_ops, prunable_groups
from tp_importance.graph.cost import CostModel
from tp_importance.graph.surgery import remove_units

X = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))


class RelativeKeys(nn.Module):
    """Queries meet keys and learned distances, one per pair of positions, which all heads share."""

    def __init__(self, way):
        super().__init__()
        self.heads, self.dim, self.way = 4, 8, way
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.distance = nn.Parameter(torch.randn(5, 5, 8))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * self.dim**-0.5
        if self.way == "einsum":
            scores = scores + torch.einsum("bhid,ijd->bhij", q, self.distance)
        elif self.way == "matmul":  # as segment-anything does: heads are part of the batch
            rows = q.reshape(b * self.heads, n, self.dim).transpose(0, 1)
            scores = scores + (rows @ self.distance.mT).transpose(0, 1).reshape(scores.shape)
        else:
            scores = scores + nn.functional.linear(q, self.distance[0])
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


def net(way):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 32), RelativeKeys(way), nn.LayerNorm(32), nn.Linear(32, 3)).eval()


@pytest.mark.parametrize("count_attention", [True, False])
@pytest.mark.parametrize("way", ["einsum", "matmul", "linear"])
def test_the_cost_follows_the_heads_that_share_a_parameter(way, count_attention):
    model = net(way)
    groups = prunable_groups(model, X, count_attention=count_attention)
    assert {g.name: g.n_units for g in groups} == {"0": 32, "1.qkv": 4, "1.out": 32}
    cost = CostModel.from_groups(groups)
    assert cost.dense.macs == count_ops(model, X, attention=count_attention)[0]
    small = copy.deepcopy(model)
    gone = {"0": list(range(12)), "1.qkv": [0, 1, 3], "1.out": [4]}
    remove_units(prunable_groups(small, X, verify=False), gone)
    left = cost.evaluate([g.n_units - len(gone[g.name]) for g in groups])
    assert tuple(left) == count_ops(small, X, attention=count_attention)


class Mixer(nn.Module):
    """A layer mixes positions, for every channel by itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.tokens, self.head = (
            nn.Linear(7, 12),
            nn.LayerNorm(12),
            nn.Linear(5, 5),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.norm(x + self.tokens(x.mT).mT))


def test_a_layer_that_runs_once_per_channel_keeps_them():
    torch.manual_seed(0)
    groups = prunable_groups(Mixer().eval(), X)
    (reason,) = [e.reason for e in groups.excluded if e.name == "stem"]
    assert reason == "tokens (Linear) runs once for every one of its channels" and not len(groups)


class PerGroup(nn.Module):
    """One small weight for each of four blocks of channels, not attention; a sum over positions that nobody counts."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.stem, self.small, self.head = dim, nn.Linear(7, 4 * dim), nn.Linear(dim, 3), nn.Linear(12, 2)

    def forward(self, x):
        blocks = self.stem(x).relu().unflatten(-1, (4, -1))
        blocks = torch.ones(5, 5).tril() @ blocks.transpose(1, 2)
        return self.head(nn.functional.linear(blocks, self.small.weight).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("dim", "units"), [(6, 6), (2, 2)])
def test_blocks_of_channels_are_no_axis_that_goes(dim, units):
    torch.manual_seed(0)
    model = PerGroup(dim).eval()
    groups = prunable_groups(model, X)
    assert {g.name: g.n_units for g in groups} == {"stem": units, "small": 3}
    cost = CostModel.from_groups(groups)
    remove_units(groups, {"stem": [0]})
    assert tuple(cost.evaluate([units - 1, 3])) == count_ops(model, X)


class Shared(nn.Module):
    """A parameter is multiplied from the left, which is not counted, and from the right, which is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(7, 4), nn.Linear(7, 5), nn.Linear(4, 3), nn.Linear(5, 3)
        self.mix = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        return self.c(self.mix @ self.a(x).relu()) + self.d(nn.functional.linear(self.b(x), self.mix))


def test_what_another_use_of_a_weight_costs_stays():
    torch.manual_seed(0)
    model = Shared().eval()
    groups = prunable_groups(model, X)
    assert groups.names == ["a"]
    cost = CostModel.from_groups(groups)
    remove_units(groups, {"a": [0, 2]})
    assert tuple(cost.evaluate([2])) == count_ops(model, X)
