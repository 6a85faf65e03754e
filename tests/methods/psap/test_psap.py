"""PSAP's loop: masks, budgets, protection."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from helpers.networks import make_zoo_network
from helpers.psap_cases import TOTAL, adam, make, sgd
from tp_importance import Budget, PSAPPruner, PSAPSchedule, count_ops
from tp_importance.budget import Cost
from tp_importance.methods.psap.sparsity import cubic_target
from tp_importance.testing import make_network

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
    cost, limits = run.pruner.target.cost_model, budget.limits(run.pruner.dense)
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
