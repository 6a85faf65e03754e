"""Histories of surgery, in Torch-Pruning's format and in the direct one."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import prunable_groups
from tp_importance.graph.history import PruningHistory, repeat, repeat_cuts
from tp_importance.graph.surgery import remove_units
from tp_importance.testing import TOPOLOGIES, Snapshot, make_network, same_values


def pruned(name, steps=2):
    """A network after some surgeries, its history, and the example inputs."""
    model, x = make_network(name)
    history, rng = PruningHistory(), np.random.default_rng(0)
    for _ in range(steps):
        groups = prunable_groups(model, x, verify=False)
        removed = {}
        for group in groups:
            units = rng.permutation(group.n_units)[: max(0, min(2, group.n_units - group.min_units))]
            removed |= {group.name: sorted(units.tolist())} if len(units) else {}
        history = history.then(PruningHistory.of(groups, removed, remove_units(groups, removed)))
    return model, history, x


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_both_formats_make_the_same_network(name):
    model, history, x = pruned(name)
    assert len(history.entries()) < len(history.entries(direct=True))
    for direct in (False, True):
        entries = json.loads(json.dumps(history.entries(direct=direct)))
        again, _ = make_network(name)
        done = repeat(entries, prunable_groups(again, x, verify=False))
        assert same_values(again, model) and torch.equal(again(x), model(x))
        assert done.entries(direct=direct) == entries
        third, _ = make_network(name)
        repeat(done.entries(direct=not direct), prunable_groups(third, x, verify=False))  # the other one fits, too
        assert same_values(third, model)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_direct_format_needs_no_trace(name, monkeypatch):
    model, history, _ = pruned(name)
    again, _ = make_network(name)
    monkeypatch.setattr(type(again), "forward", None)
    repeat_cuts(again, history.entries(direct=True))
    assert same_values(again, model)


@pytest.mark.parametrize("name", ["residual", "concat", "dense", "grouped", "flatten"])
def test_torch_pruning_repeats_it(name):
    model, history, x = pruned(name)
    theirs, _ = make_network(name)
    tp.DependencyGraph().build_dependency(theirs, x).load_pruning_history(history.entries())
    assert same_values(theirs, model)


def test_a_history_of_torch_pruning_is_repeated():
    (theirs, x), (ours, _) = make_network("grouped"), make_network("grouped")
    pruner = tp.pruner.BasePruner(
        theirs, x, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, iterative_steps=2, ignored_layers=[theirs[3]]
    )
    for _ in range(2):
        pruner.step()
    entries = pruner.DG.pruning_history()
    done = repeat(entries, prunable_groups(ours, x, verify=False))
    assert same_values(ours, theirs) and done.entries() == entries


class Cat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(11, 4, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1).relu())


def from_the_consumer(groups):
    """The groups, the second of which is pruned from its consumer's side."""
    first, second = groups
    inputs = second.member("c", "in")
    other = dataclasses.replace(
        second, root=("c", "in"), root_channels=inputs.channels, root_units=inputs.units, name="b"
    )
    return dataclasses.replace(groups, groups=[first, other])


def test_entries_count_what_is_left_by_those_before():
    torch.manual_seed(0)
    model, x = Cat().eval(), torch.randn(2, 3, 4, 4)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    groups, removed = from_the_consumer(prunable_groups(model, x)), {"a": [0, 5], "b": [1, 4]}
    history = PruningHistory.of(groups, removed, remove_units(groups, removed))
    assert history.entries() == [["a", True, [0, 5]], ["c", False, [5, 8]]]  # 7 and 10 before
    tp.DependencyGraph().build_dependency(theirs, x).load_pruning_history(history.entries())
    repeat(history.entries(), prunable_groups(ours, x))
    assert same_values(theirs, model) and same_values(ours, model)


def test_a_root_that_is_no_module_is_told_by_another_member():
    model, x = make_network("plain")
    groups = prunable_groups(model, x)
    group = groups["0.0"]
    raw = dataclasses.replace(group, root=("0.0.weight", "out"))
    history = PruningHistory.of(dataclasses.replace(groups, groups=[raw]), {"0.0": [2]}, [])
    assert history.entries() == [["0.0", True, [2]]]


def test_what_no_units_make_up_has_the_direct_format_only():
    model, x = make_network("plain")
    before = repeat([["0.0", True, [1]]], prunable_groups(model, x))
    # an output of the network, which is in no group
    done = before.then(repeat([["3.2", "out", [0]]], prunable_groups(model, x)))
    assert done.entries(direct=True)[-1] == ["3.2", "out", [0]] and model[3][2].out_features == 3
    with pytest.raises(RuntimeError, match="Torch-Pruning's format cannot say"):
        done.entries()


WRONG = {
    "another layer": ([["nope", True, [0]]], r"channels \[0\] \(out\) of nope are in no group"),
    "too far": ([["0.0", True, [99]]], r"channels \[99\] \(out\) of 0\.0 are in no group"),
    "gone already": ([["0.0", True, [11]], ["0.0", True, [11]]], r"channels \[11\] \(out\) of 0\.0 are in no group"),
    "an output": ([["3.2", True, [1]]], r"channels \[1\] \(out\) of 3\.2 are in no group"),
    "a part": ([["1.body.1.0", True, [0, 5]]], r"channels \[0, 5\] \(out\) of 1\.body\.1\.0 are only a part of what"),
    "all": ([["0.0", True, list(range(12))]], "group 0.0 keeps at least 1"),
    "a direct one": ([["0.0", "out", [1]], ["0.0", True, [1]]], "no entries"),
    "negative": ([["0.0", True, [-1]]], "is no entry"),
    "twice": ([["0.0", True, [1, 1]]], "is no entry"),
    "no whole number": ([["0.0", True, [1.7]]], "is no entry"),
    "text": ([["0.0", True, ["1"]]], "is no entry"),
    "from the end": ([["0.0.weight", -1, [1]], ["1.body.0.0", "in", [1]]], "is no entry"),
    "a number": ([3], "3 is no entry"),
    "a side": ([["0.0", "up", [1]]], "is no entry"),
    "both formats": ([["0.0", True, [1]], ["1.body.0.0", "in", [1]]], "no entries .* of Torch-Pruning's"),
    "cut twice": ([["0.0", "out", [11]], ["0.0", "out", [11]]], "there are 12 outputs of 0.0; .* cannot go"),
    "no axis": ([["0.0", "out", [1]], ["0.0.weight", 7, [1]]], "no axis 7 of 0.0.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_history_changes_nothing(case):
    entries, match = WRONG[case]
    model, x = make_network("grouped")
    groups, before = prunable_groups(model, x), Snapshot(model)
    with pytest.raises(ValueError, match=match):
        repeat(entries, groups)
    before.check()


def test_cuts_that_are_repeated_warn_of_an_older_optimizer():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    repeat_cuts(net, [["0", "out", [1]], ["2", "in", [1]]])
    net(torch.randn(1, 3, 8, 8)).sum().backward()
    with pytest.warns(UserWarning, match=r"SGD trains 3 of 4 .* \(Sequential\.0\.weight, .*"):
        optimizer.step()
