"""What ResConvPruner says a layer is worth, and its budgets of latency."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from helpers.resconv_cases import LOADER, X32, fresh, resnet, vgg
from tp_importance import Budget, BudgetError
from tp_importance.methods.resconv import ResConvPruner, removal_controls
from tp_importance.testing import Snapshot

# --- losses -----------------------------------------------------------------------------------------------------------


def error_without(model, controls):
    """Relative change of the output with the layers of ``controls`` removed, computed on a copy."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, a in controls.items():
            twin.get_submodule(name).s.zero_()
            twin.get_submodule(name).a.fill_(a)
        dense, found = (torch.cat([net(x) for x, _ in LOADER]) for net in (model, twin))
    return ((found - dense).square().sum() / dense.square().sum()).item()


def test_output_losses_follow_a_greedy_elimination():
    pruner = fresh(importance="output", loader=LOADER)
    pruner.layers["1.conv2"].a.data.zero_()
    before = {n: v.clone() for n, v in pruner.model.state_dict().items()}
    model, found = pruner.model, pruner.losses()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    controls = removal_controls(model, pruner.layers, LOADER, X32)
    alone = {n: error_without(model, {n: controls[n]}) for n in found}
    first = min(alone, key=alone.get)
    assert found[first] == pytest.approx(alone[first], rel=1e-4) and found[first] == min(found.values())
    order = sorted(found, key=found.get)
    errors = np.array([error_without(model, {n: controls[n] for n in order[: i + 1]}) for i in range(len(order))])
    worst = np.maximum.accumulate(errors)
    good = worst <= 1.0  # beyond, the old answers stand
    assert good[0] and np.allclose([found[n] for n in np.array(order)[good]], worst[good], rtol=1e-4)


def test_a_layer_of_a_dead_branch_costs_nothing_more():
    pruner = fresh(importance="output", loader=LOADER)
    with torch.no_grad():
        pruner.layers["1.conv2"].s.fill_(1e-6)
        pruner.layers["1.conv2"].a.fill_(1e-6)
    found = pruner.losses()
    assert found["1.conv1"] < 1e-6 and found["1.conv2"] < 1e-6 < min(v for n, v in found.items() if n[:2] != "1.")


def test_what_untrained_layers_hand_on():
    pruner = fresh(loader=LOADER)
    trained = pruner.layers["1.conv1"].a.item()
    added = pruner.layers["1.conv2"]
    added.a.data.zero_()
    seen = []
    added.register_forward_hook(lambda _m, args, out: seen.append((args[0].double(), out.double())))
    found = removal_controls(pruner.model, pruner.layers, LOADER, X32)
    assert found["1.conv1"] == trained
    xy, xx = (sum(float((x * y).sum()) for x, y in pairs) for pairs in (seen[1:], [(x, x) for x, _ in seen[1:]]))
    assert found["1.conv2"] == pytest.approx(max(xy / xx, 1e-3), rel=1e-4)
    assert removal_controls(pruner.model, pruner.layers, None, X32)["1.conv2"] == 1.0


def test_scale_losses_are_the_naive_ones():
    pruner = fresh(loader=LOADER, build=vgg)
    model, found = pruner.model, pruner.losses()
    inputs = {n: [] for n in found}
    for name, layer in pruner.layers.items():
        layer.register_forward_hook(lambda m, args, out, n=name: inputs[n].append((args[0], m.conv(args[0]))))
    with torch.no_grad():
        for x, _ in LOADER:
            model(x)
    for name, layer in pruner.layers.items():
        rms = [float(torch.cat(t).detach().square().mean().sqrt()) for t in zip(*inputs[name], strict=True)]
        branch = rms[1] if isinstance(layer.bn, nn.Identity) else float(layer.bn.weight.detach().square().mean().sqrt())
        assert found[name] == pytest.approx(abs(layer.s.item()) * branch / (layer.a.item() * rms[0]), rel=1e-4)


def test_own_importance():
    chosen = {"1.conv2": 0.0, "2.conv1": 0.0}
    pruner = fresh(importance=lambda model, layers: {n: chosen.get(n, 1.0) for n in layers}, budget=Budget(macs=0.8))
    assert set(pruner.step().removed) <= set(chosen)
    for bad in (lambda m, ls: {}, lambda m, ls: dict.fromkeys(ls, -1.0), lambda m, ls: dict.fromkeys(ls, np.nan)):
        pruner = fresh(importance=bad)
        with pytest.raises(ValueError, match=r"importance gives .* for layer 1\.conv1"):
            pruner.step()


@pytest.mark.parametrize("importance", ["scale", "output"])
@pytest.mark.parametrize("where", ["weight", "s"])
def test_values_that_are_not_finite(importance, where):
    pruner = fresh(importance=importance)
    layer = pruner.layers["1.conv1"]
    (layer.s if where == "s" else layer.conv.weight).data.fill_(float("nan"))
    snapshot = copy.deepcopy(pruner.model.state_dict())
    with pytest.raises(ValueError, match=r"nan.*layer 1\.conv1|layer 1\.conv2: .*nan"):
        pruner.step()
    assert pruner.model.state_dict().keys() == snapshot.keys()


# --- latency ----------------------------------------------------------------------------------------------------------


def clock(monkeypatch, share=1.0, base=1.0):
    """Time is MACs: `share` of what a layer saves by itself shows in the network."""

    def measure(model, x, **_):
        conv_ms = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) / 1e3
        single = isinstance(model, nn.Conv2d)
        return SimpleNamespace(median_ms=conv_ms if single else base + share * conv_ms)

    monkeypatch.setattr("tp_importance.methods.resconv.costs.measure_latency", measure)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("budget", [Budget(latency=0.8), Budget(latency=0.95, macs=0.7), Budget(latency=1.0)], ids=str)
def test_latency_budgets(budget, share, monkeypatch):
    clock(monkeypatch, share, base=0.1)
    pruner = fresh(budget)
    snapshot = Snapshot(pruner.model)
    plan = pruner.plan()
    snapshot.check()
    found = plan.latency_ms
    assert found.measured <= found.limit == pytest.approx(budget.latency * found.dense)
    if budget.latency == 1:
        assert not plan.removed and found.measured == found.predicted == found.dense
        return
    report = pruner.step()
    assert report.removed == plan.removed and report.latency_ms == found and "latency, ms" in str(report)
    assert all(report.cost.as_dict()[f] <= limit for f, limit in report.limits.items())
    if share == 1:
        assert found.predicted == pytest.approx(found.measured)
        rest = [r.params for r in report.rows if r.removed]
        assert found.limit - found.measured <= max(rest) / 1e3 or "macs" in report.limits


def test_latency_that_cannot_be_had(monkeypatch):
    clock(monkeypatch, share=0.5, base=10.0)
    pruner = fresh(Budget(latency_ms=5.0))
    snapshot = Snapshot(pruner.model)
    with pytest.raises(BudgetError, match=r"latency budget of 5\.000 ms cannot be reached.*with 6 of 6 removed"):
        pruner.step()
    snapshot.check()


@pytest.mark.slow
def test_latency_by_the_clock():
    pruner = ResConvPruner(resnet(), X32, budget=Budget(latency_ms=1e4), min_run_time=0.01)
    plan = pruner.plan()
    assert not plan.removed and set(plan.latency_ms.to_dict()) == {"dense", "limit", "predicted", "measured"}
    assert all(v > 0 for v in plan.latency_ms.to_dict().values())
    assert pruner.state_dict()["dense_ms"] == plan.latency_ms.dense
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert pruner.step().latency_ms.dense == plan.latency_ms.dense
    with pytest.raises(ValueError, match="min_run_time"):
        ResConvPruner(resnet(), X32, budget=Budget(latency=0.5), min_run_time=0).plan()
