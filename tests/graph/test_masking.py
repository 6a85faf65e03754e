"""Where units are zeroed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tp_importance import prunable_groups
from tp_importance.graph.groups import ChannelGroup, Member, PrunableGroups
from tp_importance.graph.masking import masked_units
from tp_importance.graph.tracing import Trace
from tp_importance.testing import Snapshot


class Functional(nn.Module):
    """A convolution of six channels that no layer owns, its scale, and one that reads both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(4, 6, 1, 1))
        self.scale, self.bias = nn.Parameter(torch.rand(6, 1, 1) + 0.5), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.first, self.bias) / self.scale, self.second)


def side(name, role, axis):
    return Member(name, role, "passthrough", np.arange(6), np.arange(6), 6, axis)


def test_weights_that_no_layer_owns_are_zero_meanwhile():
    model, x = Functional(), torch.randn(2, 3, 8, 8)
    members = (side("first", "out", 0), side("bias", "out", 0), side("scale", "out", 0), side("second", "in", 1))
    group = ChannelGroup("first", 6, 1, members, ("first", "out"), np.arange(6), np.arange(6))
    groups = PrunableGroups([group], [], Trace(model, None, [], 2, x))
    smaller, left = Functional(), [0, 2, 3]
    smaller.first, smaller.bias = nn.Parameter(model.first[left]), nn.Parameter(model.bias[left])
    smaller.scale, smaller.second = nn.Parameter(model.scale[left]), nn.Parameter(model.second[:, left])
    snapshot = Snapshot(model)
    with pytest.raises(KeyError), masked_units(model, groups, {"first": [1, 4, 5]}):
        torch.testing.assert_close(model(x), smaller(x))
        raise KeyError
    snapshot.check()


@pytest.mark.parametrize("change", [lambda x: x - 0.3, torch.sigmoid, lambda x: x.flip(1)])
def test_what_a_pre_hook_of_the_user_makes_of_an_input_is_masked_behind_it(change):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)).eval()
    model[2].register_forward_pre_hook(lambda _module, args: (change(args[0]),))
    groups = prunable_groups(model, torch.randn(2, 3, 9, 9))
    assert groups.names == ["0", "2"]
