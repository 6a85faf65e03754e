"""The oracle: masked is removed."""

import copy
import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from helpers.group_cases import removal, shifted, zoo
from helpers.networks import ZOO
from tp_importance import prunable_groups
from tp_importance.graph import verify
from tp_importance.graph.verify import masked_equals_removed, sample_units
from tp_importance.testing import TOPOLOGIES, topology
from tp_importance.testing.networks import conv_bn_relu, head

# --- masked = removed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_masked_is_removed(name, seed):
    case = topology(name)
    removed = removal(case.groups, seed)
    assert masked_equals_removed(case.groups, case.x, removed) is None


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_oracle_notices_a_shift_by_one(name):
    case = topology(name)
    problem = masked_equals_removed(case.groups, case.x, sample_units(case.groups), gated=shifted(case.groups))
    assert problem is not None and "differs by" in problem


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_oracle_notices_a_shift_in_any_single_group(name):
    case = topology(name)
    wrong = shifted(case.groups)
    for group in case.groups:
        only = case.groups.exclude({n: "" for n in case.groups.names if n != group.name})
        removed = sample_units(only, seed=3)
        assert masked_equals_removed(only, case.x, removed) is None
        assert "differs by" in masked_equals_removed(only, case.x, removed, gated=wrong)


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    case = zoo(name, verify=True)
    assert [e.reason for e in case.groups.excluded] == ["produces the network's output"]
    assert len(case.groups) >= 10
    problem = masked_equals_removed(case.groups, case.x, sample_units(case.groups), gated=shifted(case.groups))
    assert problem is not None and "differs by" in problem


def test_oracle_compares_the_cost():
    case = topology("plain")
    wrong, traced = copy.copy(case.groups), case.groups.trace
    twice = [dataclasses.replace(call, macs=2 * call.macs) for call in traced.calls]  # as if every layer ran twice
    wrong.trace = dataclasses.replace(traced, calls=twice)
    assert "the cost model says" in masked_equals_removed(wrong, case.x, {"0.0": [1]})


def test_oracle_notices_a_layer_that_was_forgotten():
    case = topology("plain")
    first = case.groups["0.0"]
    for member in first.members:  # a convolution, its batch norm, the next convolution
        wrong = copy.copy(case.groups)
        fewer = tuple(m for m in first.members if m is not member)
        wrong.groups = [dataclasses.replace(first, members=fewer), *case.groups.groups[1:]]
        problem = masked_equals_removed(wrong, case.x, {"0.0": [1]})
        assert "pruning a copy fails" in problem or "input of 1.0: shape" in problem


def test_oracle_removes_numbers_that_no_division_into_parts_can_share():
    for name in TOPOLOGIES:
        groups = topology(name).groups
        for unit_name, units in sample_units(groups).items():
            group = groups[unit_name]
            assert 0 < len(units) <= group.n_units - group.min_units
            assert np.gcd(len(units), group.n_units) == 1


def test_oracle_does_not_remove_as_much_of_all_groups_of_one_size():
    seen = 0
    for name in TOPOLOGIES:
        groups, lost = topology(name).groups, defaultdict(list)
        for group_name, units in sample_units(groups).items():
            lost[groups[group_name].n_units].append(len(units))
        alike = [counts for n_units, counts in lost.items() if n_units > 6 and len(counts) > 1]
        assert all(len(set(counts)) == 2 for counts in alike)
        seen += len(alike)
    assert seen >= 3


class HalvesOfChunk(nn.Module):
    """Equal halves whatever the width: right only if both lose the same number of channels."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.left, self.right = conv_bn_relu(8, 8), conv_bn_relu(8, 8)
        self.head = head(16)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        return self.head(torch.cat([self.left(left), self.right(right)], 1))


def test_halves_of_a_chunk_lose_the_same_channels():
    groups = prunable_groups(HalvesOfChunk().eval(), torch.randn(2, 3, 8, 8))
    assert groups.names == ["stem.0", "left.0", "right.0"]
    assert groups["stem.0"].unit_size == 2 and groups["stem.0"].removed_channels([3]) == [3, 11]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.PixelShuffle(2), conv_bn_relu(4, 6)],
        [nn.ConvTranspose2d(16, 12, 2, stride=2, groups=4), nn.ReLU(), conv_bn_relu(12, 6)],
    ],
    ids=["PixelShuffle", "grouped transposed convolution"],
)
def test_what_torch_pruning_cannot_do_is_pruned(layers):
    model, x = nn.Sequential(conv_bn_relu(3, 16), *layers, head(6)).eval(), torch.randn(2, 3, 8, 8)
    groups = prunable_groups(model, x)
    assert {"0.0", f"{len(layers)}.0"} <= set(groups.names) and groups["0.0"].unit_size == 4
    assert masked_equals_removed(groups, x, sample_units(groups)) is None


class Magnified(nn.Module):
    """Sums over fewer channels are rounded otherwise, and here that shows."""

    def __init__(self, cast=False):
        super().__init__()
        self.a, self.b, self.c, self.head = conv_bn_relu(3, 64), nn.Conv2d(64, 16, 3), conv_bn_relu(16, 8), head(8)
        self.cast = cast

    def forward(self, x):
        x = torch.sin(1e5 * self.b(self.a(x)))
        return self.head(self.c(x.float() if self.cast else x))


def magnified(**options):
    torch.manual_seed(0)
    return Magnified(**options).eval(), torch.randn(2, 3, 12, 12)


def test_rounding_is_no_difference():
    model, x = magnified()
    found = prunable_groups(model, x, verify=False)
    removed = sample_units(found)
    single = verify._compare(found, x, removed, found, verify.TOLERANCE, None)
    assert single.may_be_rounding and "input of c.0: differs by" in single.problem
    assert masked_equals_removed(found, x, removed) is None
    assert prunable_groups(model, x).names == ["a.0", "b", "c.0"]
    assert {p.dtype for p in model.parameters()} == {torch.float32} and x.dtype == torch.float32


def test_a_real_difference_stays_one_in_float64():
    model, x = magnified()
    groups = prunable_groups(model, x)
    problem = masked_equals_removed(groups, x, sample_units(groups), gated=shifted(groups))
    assert "differs by" in problem


def test_the_first_verdict_stands_where_float64_does_not_run():
    model, x = magnified(cast=True)
    groups = prunable_groups(model, x)
    reasons = {e.name: e.reason for e in groups.excluded}
    assert groups.names == ["b", "c.0"] and "input of c.0: differs by" in reasons["a.0"]


def test_failures_are_not_repeated(monkeypatch):
    seen, compare, case = [], verify._compare, topology("plain")

    def fails(*_, **__):
        raise IndexError("out of range")

    monkeypatch.setattr(verify, "_compare", lambda *args: seen.append(args[-1]) or compare(*args))
    monkeypatch.setattr(verify, "remove_units", fails)
    problem = masked_equals_removed(case.groups, case.x, sample_units(case.groups))
    assert problem == "pruning a copy fails: IndexError: out of range" and seen == [None]


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(12), nn.GroupNorm(4, 12), nn.RMSNorm(12)], ids=lambda n: type(n).__name__
)
def test_a_wrong_cut_of_a_new_norm_is_seen(norm):
    """Its weights are all one: with others in their place the network would compute the same."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 12), norm, nn.GELU(), nn.Linear(12, 3)), torch.randn(5, 4)
    groups = prunable_groups(net, x)
    members = [dataclasses.replace(m, units=m.units[::-1].copy()) if m.name == "1" else m for m in groups["0"].members]
    wrong = dataclasses.replace(groups, groups=[dataclasses.replace(groups["0"], members=tuple(members))])
    assert "differs by" in masked_equals_removed(wrong, x, {"0": [0]}, gated=groups)
