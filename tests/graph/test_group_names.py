"""No two groups bear one name, and pruning does not change the names."""

import dataclasses

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import Budget, BudgetPruner
from tp_importance.graph.classes import _named_apart, build_groups
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.tracing import trace
from tp_importance.testing import TOPOLOGIES, make_network, topology
from tp_importance.testing.networks import conv_bn_relu, head

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = conv_bn_relu(width, width, kernel=1), conv_bn_relu(width, width)

    def forward(self, x):
        return x + self.b(self.a(x))


class CrossStage(nn.Module):
    """A stage of CSPDarknet: halves of one convolution run through residual blocks of their own.

    Torch-Pruning starts from the blocks and meets the convolution in front of the split twice.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv_bn_relu(3, 16), Residual(8), Residual(8)
        self.transition, self.out, self.head = conv_bn_relu(8, 8, kernel=1), conv_bn_relu(16, 12), head(12)

    def forward(self, x):
        x = self.stem(x)
        first, second = x.split([self.right.a[0].in_channels, self.left.a[0].in_channels], dim=1)
        return self.head(self.out(torch.cat([self.transition(self.left(second)), self.right(first)], 1)))


def at(group, channels):
    """The group as if its channels lay elsewhere in its first layers."""
    members = [dataclasses.replace(m, channels=channels) if m.role == "out" else m for m in group.members]
    return dataclasses.replace(group, members=tuple(members), root_channels=channels)


def names(groups):
    return groups.names + [e.name for e in groups.excluded]


def test_groups_with_one_first_producer_are_numbered():
    groups = build_groups(trace(CrossStage().eval(), X))
    assert groups.names == ["stem.0/0", "stem.0/1", "left.a.0", "transition.0", "right.a.0", "out.0"]
    consumers = {name: {m.name for m in groups[name].members if m.role == "in"} for name in ("stem.0/0", "stem.0/1")}
    assert "transition.0" in consumers["stem.0/1"] and "transition.0" not in consumers["stem.0/0"]
    again = build_groups(trace(CrossStage().eval(), X))
    assert names(again) == names(groups)
    one = groups.exclude({"stem.0/0": "asked for"})
    assert "stem.0/1" in one.names and "stem.0/0" not in one.names


def test_names_stay_after_pruning():
    model = CrossStage().eval()
    pruner = BudgetPruner(model, X, budget=Budget(macs=0.7), importance=tp.importance.MagnitudeImportance(p=1))
    before, left_out = pruner.groups.names, [e.name for e in pruner.groups.excluded]
    assert {"stem.0/0", "stem.0/1"} <= set(before)
    pruner.step()
    pruner.step(Budget(macs=0.6))
    assert pruner.groups.names == before and sorted(e.name for e in pruner.groups.excluded) == sorted(left_out)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_names_are_unique_and_stay_after_pruning(name):
    model, x = make_network(name)
    groups = topology(name).groups
    before = names(build_groups(trace(model, x)))
    assert len(set(before)) == len(before)
    fresh = build_groups(trace(model, x))
    fresh = fresh.exclude({n: "" for n in fresh.names if n not in groups.names})
    remove_units(fresh, {g.name: [0] for g in fresh})  # the first: numbers must not follow from what is left in front
    assert sorted(names(build_groups(trace(model, x)))) == sorted(before)


def halves_of_a_split():
    groups = topology("split").groups
    parts = [groups["stem.0/0"], groups["stem.0/1"]]
    assert [m.name for part in parts for m in part.consumers] == ["left.0", "right.0"]
    return [dataclasses.replace(g, name="stem.0") for g in parts], groups.trace.first_call()


def test_parts_that_lie_one_behind_the_other_are_numbered_by_position():
    halves, order = halves_of_a_split()
    for found in (halves, halves[::-1]):
        named = [(g.name, g.consumers[0].name) for g, _ in _named_apart([(g, None) for g in found], order)]
        assert named == [("stem.0/0", "left.0"), ("stem.0/1", "right.0")]
    backwards = [at(g, np.sort(19 - g.root_channels)) for g in halves]  # the right half in front
    named = [(g.name, g.consumers[0].name) for g, _ in _named_apart([(g, None) for g in backwards], order)]
    assert named == [("stem.0/0", "right.0"), ("stem.0/1", "left.0")]


@pytest.mark.parametrize("gone", [[], [0], [0, 2]])
def test_parts_that_interleave_are_numbered_by_the_layers_that_are_reached(gone):
    """Which of them has the first channel depends on what was removed."""
    (left, right), order = halves_of_a_split()
    even = np.setdiff1d(np.arange(0, 16, 2), gone)
    found = [at(right, np.arange(1, 25, 2)), at(left, even)]
    for parts in (found, found[::-1]):
        named = [(g.name, g.consumers[0].name) for g, _ in _named_apart([(g, None) for g in parts], order)]
        assert named == [("stem.0/0", "left.0"), ("stem.0/1", "right.0")]


@pytest.mark.parametrize("small", ["first", "second"])
def test_names_stay_where_a_part_has_one_channel_left(small):
    """Nobody sees any more which layer reads it; the other part keeps its number."""
    model, x = make_network("split")
    groups = build_groups(trace(model, x))
    least, other = ("stem.0/0", "stem.0/1") if small == "first" else ("stem.0/1", "stem.0/0")
    width = groups[other].width
    remove_units(groups, {least: list(range(1, groups[least].n_units))})
    after = build_groups(trace(model, x))
    assert after.widths[other] == width
    assert {e.name: e.width for e in after.excluded}[least] == 1


def test_numbers_pass_over_what_a_layer_is_called():
    groups = topology("split").groups
    parts = [dataclasses.replace(groups[f"stem.0/{i}"], name="stem") for i in range(2)]
    named = [g.name for g, _ in _named_apart([(g, None) for g in parts], {"stem": 0, "stem/0": 1})]
    assert named == ["stem/1", "stem/2"]


def test_two_groups_of_one_name_are_refused():
    case = topology("plain")
    first = case.groups.groups[0]
    with pytest.raises(ValueError, match=r"several groups are called 0\.0"):
        PrunableGroups([first, first], [], case.groups.trace)
    with pytest.raises(ValueError, match=r"several groups are called 3\.2"):
        PrunableGroups([dataclasses.replace(first, name="3.2")], case.groups.excluded, case.groups.trace)


def test_numbers_in_execution_order_of_channels_with_the_same_layers():
    case = topology("plain")
    first = case.groups.groups[0]
    halves = [at(first, np.arange(4, 8)), at(first, np.arange(4))]
    named = [g for g, _ in _named_apart([(g, None) for g in halves], case.groups.trace.first_call())]
    assert [(g.name, int(g.members[0].channels.min())) for g in named] == [("0.0/0", 0), ("0.0/1", 4)]
