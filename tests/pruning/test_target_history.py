"""A target repeats histories of either format, all or nothing."""

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import Budget, BudgetPruner, PSAPPruner
from tp_importance.pruning.target import PruningTarget
from tp_importance.testing import Snapshot, make_network, same_values


def stepped(name):
    model, x = make_network(name)
    pruner = BudgetPruner(model, x, importance=tp.importance.MagnitudeImportance(p=1), budget=Budget(macs=0.7))
    pruner.step()
    pruner.step(Budget(macs=0.4))
    return model, pruner, x


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("name", ["split", "residual", "depthwise"])
def test_steps_are_repeated(name, direct):
    model, pruner, x = stepped(name)
    entries = pruner.pruning_history(direct=direct)
    again, _ = make_network(name)
    target = PruningTarget(again, x)
    target.load_pruning_history(entries)
    assert same_values(again, model) and target.groups.widths == pruner.groups.widths
    assert target.pruning_history(direct=direct) == entries
    third, _ = make_network(name)
    PruningTarget(third, x).load_pruning_history(target.pruning_history(direct=not direct))
    assert same_values(third, model)


def test_what_is_left_out_now_may_have_gone_then():
    (model, x), (again, _) = make_network("plain"), make_network("plain")
    target = PruningTarget(model, x)
    target.apply(target.plan({"0.0": [1]}))
    other = PruningTarget(again, x, ignored_layers=[again[0]])
    assert "0.0" not in other.groups.names
    other.load_pruning_history(target.pruning_history())
    assert same_values(again, model) and "0.0" not in other.groups.names


@pytest.mark.parametrize(
    "entries",
    [
        [["0.0", "out", [1]]],  # and nothing that reads it
        [["0.0", "out", [1]], ["0.1", "out", [1]], ["1.0", "in", [2, 3]]],
        [["0.0", True, [1]], ["0.0", True, [7]]],
        [["0.0.weight", 0, [1]]],
    ],
)
def test_a_history_that_breaks_the_network_is_undone(entries):
    model, x = make_network("plain")
    target, before = PruningTarget(model, x), Snapshot(model)
    widths = target.groups.widths
    with pytest.raises(ValueError, match="the history does not fit Sequential as it is now"):
        target.load_pruning_history(entries)
    before.check()
    assert target.groups.widths == widths and target.pruning_history() == target.pruning_history(direct=True) == []
    target.apply(target.plan({"0.0": [1]}))
    assert model[0][0].out_channels == 7


def test_a_surgery_that_is_undone_leaves_the_trace_valid(monkeypatch):
    model, x = make_network("residual")
    target, twin = PruningTarget(model, x), make_network("residual")[0]
    traced, plan = target.groups.trace, target.plan({"0.0": [1, 2], "2.body.1.0": [0]})
    with monkeypatch.context() as patch:
        patch.setattr(PruningTarget, "_adopting", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            target.apply(plan)
    assert target.groups.trace is traced
    for each in (target, PruningTarget(twin, x)):
        each.apply(plan)
    assert same_values(model, twin)


def test_pruners_hand_both_formats_on():
    model, x = make_network("plain")
    pruner = PSAPPruner(model, x, budget=Budget(macs=0.5))
    assert pruner.pruning_history() == pruner.pruning_history(direct=True) == []
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    short = BudgetPruner(
        net, torch.randn(1, 3, 4, 4), importance=tp.importance.MagnitudeImportance(p=1), budget=Budget(macs=0.5)
    )
    short.step()
    assert [entry[:2] for entry in short.pruning_history(direct=True)] == [["0", "out"], ["1", "in"]]
