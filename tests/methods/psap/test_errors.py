"""What PSAP refuses, and what it leaves as it was."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers.psap_cases import TOTAL, make, sgd
from tp_importance import Budget, BudgetError, PSAPPruner, PSAPSchedule, prunable_groups
from tp_importance.errors import StaleStatisticsError
from tp_importance.graph.surgery import remove_units
from tp_importance.testing import Snapshot, make_network, topology

# -- bad input


def test_calls_out_of_order():
    run = make(start=False)
    with pytest.raises(RuntimeError, match="start"):
        run.pruner.step()
    with pytest.raises(RuntimeError, match="before start"):
        run.pruner.finish()
    with pytest.raises(ValueError, match="total_steps is missing"):
        run.pruner.start(run.optimizer)
    for bad in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="total_steps"):
            run.pruner.start(run.optimizer, total_steps=bad)
    run.pruner.start(run.optimizer, total_steps=TOTAL)
    with pytest.raises(RuntimeError, match="before"):
        run.pruner.start(run.optimizer, total_steps=TOTAL)
    run.train(5)
    with pytest.raises(RuntimeError, match=r"not through: prune step 1 of 3, after 5 of 20"):
        run.pruner.finish()
    run.train(TOTAL - 5)
    run.pruner.finish()
    for call in (run.pruner.step, run.pruner.finish, run.pruner.state_dict, lambda: run.pruner.load_state_dict({})):
        with pytest.raises(RuntimeError, match="finish"):
            call()
    with pytest.raises(RuntimeError, match="finish"):
        run.pruner.start(run.optimizer, total_steps=3)


def test_a_step_without_backward_is_an_error():
    run = make().train(2)
    with pytest.raises(RuntimeError, match="no gradient has reached the gates"):
        run.pruner.step()


@pytest.mark.filterwarnings("ignore:.*have room for")
def test_optimizers_that_do_not_fit():
    run = make(start=False)
    with pytest.raises(TypeError, match="Optimizer"):
        run.pruner.start("sgd", total_steps=3)
    with pytest.raises(ValueError, match="no parameter of the model"):
        run.pruner.start(sgd(nn.Linear(2, 2)), total_steps=3)
    lbfgs = torch.optim.LBFGS(run.model.parameters())

    def closure():
        lbfgs.zero_grad()
        loss = run.model(run.x).square().sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    with pytest.raises(ValueError, match=r"LBFGS keeps .* for 0\.0\.weight, which is neither"):
        run.pruner.start(lbfgs, total_steps=3)
    run.pruner.start(torch.optim.LBFGS(run.model.parameters()), total_steps=3)  # cannot be known before its first step
    lbfgs = run.pruner._soft.optimizers[0]
    lbfgs.step(closure)
    with pytest.raises(ValueError, match="LBFGS keeps"):
        run.pruner.step()


def test_a_model_without_anything_to_prune_and_unreachable_budgets():
    model, x = make_network("residual")
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="no group that can be pruned"):
        PSAPPruner(model, x, budget=Budget(macs=0.5), ignored_layers=[model])
    for options in ({"budget": Budget(macs=0.005)}, {"budget": Budget(macs=0.4), "max_pruning_ratio": 0.1}):
        with pytest.raises(BudgetError, match="cannot be reached"):
            PSAPPruner(model, x, **options)
    for options in (
        {"budget": 0.5},
        {"schedule": 10},
        {"ratios": "best"},
        {"threshold": 0},
        {"protect_steps": -1},
        {"max_pruning_ratio": 2.0},
        {"max_pruning_ratio": {"nope": 0.5}},
    ):
        with pytest.raises((TypeError, ValueError)):
            PSAPPruner(model, x, **{"budget": Budget(macs=0.5), **options})
    for bad in ({"prune_steps": 0}, {"pulse": -1}, {"begin": 0.7, "end": 0.5}, {"end": 1.5}):
        with pytest.raises(ValueError):
            PSAPSchedule(**bad)
    snapshot.check()


def test_a_whole_budget_masks_nothing_and_says_so():
    run = make(budget=Budget(macs=1.0)).train(TOTAL)
    assert not any(run.pruner.masked.values())
    with pytest.warns(UserWarning, match="nothing is pruned"):
        run.pruner.finish()
    run.train(1, pruning=False)


def test_too_few_steps_are_announced():
    with pytest.warns(UserWarning, match="2 optimizer steps have room for 1 of 3 prune steps"):
        make(total=2)


@pytest.mark.parametrize("change", ["width", "replaced"])
def test_a_model_that_was_changed(change):
    run = make().train(5)
    if change == "width":
        remove_units(prunable_groups(*make_network("residual")), {"0.0": [0, 1]}, model=run.model)
    else:
        run.model[1].body[0][0] = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    with pytest.raises(StaleStatisticsError, match="the model was changed: layer"):
        run.pruner.finish(at_once=True)


def test_a_finish_that_fails_leaves_everything_as_it_was(monkeypatch):
    run = make().train(TOTAL)
    masked, old = run.out(), [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    values = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ValueError, match="weight average does not fit"):
        run.pruner.finish(average=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="weight average"):
        run.pruner.finish(average=3)
    monkeypatch.setattr("tp_importance.graph.tracing.Trace.ops", (1, 1))
    with pytest.raises(RuntimeError, match="planned were"):
        run.pruner.finish()
    monkeypatch.undo()
    assert all(torch.equal(v, values[k]) for k, v in run.model.state_dict().items())
    assert [id(p) for g in run.optimizer.param_groups for p in g["params"]] == old
    torch.testing.assert_close(run.out(), masked)  # the gates are back
    run.train(1)
    masked = run.out()
    run.pruner.finish()
    torch.testing.assert_close(run.out(), masked, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_alone_silently():
    run = make("padded_shortcut", Budget(macs=0.7)).train(TOTAL)
    report = run.pruner.finish()
    padded = {e.name for e in report.excluded if e.kind == "pinned" and "its channels meet padding" in e.reason}
    assert padded == {"features.2.body.1.0", "features.3.body.1.0"}
    assert all(f"left alone: {name} (4): features." in str(report) for name in padded)


def test_copies_share_the_case_untouched():
    """The pruner's constructor leaves the model bit for bit as it was."""
    model, x = make_network("residual")
    model.train()
    snapshot = Snapshot(model)
    PSAPPruner(model, x, budget=Budget(macs=0.5))
    snapshot.check()
    assert math.isfinite(float(topology("residual").x.sum()))
