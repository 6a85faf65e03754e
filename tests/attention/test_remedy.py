"""Where a library wires the sizes of heads, the reason says what to do."""

import pytest
import torch
from torch import nn

from tp_importance import Budget, explicit_attention, prunable_groups, prune
from tp_importance.attention.rewriters import REWRITERS
from tp_importance.graph.wired import REMEDY, WIRED


def test_every_rewriter_is_named_where_its_class_is_met():
    assert set(REWRITERS) == WIRED


def test_the_reason_names_the_remedy_and_the_remedy_works():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    net = nn.Sequential(nn.Linear(8, 16), layer, nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    x = torch.randn(2, 5, 8)
    left_out = {e.name: e.reason for e in prunable_groups(net, x).excluded}
    assert REMEDY in left_out["0"] and REMEDY not in left_out["3"]
    explicit_attention(net, x)
    groups = prunable_groups(net, x)
    assert {g.name: g.n_units for g in groups} == {"0": 16, "1.self_attn.q_proj": 2, "1.linear1": 32}
    assert not any(REMEDY in e.reason for e in groups.excluded)


def test_nothing_to_prune_names_the_remedy():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    with pytest.raises(ValueError, match=r"has no group that can be pruned .*explicit_attention"):
        prune(Only().eval(), torch.randn(2, 4, 8), budget=Budget(macs=0.5), method="l2", refit=None)
