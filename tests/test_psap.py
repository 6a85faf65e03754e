import copy
import gc
import io
import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from contract import Snapshot, loader_for, same_tensors, same_values, topology
from networks import make_network, make_zoo_network
from tp_importance import (
    Budget,
    BudgetError,
    Cost,
    PSAPHistory,
    PSAPPruner,
    PSAPSchedule,
    StaleStatisticsError,
    count_ops,
    prunable_groups,
)
from tp_importance.functional.psap import cubic_target
from tp_importance.surgery import remove_units
from tp_importance.verify import gates

SCHEDULE = PSAPSchedule(prune_steps=3, begin=0.1, end=0.7, pulse=3)
TOTAL = 20


@dataclass
class Run:
    """A network in training, with everything a user would have around it."""

    model: nn.Module
    x: torch.Tensor
    optimizer: torch.optim.Optimizer
    pruner: PSAPPruner
    loader: list[Any]
    done: int = 0

    def train(self, steps: int, pruning: bool = True) -> "Run":
        self.model.train()
        for _ in range(steps):
            x, y = self.loader[self.done % len(self.loader)]
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            if pruning:
                self.pruner.step()
            self.done += 1
        return self

    def out(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(self.x)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-3)


def make(name="residual", budget=Budget(macs=0.5), optimizer=sgd, total=TOTAL, start=True, **options):  # noqa: B008
    model, x = make_network(name)
    pruner = PSAPPruner(model, x, budget=budget, schedule=options.pop("schedule", SCHEDULE), **options)
    run = Run(model, x, optimizer(model), pruner, loader_for(x))
    if start:
        pruner.start(run.optimizer, total_steps=total)
    return run


# -- the loop


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "dense", "depthwise", "grouped", "split", "flatten",
                                  "se", "shared_input", "transposed", "transformer_mlp", "padded_shortcut", "no_bn",
                                  "preact"])  # fmt: skip
def test_masked_is_removed(name):
    run = make(name, Budget(macs=0.6)).train(TOTAL)
    assert run.pruner.frozen and run.pruner.cost.macs <= 0.6 * run.pruner.dense.macs
    masked, planned = run.out(), run.pruner.cost
    assert any(run.pruner.masked.values())
    report = run.pruner.finish()
    assert Cost(*count_ops(run.model, run.x)) == report.cost == planned
    assert float((run.out() - masked).abs().max() / masked.abs().max()) <= 1e-5
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_networks_people_use(name):
    model, x = make_zoo_network(name)
    optimizer = adam(model)
    pruner = PSAPPruner(model, x, budget=Budget(macs=0.4), schedule=PSAPSchedule(2, 0.2, 0.5, 2))
    pruner.start(optimizer, total_steps=8)
    for _ in range(8):
        optimizer.zero_grad()
        model.train()(torch.cat([x, x / 2])).square().mean().backward()
        optimizer.step()
        pruner.step()
    with torch.no_grad():
        masked = model.eval()(x)
        report = pruner.finish()
        assert float((model(x) - masked).abs().max() / masked.abs().max()) <= 1e-5
    assert 0.39 * pruner.dense.macs < report.cost.macs <= 0.4 * pruner.dense.macs
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


@pytest.mark.parametrize("budget", [Budget(macs=0.3), Budget(params=0.4), Budget(macs=0.7, params=0.35)], ids=str)
@pytest.mark.parametrize("ratios", ["adaptive", "uniform"])
@pytest.mark.parametrize("protect", [True, False])
def test_target_is_met_at_every_prune_step_within_one_admissible_step(budget, ratios, protect):
    run = make(budget=budget, ratios=ratios, protect=protect).train(TOTAL)
    cost, limits = run.pruner._planner.cost_model, budget.limits(run.pruner.dense)
    dense = run.pruner.dense.as_dict()
    assert [s.step for s in run.pruner.history] == [1, 2, 3]
    assert [s.iteration for s in run.pruner.history] == [2, 8, 14]
    for step in run.pruner.history:
        for field, limit in limits.items():
            exact = dense[field] - cubic_target(1.0, step.step, 3) * (dense[field] - limit)
            assert exact - 1 < step.limits[field] <= exact
        assert all(step.cost[f] <= step.limits[f] for f in limits)
        widths = {r.group: r.width for r in step.rows}
        assert cost.cost(widths).as_dict() == step.cost
        for g in run.pruner.groups:
            assert widths[g.name] == round(g.width * (1 - next(r.ratio for r in step.rows if r.group == g.name)))
            if widths[g.name] < g.width:
                more = cost.cost({**widths, g.name: widths[g.name] + g.unit_size}).as_dict()
                assert any(more[f] > step.limits[f] for f in limits)
    assert run.pruner.history[-1].limits == limits
    report = run.pruner.finish()
    assert all(report.cost.as_dict()[f] <= limit for f, limit in limits.items())


def test_ratios_follow_the_sparsities_of_the_weights():
    """Half of the weights of one group are set to a hundredth: its ratio must be the larger one."""
    model, x = make_network("plain")
    with torch.no_grad():
        model[2][0].weight.flatten(1)[:, ::2] *= 0.01
    pruner = PSAPPruner(model, x, budget=Budget(macs=0.6), schedule=PSAPSchedule(prune_steps=1))
    pruner.start(sgd(model), total_steps=1)
    with torch.no_grad():
        model(x)
    pruner.step()
    rows = {r.group: r for r in pruner.history[0].rows}
    assert rows["2.0"].sparsity > 1.8 * rows["1.0"].sparsity
    kappa = pruner.history[0].kappa
    for g in pruner.groups:
        assert rows[g.name].ratio == pytest.approx(min(kappa * rows[g.name].sparsity, 0.9), abs=1.01 / g.n_units)


def test_the_smallest_filters_are_masked_first():
    model, x = make_network("plain")
    small = [1, 4, 6]
    with torch.no_grad():
        model[0][0].weight[small] *= 1e-3
    pruner = PSAPPruner(model, x, budget=Budget(macs=0.8), schedule=PSAPSchedule(prune_steps=1, pulse=0))
    pruner.start(sgd(model), total_steps=1)
    pruner.step()
    masked = pruner.masked["0.0"]
    assert (masked and set(masked) <= set(small)) or set(small) <= set(masked)


def test_masked_filters_do_not_move_without_decay():
    """Neither gradient nor leftover momentum; what is active does."""
    run = make(optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.9)).train(14)
    assert run.pruner.history[-1].step == 3
    before, masked = copy.deepcopy(run.model.state_dict()), run.pruner.masked
    run.train(2)  # inside the pulse: masks stay
    assert run.pruner.masked == masked and any(masked.values())
    for g in run.pruner.groups:
        for m in g.members:
            module = run.model.get_submodule(m.name)
            for leaf, p in module.named_parameters(recurse=False):
                if m.role == "in" and leaf == "bias":
                    continue
                dim = 0 if m.role == "out" or p.dim() == 1 else 1
                old = before[f"{m.name}.{leaf}"]
                gone = torch.from_numpy(m.positions(masked[g.name]))
                assert torch.equal(p.index_select(dim, gone), old.index_select(dim, gone)), (m.name, leaf)
                assert not torch.equal(p, old)


def test_momentum_of_masked_filters_is_zeroed():
    for optimizer, key in ((sgd, "momentum_buffer"), (adam, "exp_avg")):
        run = make("residual", optimizer=optimizer).train(13)
        earlier = run.pruner.masked
        run.train(1)  # the third prune step
        for g in run.pruner.groups:
            gone = set(run.pruner.masked[g.name])
            for m in g.members:
                if m.kind != "producer":
                    continue
                state = run.optimizer.state[run.model.get_submodule(m.name).weight]
                for unit in range(g.n_units):
                    if unit in gone or unit not in earlier[g.name]:  # else it was masked until now
                        assert bool(state[key][m.positions([unit])].any()) == (unit not in gone)
                    if key == "exp_avg":  # a second moment has no direction
                        assert state["exp_avg_sq"][m.positions([unit])].any()


# -- protection


class Planted(nn.Module):
    """Two classes that differ in one input channel only, which filter 5 alone looks at."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Linear(16, 2)
        self.out = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight[:, 3] = 0.0
            self.conv.weight[5] = 0.0
            self.conv.weight[5, 3] = scale
            self.fc.weight.normal_(0, 0.1)
            self.fc.weight[:, 5] = torch.tensor([2.0, -2.0])

    def forward(self, x):
        return self.out(torch.relu(self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))))


def planted(protect, scale=1e-3, macs=0.5, seed=0, **options):
    """The planted network after PSAP; a small learning rate keeps norms where they are."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(64) % 2
    x = torch.randn(64, 4, 6, 6, generator=generator)
    x[:, 3] += 3 * y.view(-1, 1, 1)
    model = Planted(scale)
    schedule = PSAPSchedule(prune_steps=4, begin=0.05, end=0.7, pulse=5)
    pruner = PSAPPruner(model, x, budget=Budget(macs=macs), schedule=schedule, protect=protect, **options)
    optimizer = torch.optim.SGD(
        [
            {"params": model.conv.parameters(), "lr": 1e-9},
            {"params": [*model.fc.parameters(), *model.out.parameters()]},
        ],
        lr=0.05,
    )
    pruner.start(optimizer, total_steps=100)
    ever = False
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        pruner.step()
        ever = ever or 5 in pruner.masked["conv"]
    return model, pruner, ever


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("macs", [0.7, 0.4])
def test_planted_informative_filter_of_tiny_norm_is_restored_and_survives(seed, macs):
    _, without, _ = planted(False, seed=seed, macs=macs)
    assert 5 in without.masked["conv"]  # by norm it goes first
    model, pruner, ever = planted(True, seed=seed, macs=macs)
    assert ever and 5 not in pruner.masked["conv"]
    assert any(5 in r.restored for s in pruner.history for r in s.rows if r.group == "conv")
    weight = model.conv.weight[5].detach().clone()
    report = pruner.finish()
    assert report.cost.macs <= macs * pruner.dense.macs
    assert any(torch.equal(row, weight) for row in model.conv.weight)


def test_restored_filters_are_protected_and_the_next_step_makes_up_the_budget():
    _, pruner, _ = planted(True)
    steps = list(pruner.history)
    row = {s.step: next(r for r in s.rows if r.group == "conv") for s in steps}
    first = next(t for t in row if 5 in row[t].restored)
    assert first < 4 and 5 in row[first + 1].protected
    assert all(s.cost["macs"] <= s.limits["macs"] for s in steps)
    _, forever, _ = planted(True, protect_steps=None)
    rows = [next(r for r in s.rows if r.group == "conv") for s in forever.history]
    assert all(5 in r.protected for r in rows[first:])
    assert all(5 not in r.restored for r in rows[first:])  # never masked again


def test_after_the_last_pulse_restored_filters_are_exchanged():
    """Protection off until the last step: all that is restored then has to be paid for in the same group."""
    found = 0
    for seed in range(4):
        torch.manual_seed(seed)
        run = make("residual", Budget(macs=0.4), schedule=PSAPSchedule(prune_steps=1, begin=0.2, pulse=4)).train(TOTAL)
        (step,) = run.pruner.history
        assert run.pruner.frozen and run.pruner.cost.as_dict() == step.cost
        assert run.pruner.cost.macs <= 0.4 * run.pruner.dense.macs
        for row in step.rows:
            masked = run.pruner.masked[row.group]
            assert len(row.restored) == len(row.exchanged)
            assert not set(row.restored) & set(masked) and set(row.exchanged) <= set(masked)
            found += len(row.restored)
    assert found


def test_protection_yields_to_the_budget_and_the_history_says_so():
    run = make(protect_steps=None, budget=Budget(macs=0.2), start=False)
    soft = run.pruner._soft
    run.pruner.start(run.optimizer, total_steps=TOTAL)
    rng = np.random.default_rng(0)
    for g in run.pruner.groups:  # as if every filter had been restored, with different strengths
        soft._until[g.name][:] = 2**31
        soft._strength[g.name][:] = rng.random(g.n_units)
    run.train(TOTAL)
    assert run.pruner.frozen and run.pruner.cost.macs <= 0.2 * run.pruner.dense.macs
    last, gone = run.pruner.history[-1], {}
    for step in run.pruner.history:
        assert step.cost["macs"] <= step.limits["macs"]
        for row in step.rows:
            gone.setdefault(row.group, set()).update(row.yielded)
            assert not set(row.protected) & set(row.yielded)
    assert sum(map(len, gone.values())) > 0
    strengths = [soft._strength[n][u] for n, units in gone.items() for u in units]
    kept = [soft._strength[r.group][u] for r in last.rows for u in r.protected]
    assert kept and max(strengths) < min(kept)  # the weakest first
    assert "yielded" in run.pruner.history.to_frame() and run.pruner.history.to_frame()["yielded"].sum() > 0
    run.pruner.finish()


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
    cost, last = run.pruner._planner.cost_model, run.pruner.history[-1]
    widths = {r.group: r.width for r in last.rows}
    for row in last.rows:
        without = cost.evaluate(cost.units({**widths, row.group: 0}))
        assert row.macs == last.cost["macs"] - without[0]


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
        remove_units(prunable_groups(run.model, run.x, verify=False), {"0.0": [0, 1]})
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
    monkeypatch.setattr("tp_importance.pruner.count_ops", lambda *_, **__: (1, 1))
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
    assert any("removal is not masking" in e.reason for e in report.excluded) and "left alone" in str(report)


def test_copies_share_the_case_untouched():
    """The pruner's constructor leaves the model bit for bit as it was."""
    model, x = make_network("residual")
    model.train()
    snapshot = Snapshot(model)
    PSAPPruner(model, x, budget=Budget(macs=0.5))
    snapshot.check()
    assert math.isfinite(float(topology("residual").x.sum()))
