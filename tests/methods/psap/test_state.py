"""PSAP interrupted and resumed, and what it remembers."""

import copy
import gc
import io
from functools import cache

import pytest
import torch

from helpers.psap_cases import TOTAL, adam, make
from tp_importance import Budget, PSAPSchedule
from tp_importance.methods.psap import PSAPHistory
from tp_importance.testing import same_tensors

# -- state


def state_of(run):
    return {"model": run.model.state_dict(), "opt": run.optimizer.state_dict(), "psap": run.pruner.state_dict()}


@cache
def uninterrupted():
    """Weights, history and masks after the whole training, and weights after the surgery."""
    run = make(optimizer=adam).train(TOTAL)
    trained, history, masked = copy.deepcopy(run.model.state_dict()), run.pruner.history.to_list(), run.pruner.masked
    run.pruner.finish()
    return trained, history, masked, run.model.state_dict()


@cache
def interrupted(at):
    """What is saved after ``at`` steps."""
    file = io.BytesIO()
    torch.save(state_of(make(optimizer=adam).train(at)), file)
    return file.getvalue()


@pytest.mark.parametrize("at", [0, 1, 2, 4, 5, 8, 13, 15, 17, 19])
@pytest.mark.parametrize("late", [False, True])
def test_interrupted_and_resumed_is_uninterrupted(at, late):
    """Before the first step, between steps, in the middle of a pulse, frozen; weights bit for bit."""
    trained, history, masked, pruned = uninterrupted()
    saved = torch.load(io.BytesIO(interrupted(at)), weights_only=True)
    again = make(optimizer=adam, start=late)
    again.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["opt"])
    again.pruner.load_state_dict(saved["psap"])
    if not late:
        again.pruner.start(again.optimizer, None if at else TOTAL)
    again.done = at
    again.train(TOTAL - at)
    assert same_tensors(again.model.state_dict(), trained)
    assert again.pruner.history.to_list() == history
    assert again.pruner.masked == masked
    again.pruner.finish()
    assert same_tensors(again.model.state_dict(), pruned)


def test_state_before_start_and_states_that_do_not_fit():
    run = make(start=False)
    state = copy.deepcopy(run.pruner.state_dict())
    run.pruner.load_state_dict(state)
    for other in (
        make("plain", start=False),
        make(budget=Budget(macs=0.4), start=False),
        make(protect=False, start=False),
        make(schedule=PSAPSchedule(), start=False),
        make(max_pruning_ratio=0.7, start=False),
    ):
        with pytest.raises(ValueError, match="made with"):
            other.pruner.load_state_dict(state)
    for bad in ({}, {"format": "x"}, None, {**state, "version": 99}, {k: v for k, v in state.items() if k != "pulse"}):
        with pytest.raises(ValueError):
            run.pruner.load_state_dict(bad)
    run.pruner.start(run.optimizer, total_steps=TOTAL)
    other = make(start=False)
    other.pruner.load_state_dict(run.train(5).pruner.state_dict())
    with pytest.raises(ValueError, match="total_steps=7"):
        other.pruner.start(other.optimizer, total_steps=7)
    other.pruner.start(other.optimizer)
    started = make(total=TOTAL + 1)
    with pytest.raises(ValueError, match="total_steps=21"):
        started.pruner.load_state_dict(run.pruner.state_dict())


def test_several_processes_are_refused(monkeypatch):
    run = make(start=False)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="one process"):
        run.pruner.start(run.optimizer, total_steps=TOTAL)
    assert not run.pruner._soft.started


def test_nothing_grows_with_the_steps():
    run = make(total=300, schedule=PSAPSchedule(prune_steps=2, begin=0.01, end=0.02, pulse=2)).train(20)

    def alive():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    before = alive()
    run.train(30)
    assert alive() == before
    run = make(total=300, schedule=PSAPSchedule(prune_steps=1, begin=0.01, end=0.02, pulse=200)).train(20)
    before = alive()
    run.train(30)  # all within one pulse
    assert alive() == before


# -- history


def test_history_as_data_frame_picture_and_json(tmp_path):
    run = make().train(TOTAL)
    history = run.pruner.history
    frame = history.to_frame()
    assert len(frame) == 3 * len(run.pruner.groups)
    assert {"step", "iteration", "group", "sparsity", "ratio", "width", "restored", "protected", "macs"} <= set(frame)
    assert (frame["total_macs"] <= frame["limit_macs"]).all()
    assert frame["sparsity"].between(0.05, 0.5).all()
    assert PSAPHistory.from_list(history.to_list()).to_list() == history.to_list()
    assert history.plot(tmp_path / "h.png") is not None and (tmp_path / "h.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to plot"):
        make().pruner.history.plot()
    assert "prune step 3 of 3" in run.pruner.progress


def test_macs_that_hang_on_a_group():
    run = make().train(TOTAL)
    cost, last = run.pruner.target.cost_model, run.pruner.history[-1]
    widths = {r.group: r.width for r in last.rows}
    for row in last.rows:
        without = cost.evaluate(cost.units({**widths, row.group: 0}))
        assert row.macs == last.cost["macs"] - without[0]
