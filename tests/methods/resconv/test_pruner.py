"""ResConvPruner: budgets, steps."""

import copy
import itertools
import warnings
from functools import cache

import pytest
import torch
from torch import nn

from helpers.resconv_cases import LOADER, X32, conv, fresh, resnet, train, vgg
from tp_importance import Budget, BudgetError, count_ops
from tp_importance.budget import Cost
from tp_importance.methods.resconv import ResConv2d, ResConvPruner, fuse
from tp_importance.methods.resconv import plan as plan_module
from tp_importance.methods.resconv import pruner as pruner_module
from tp_importance.testing import Snapshot, same_tensors
from tp_importance.testing.networks import conv_bn_relu
from tp_importance.testing.surgery import moved_statistics, norm_inputs

# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [resnet, vgg])
@pytest.mark.parametrize(
    "budget", [Budget(macs=0.8), Budget(macs=0.55), Budget(params=0.7), Budget(macs=0.75, params=0.75)], ids=str
)
def test_budgets_are_met_at_the_least_loss(budget, build):
    dense = Cost(*count_ops(build(), X32))
    pruner = fresh(budget, build)
    assert pruner.dense == dense
    model, plan = pruner.model, pruner.plan()
    expected = model(X32)
    report = pruner.step()
    assert report.removed == plan.removed and report.cost == plan.cost == Cost(*count_ops(model, X32))
    assert report.dense == dense and report.limits == budget.limits(dense) == plan.limits
    assert all(getattr(report.cost, f) <= limit for f, limit in report.limits.items())
    assert not any(isinstance(m, ResConv2d) for m in model.modules())
    assert model(X32).shape == expected.shape and report.kept_scales == {}
    # no other set of layers is cheaper and within the budget
    twin, losses = fresh(budget, build), plan.losses
    costs = plan_module.LayerCosts.of(twin.model, X32)
    for n in range(len(losses) + 1):
        for names in itertools.combinations(losses, n):
            cost = costs.without(list(names)).as_dict()
            if all(cost[f] <= limit for f, limit in plan.limits.items()):
                assert sum(losses[n] for n in names) >= sum(losses[n] for n in plan.removed) * (1 - 1e-9)


def test_unreachable():
    pruner = fresh()
    snapshot = Snapshot(pruner.model)
    least = plan_module.LayerCosts.of(pruner.model, X32).without(list(pruner.layers))
    with pytest.raises(BudgetError, match=f"with all 6 removed {least.macs} macs are left"):
        pruner.step(Budget(macs=least.macs - 1))
    with pytest.raises(BudgetError, match="params cannot be reached"):
        pruner.plan(Budget(macs=0.9, params=1))
    snapshot.check()
    assert len(pruner.step(Budget(macs=least.macs)).removed) == 6


def test_noop():
    pruner = fresh()
    y = pruner.model(X32)
    with pytest.warns(UserWarning, match="already meets the budget"):
        report = pruner.step(Budget(macs=1.0))
    assert not report.removed and report.cost.macs == pruner.dense.macs
    torch.testing.assert_close(pruner.model(X32), y)
    with pytest.raises(RuntimeError, match="it was fused"):
        pruner.step()


@pytest.mark.parametrize("budget", [0.5, None, {"macs": 0.5}, torch.tensor(0.5)], ids=str)
def test_bad_budgets(budget):
    model = resnet()
    with pytest.raises(TypeError, match=r"budget must be a Budget, e.g. Budget\(macs=0.5\)"):
        ResConvPruner(model, X32, budget=budget)
    assert not any(isinstance(m, ResConv2d) for m in model.modules())
    if budget is not None:
        with pytest.raises(TypeError, match="must be a Budget"):
            fresh().plan(budget)


@pytest.mark.parametrize(
    "options", [{"reg": -1}, {"reg": float("nan")}, {"reg": True}, {"importance": "best"}, {"a": -1}]
)
def test_bad_options(options):
    model = resnet()
    with pytest.raises(ValueError, match=next(iter(options))):
        ResConvPruner(model, X32, budget=Budget(macs=0.5), **options)
    assert not any(isinstance(m, ResConv2d) for m in model.modules())


def test_plan_touches_nothing():
    pruner = fresh(loader=LOADER)
    pruner.model.train()
    snapshot, rng = Snapshot(pruner.model), torch.get_rng_state()
    first = pruner.plan()
    assert pruner.plan() == first and pruner.plan(Budget(macs=0.5)).cost.macs < first.cost.macs
    snapshot.check()
    assert torch.equal(torch.get_rng_state(), rng)
    assert not pruner.history


def test_a_plan_is_applied_once_and_to_its_own_network():
    pruner, twin = fresh(loader=LOADER), fresh(loader=LOADER)
    plan = pruner.plan()
    report = pruner.apply(plan, fuse=False, refit="batchnorm")
    assert report == twin.step(fuse=False, refit="batchnorm") and report.removed == plan.removed
    snapshot = Snapshot(pruner.model)
    with pytest.raises(ValueError, match=f"another network: layer {plan.removed[0]} is not in both"):
        pruner.apply(plan)
    snapshot.check()


def test_blocks_built_by_hand():
    model = nn.Sequential(conv_bn_relu(3, 8), ResConv2d(conv(), s=0.1, a=1.0), nn.Flatten(), nn.Linear(512, 4))
    pruner = ResConvPruner(model.eval(), X32, budget=Budget(macs=0.5))
    assert pruner.conversion.converted == ["1"]
    assert pruner.step().removed == ["1"]


# --- step -------------------------------------------------------------------------------------------------------------


def test_modes_flags_and_hooks_stay():
    pruner = fresh(loader=LOADER)
    model = pruner.model.train()
    model[2].eval()
    for p in model[4].parameters():
        p.requires_grad_(False)
    hook = model[5].register_forward_hook(lambda *_: None)
    modes = {n: m.training for n, m in model.named_modules()}
    pruner.step(refit="batchnorm")
    assert all(m.training == modes[n] for n, m in model.named_modules())
    assert not any(p.requires_grad for p in model[4].parameters()) and model[1].training and not model[2].training
    assert [h for m in model.modules() for h in m._forward_hooks] == [hook.id]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    train(model, optimizer)


def test_a_module_in_two_blocks_of_which_one_collapses():
    model = resnet()
    model[2].relu = model[1].relu
    pruner = ResConvPruner(model.train(), X32, budget=Budget(macs=0.9), a=0.5)
    pruner.layers["1.conv1"].s.data.zero_()
    pruner.layers["1.conv2"].s.data.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(pruner.step(Budget(macs=0.8)).collapsed) == ["1"]
    assert all(m.training for m in model.modules())


@cache
def undisturbed():
    """Report and weights of a step in which nothing fails."""
    pruner = fresh(loader=LOADER)
    pruner.model.train()
    return pruner.step(refit="batchnorm"), pruner.model.state_dict()


STAGES = ["remove_layers", "recalibrate_batchnorm", "fuse_layers", "count_ops", "LayerCosts.without", "_cheapest"]


@pytest.mark.parametrize("late", [False, True], ids=["instead", "afterwards"])
@pytest.mark.parametrize("stage", STAGES)
def test_all_or_nothing(stage, late, monkeypatch):
    pruner = fresh(loader=LOADER)
    pruner.model.train()
    snapshot = Snapshot(pruner.model)
    owner, name = (plan_module.LayerCosts, "without") if "." in stage else (pruner_module, stage)
    owner = plan_module if stage == "_cheapest" else owner
    real = getattr(owner, name)

    def fails(*args, **kwargs):
        if late:
            real(*args, **kwargs)
        raise LookupError(stage)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(LookupError, match=stage):
        pruner.step(refit="batchnorm")
    monkeypatch.undo()
    snapshot.check()
    assert not pruner.history
    report, values = undisturbed()
    assert pruner.step(refit="batchnorm") == report  # as if nothing had happened
    assert same_tensors(pruner.model.state_dict(), values)


def test_a_cost_that_is_not_the_planned_one(monkeypatch):
    pruner = fresh()
    snapshot = Snapshot(pruner.model)
    monkeypatch.setattr(pruner_module, "count_ops", lambda *_, **__: (1, 1))
    with pytest.raises(RuntimeError, match="planned were"):
        pruner.step()
    snapshot.check()


def test_recalibration():
    pruner, plain = fresh(loader=LOADER), fresh(loader=LOADER)
    dense = copy.deepcopy(pruner.model)
    plain.step(fuse=False)
    pruner.step(fuse=False, refit="batchnorm")
    batches, compared = [x for x, _ in LOADER], 0
    for name, norm in pruner.model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            both = (norm_inputs(net, name, batches) for net in (dense, plain.model))
            mean, var = moved_statistics(dense.get_submodule(name), list(range(norm.num_features)), *both)
            torch.testing.assert_close(norm.running_mean, mean)
            torch.testing.assert_close(norm.running_var, var)
            compared += not torch.equal(norm.running_mean, plain.model.get_submodule(name).running_mean)
    assert compared and torch.equal(pruner.model[0][1].running_mean, dense[0][1].running_mean)
    pruner = fresh()
    snapshot = Snapshot(pruner.model)
    with pytest.raises(ValueError, match="pass loader="):
        pruner.step(refit="batchnorm")
    snapshot.check()


def test_steps_with_training_between():
    pruner = fresh()
    model = pruner.model
    first = pruner.step(Budget(macs=0.85), fuse=False)
    assert first.cost.macs <= 0.85 * pruner.dense.macs and len(pruner.layers) == 6 - len(first.removed)
    train(model, torch.optim.SGD(pruner.parameter_groups(), 0.01), pruner)
    model.eval()
    y, second = model(X32), pruner.step(Budget(macs=0.6), fuse=False)
    assert {r.name for r in second.rows} == {r.name for r in first.rows if not r.removed}
    assert pruner.history == [first, second] and second.dense == first.dense
    y = model(X32)
    fuse(model)
    torch.testing.assert_close(model(X32), y)
    assert count_ops(model, X32)[0] == second.cost.macs


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_around(context):
    model = resnet()
    with context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = ResConvPruner(model, X32, LOADER, budget=Budget(macs=0.7))
        pruner.step(Budget(macs=0.9), fuse=False)
        pruner.step(refit="batchnorm")
    assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])
    train(model, torch.optim.SGD(model.parameters(), 0.01))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = resnet()

    def forward(self, image, gain=None):
        return {"out": self.net(image if gain is None else image * gain)}


INPUTS = {
    "dict": ({"image": X32, "gain": torch.ones(2, 1, 1, 1)}, None, {}),
    "tuple": ((X32, torch.ones(2, 1, 1, 1)), None, {}),
    "loader of dicts": ({"image": X32}, [{"image": X32, "labels": torch.tensor([0, 1])}] * 2, {}),
    "forward_fn": ([X32], [[X32], [X32[:1]]], {"forward_fn": lambda m, batch: m(batch[0])}),
}


@pytest.mark.parametrize("importance", ["scale", "output"])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_all_forms(kind, importance):
    inputs, loader, options = INPUTS[kind]
    model = Named()
    pruner = ResConvPruner(model, inputs, loader, budget=Budget(macs=0.7), a=0.5, importance=importance, **options)
    assert pruner.step(refit="batchnorm" if loader is not None else None).cost.macs <= 0.7 * pruner.dense.macs
