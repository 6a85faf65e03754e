"""Heads of the new modules are units, verified; those of the modules that they replace are not."""

import pytest
import torch
from torch import nn

from tp_importance import Budget, explicit_attention, prunable_groups, prune
from tp_importance.attention.spatial import ExplicitSpatialAttention
from tp_importance.attention.tokens import (
    ExplicitChannelAttention,
    ExplicitClassAttention,
    ExplicitGroupedAttention,
    ExplicitReducedAttention,
    ExplicitTokenAttention,
    Reduction,
)
from tp_importance.attention.windows import ExplicitBiasedAttention, ExplicitWindowAttention

PROJECTIONS = {f"attention.{p}_proj" for p in ("q", "k", "v", "out")}


class Net(nn.Module):
    """Attention between two layers."""

    def __init__(self, attention, *size, like=nn.Linear):
        super().__init__()
        options = (1,) if like is nn.Conv2d else ()
        self.stem, self.attention, self.head = like(8, 32, *options), attention, like(32, 3, *options)
        self.size = size

    def forward(self, x):
        return self.head(self.attention(self.stem(x), *self.size))


def reduction():
    return Reduction(None, nn.Conv2d(32, 32, 2, 2), nn.LayerNorm(32), None)


MODULES = {
    "tokens": (lambda: Net(ExplicitTokenAttention(4, 8)), (2, 6, 8), set()),
    "relative positions": (
        lambda: Net(ExplicitBiasedAttention(4, 8, window_size=(2, 3))),
        (2, 6, 8),
        {"attention.position_bias.table"},
    ),
    "cosines": (
        lambda: Net(ExplicitBiasedAttention(4, 8, window_size=(2, 3), cosine=True)),
        (1, 6, 8),
        {"attention.position_bias.mlp.2", "attention.logit_scale"},
    ),
    "windows": (
        lambda: Net(ExplicitWindowAttention(4, 8, window_size=(2, 3))),
        (2, 5, 6, 8),
        {"attention.position_bias.table"},
    ),
    "shifted windows": (
        lambda: Net(ExplicitWindowAttention(4, 8, window_size=(2, 3), shift_size=(1, 1))),
        (2, 5, 6, 8),
        {"attention.position_bias.table"},
    ),
    "groups": (lambda: Net(ExplicitGroupedAttention(4, 8, ws=3), (4, 4)), (2, 16, 8), set()),
    "reduced": (lambda: Net(ExplicitReducedAttention(4, 8, reduction=reduction()), (4, 4)), (2, 16, 8), set()),
    "class token": (lambda: Net(ExplicitClassAttention(4, 8)), (2, 6, 8), set()),
    "channels": (lambda: Net(ExplicitChannelAttention(4, 8)), (2, 6, 8), {"attention.temperature"}),
}


@pytest.mark.parametrize("kind", MODULES)
def test_heads(kind):
    torch.manual_seed(0)
    make, shape, others = MODULES[kind]
    group = prunable_groups(make().eval(), torch.randn(shape))["attention.q_proj"]
    assert {m.name for m in group.members} == PROJECTIONS | others
    assert (group.unit_size, group.n_units) == (8, 4)


@pytest.mark.parametrize("area", [1, 2])
def test_heads_between_pixels(area):
    torch.manual_seed(0)
    qkv, proj, pe = nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
    model = Net(ExplicitSpatialAttention(qkv, proj, pe, 4, 8, 8, 0.5, area=area), like=nn.Conv2d).eval()
    group = prunable_groups(model, torch.randn(2, 8, 4, 4))["attention.qkv"]
    assert {m.name for m in group.members} == {"attention.qkv", "attention.pe", "attention.proj"}
    assert (group.unit_size, group.n_units) == (24, 4)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Linear(8, 32), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(32, 3)
    )


def test_encoders_of_torch():
    model, x = encoder().eval(), torch.randn(2, 6, 8)
    assert prunable_groups(model, x).names == ["1.layers.0.linear1"]
    explicit_attention(model, x)
    groups = prunable_groups(model, x)
    assert groups.names == ["0", "1.layers.0.self_attn.q_proj", "1.layers.0.linear1"]
    prune(model, x, budget=Budget(macs=0.3), method="l2", refit=None)
    prune(model, x, [(torch.randn(9, 6, 8), torch.zeros(9))], budget=Budget(macs=0.9))  # batches come first everywhere
    attention = model[1].layers[0].self_attn
    assert attention.num_heads < 4 and attention.q_proj.out_features == 8 * attention.num_heads
    assert attention.head_dim == 8 and model(x).shape == (2, 6, 3)
