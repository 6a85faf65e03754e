"""PSAP in training loops of all kinds, before and after the surgery."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.psap_cases import SCHEDULE, TOTAL, adam, make, sgd
from tp_importance import Budget, PSAPPruner, PSAPSchedule, count_ops
from tp_importance.budget import Cost
from tp_importance.graph.masking import masked_units as gates
from tp_importance.testing import make_network, same_values

# -- after the surgery


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", ["residual", "grouped", "flatten"])
def test_training_goes_on_as_if_only_masked(name, optimizer):
    """With remapped momentum the small network takes the steps that the masked one takes."""
    runs = [make(name, optimizer=optimizer).train(TOTAL) for _ in range(2)]
    assert same_values(runs[0].model, runs[1].model)
    runs[0].pruner.finish()
    for run in runs:
        run.train(5, pruning=False)
    torch.testing.assert_close(runs[0].out(), runs[1].out(), rtol=2e-3, atol=2e-4)
    fresh = make(name, optimizer=optimizer).train(TOTAL)  # a new optimizer takes others
    fresh.pruner.finish()
    fresh.optimizer = optimizer(fresh.model)
    fresh.train(5, pruning=False)
    assert float((fresh.out() - runs[1].out()).abs().max()) > 20 * float((runs[0].out() - runs[1].out()).abs().max())


def test_groups_schedulers_and_average_are_carried_over():
    def two_groups(model):
        bias = [p for p in model.parameters() if p.dim() == 1]
        rest = [p for p in model.parameters() if p.dim() > 1]
        return torch.optim.SGD([{"params": rest, "weight_decay": 1e-3, "name": "w"}, {"params": bias, "lr": 0.3}], 0.01,
                               momentum=0.9)  # fmt: skip

    run = make(optimizer=two_groups)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    shadow = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    twin = copy.deepcopy(run.model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, [0.1, 0.2], total_steps=TOTAL + 5)
    for _ in range(TOTAL):
        run.train(1)
        schedule.step()
        average.update_parameters(run.model)
    before = copy.deepcopy(average.module).eval()
    with gates(before, run.pruner.groups, run.pruner.masked), torch.no_grad():
        masked = before(run.x)
    old = [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]
    counts = [len(g["params"]) for g in run.optimizer.param_groups]
    run.pruner.finish(average=[average, shadow, twin])
    assert [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups] == old
    assert [len(g["params"]) for g in run.optimizer.param_groups] == counts
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in run.model.parameters()}
    assert run.optimizer.state.keys() == set(run.model.parameters())
    for p, state in run.optimizer.state.items():
        assert state["momentum_buffer"].shape == p.shape
    with torch.no_grad():
        torch.testing.assert_close(average.module.eval()(run.x), masked, rtol=1e-4, atol=1e-5)
    assert twin(run.x).shape == (2, 4) and Cost(*count_ops(twin, run.x)) == run.pruner.cost
    assert {n: t.shape for n, t in shadow.items()} == {n: p.shape for n, p in run.model.named_parameters()}
    for _ in range(5):
        run.train(1, pruning=False)
        schedule.step()
        average.update_parameters(run.model)
    assert schedule.get_last_lr() == [g["lr"] for g in run.optimizer.param_groups]


def test_parameters_of_others_stay_in_the_optimizer():
    model, x = make_network("residual")
    temperature = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], 0.01)
    pruner = PSAPPruner(model, x, budget=Budget(macs=0.5), schedule=SCHEDULE)
    pruner.start(optimizer, total_steps=TOTAL)
    pruner.finish(at_once=True)
    assert optimizer.param_groups[0]["params"][-1] is temperature


def test_frozen_flags_and_modes_stay():
    run = make(start=False)
    run.model[0].requires_grad_(False)
    run.model.train()[1].eval()
    run.pruner.start(torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], 0.01), total_steps=TOTAL)
    modes = [m.training for m in run.model.modules()]
    run.pruner.finish(at_once=True)
    assert [m.training for m in run.model.modules()] == modes
    assert [p.requires_grad for p in run.model[0].parameters()] == [False] * 3


# -- precision, accumulation, other loops


def test_autocast_and_accumulation_and_channels_last():
    run = make(start=False)
    run.model.to(memory_format=torch.channels_last)
    run.pruner.start(run.optimizer, total_steps=TOTAL)
    run.model.train()
    for _ in range(TOTAL):
        run.optimizer.zero_grad()
        for x, y in run.loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(run.model(x.to(memory_format=torch.channels_last)), y)
            (loss / len(run.loader)).backward()
        run.optimizer.step()
        run.pruner.step()
    assert [s.iteration for s in run.pruner.history] == [2, 8, 14] and run.pruner.frozen
    masked = run.out()
    report = run.pruner.finish()
    assert report.cost.macs <= 0.5 * run.pruner.dense.macs
    torch.testing.assert_close(run.out(), masked, rtol=1e-4, atol=1e-5)
    weights = [m.weight for m in run.model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_steps_that_a_gradient_scaler_skips_are_not_counted_in_the_pulse():
    run = make().train(2)
    soft = run.pruner._soft
    assert soft._pulse_left == 3
    x, y = run.loader[0]
    (nn.functional.cross_entropy(run.model(x), y) * float("inf")).backward()
    run.pruner.step()
    assert (soft._pulse_left, soft._pulse_count) == (2, 0)
    run.train(2)
    assert soft._pulse_left == 0 and len(run.pruner.history) == 1


def test_validation_between_the_steps_changes_nothing():
    quiet, noisy = make(), make()
    quiet.train(TOTAL)
    for _ in range(TOTAL):
        noisy.train(1)
        noisy.out()
    assert same_values(quiet.model, noisy.model) and quiet.pruner.masked == noisy.pruner.masked


@pytest.mark.filterwarnings("ignore:.*have room for")
@pytest.mark.parametrize("total", [1, 2, 3, 5, 11])
def test_any_number_of_steps(total):
    run = make(total=total, schedule=PSAPSchedule(prune_steps=2)).train(total)
    assert run.pruner.frozen and run.pruner.finish().cost.macs <= 0.5 * run.pruner.dense.macs


@pytest.mark.parametrize("total", range(1, 60))
@pytest.mark.parametrize("schedule", [PSAPSchedule(), PSAPSchedule(4, 0.0, 1.0, 7), PSAPSchedule(3, 0.5, 0.5, 0)])
def test_schedules_fit(schedule, total):
    iterations, pulse = schedule.fit(total)
    assert 1 <= len(iterations) <= schedule.prune_steps and 0 <= pulse <= schedule.pulse
    assert all(a < b for a, b in itertools.pairwise(iterations)) and iterations[0] >= 1
    assert iterations[-1] + pulse <= total and all(np.diff(iterations) >= pulse)
    assert pulse or not schedule.pulse or total == 1


def test_round_to_and_largest_ratio():
    run = make(round_to=4, max_pruning_ratio=0.5, budget=Budget(macs=0.6)).train(TOTAL)
    report = run.pruner.finish()
    assert all(r.after % 4 == 0 and r.after >= r.initial / 2 for r in report.rows)
    run = make(max_pruning_ratio={"0.0": 0.25}, budget=Budget(macs=0.6)).train(TOTAL)
    assert next(r for r in run.pruner.finish().rows if r.name == "0.0").after >= 6
