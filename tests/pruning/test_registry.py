"""One registration makes a method known in both hosts, in prune() and in searches."""

import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp

from helpers.states import weights
from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    CATROPruner,
    GradientImportance,
    OBSImportance,
    prune,
    register_method,
)
from tp_importance.allocation.curves import curve_from_scores
from tp_importance.automl import prune_trial, search_space
from tp_importance.pruning import registry
from tp_importance.pruning.registry import METHODS, find_criterion, find_method
from tp_importance.pruning.target import PruningTarget
from tp_importance.testing import class_loader, make_network

HALF = Budget(macs=0.5)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "METHODS", registry._METHODS)


class Last:
    """Keeps the first channels of every group."""

    default_allocator = "uniform"

    def curves(self, groups):
        return {g.name: curve_from_scores(np.arange(g.n_units)[::-1] + 1.0) for g in groups}


def test_a_method_is_known_everywhere():
    register_method("last", Last)
    widths = []
    for use in ("prune", "pruner", "search", "nni"):
        model, x = make_network("plain")
        first = model[0][0].weight.clone()
        if use == "prune":
            prune(model, x, class_loader(32), budget=HALF, method="last", refit=None)
        elif use == "pruner":
            BudgetPruner(model, x, importance="last", budget=HALF).step()
        elif use == "search":
            kept = []
            options = {"example_inputs": x, "evaluate": lambda net: 0.0, "budget": HALF, "latency_seconds": None}
            prune_trial(model, {"method": "last"}, keep=kept.append, **options)
            model = kept[0]
            assert [p.name for p in search_space(methods=["last"]).parameters] == ["method"]
        else:
            nni_plugins = pytest.importorskip("nni_plugins")
            config = [{"op_types": ["Conv2d"]}]
            host = nni_plugins.ImportancePruner(model, config, loader=class_loader(32), importance="last", budget=HALF)
            _, masks = host.compress()
            host.unwrap_model()
            nni_plugins.speedup(model, x, masks)
        kept = model[0][0]
        torch.testing.assert_close(kept.weight, first[: kept.out_channels])
        widths.append([m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)])
    assert len({tuple(w) for w in widths}) == 1 and widths[0][0] < 8


def test_what_methods_need():
    needs = {name: method.needs for name, method in METHODS.items()}
    assert needs["obs"] == ("loader",) and needs["l1"] == () and needs["itpruner"] == ("loader",)
    assert needs["catro"] == ("loader", "labels") and needs["psap_training"] == ("training",)
    assert needs["psap"] == needs["taylor"] == ("loader", "labels", "gradients")


def test_the_registry_is_strict():
    with pytest.raises(ValueError, match="'obs' is registered already"):
        register_method("obs", OBSImportance)
    for name in ("", "a.b", "a:b"):
        with pytest.raises(ValueError, match="cannot be the name"):
            register_method(name, OBSImportance)
    for neither_or_both in ({}, {"importance": OBSImportance, "prune": print}):
        with pytest.raises(TypeError, match="give one of them"):
            register_method("mine", **neither_or_both)
    with pytest.raises(TypeError):
        METHODS["x"] = METHODS["obs"]
    with pytest.raises(ValueError, match=r"method='nope' is unknown; known: \[.*'obs'"):
        find_criterion("nope")
    with pytest.raises(ValueError, match=r"^importance='psap_training' is no criterion for channels: use PSAPPruner"):
        BudgetPruner(*make_network("plain"), importance="psap_training", budget=HALF)
    assert find_method("resconv").make is None and find_method("catro").make is CATROImportance


def test_criteria_that_read_gradients_are_given_them():
    data, x = class_loader(32), make_network("plain")[1]
    by_name, by_hand, host = (make_network("plain")[0] for _ in range(3))
    report = prune(by_name, x, data, budget=HALF, method="taylor", refit=None).report
    assert report.criterion == "TaylorImportance"
    for images, labels in data:
        torch.nn.functional.cross_entropy(by_hand.eval()(images), labels).backward()
    BudgetPruner(by_hand, x, importance=tp.importance.TaylorImportance(), budget=HALF).step()
    assert torch.equal(weights(by_name), weights(by_hand))
    taylor = GradientImportance(tp.importance.TaylorImportance()).collect(host.eval(), x, data)
    tp.pruner.BasePruner(host, x, taylor, pruning_ratio=0.5, ignored_layers=[host[3][2]]).step()
    assert host[0][0].out_channels == 4 and all(p.grad is None for p in host.parameters())


def test_criteria_without_the_gradients_they_read_say_so():
    model, x = make_network("plain")
    for importance in (tp.importance.TaylorImportance(), tp.importance.GroupTaylorImportance()):
        pruner = BudgetPruner(model, x, importance=importance, budget=HALF)
        with pytest.raises(ValueError, match=rf"GradientImportance\({type(importance).__name__}\(\)\)"):
            pruner.plan()
        wrapped = GradientImportance(importance)
        assert BudgetPruner(model, x, class_loader(32), importance=wrapped, budget=HALF).plan().cost.macs > 0


def test_gradients_are_collected_again_after_a_step():
    model, x = make_network("plain")
    pruner = BudgetPruner(model, x, class_loader(32), importance="taylor", budget=Budget(macs=0.7))
    pruner.step()
    assert pruner.step(Budget(macs=0.4)).cost.macs <= 0.4 * pruner.dense.macs


def test_a_target_takes_anybodys_choice():
    model, x = make_network("residual")
    twin, target = copy.deepcopy(model), PruningTarget(model, x)
    removed = {g.name: list(range(g.n_units // 4)) for g in target.groups}
    plan = target.plan(removed, {"macs": target.dense.macs})
    report = target.apply(plan, class_loader(32), refit="sequential", criterion="mine")
    assert report.cost == plan.cost and report.criterion == "mine" and report.refit.mode == "sequential"
    PruningTarget(twin, x).load_pruning_history(target.pruning_history())
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
    again = BudgetPruner(
        target.model, target.example_inputs, target=target, importance="l1", budget=Budget(macs=0.4)
    ).step()
    assert again.cost.macs <= 0.4 * target.dense.macs and again.before == report.cost


def test_a_target_is_of_one_network_and_has_its_options():
    model, x = make_network("plain")
    target = PruningTarget(model, x)
    for other, options in ((make_network("plain")[0], {}), (model, {"round_to": 8})):
        with pytest.raises(TypeError, match="target= is a network with options of its own"):
            BudgetPruner(other, x, importance="l1", budget=HALF, target=target, **options)
    pruner = CATROPruner(model, x, class_loader(32), budget=HALF, target=target)
    assert pruner.step().cost.macs <= 0.5 * target.dense.macs


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.make is not None])
def test_every_criterion_masks_in_nni_what_it_removes_in_torch_pruning(name):
    nni_plugins = pytest.importorskip("nni_plugins")
    widths = []
    for host in ("nni", "torch-pruning"):
        model, x = make_network("plain")
        config, data = [{"op_types": ["Conv2d"]}], class_loader(32)
        if host == "nni":
            pruner = nni_plugins.ImportancePruner(
                model, config, loader=data, importance=name, budget=HALF, example_inputs=x
            )
            pruner.compress()
            widths.append((pruner.plan.widths, None if name == "random" else pruner.plan.removed))
        else:
            plan = BudgetPruner(model, x, data, importance=name, budget=HALF).plan()
            widths.append((plan.widths, None if name == "random" else plan.removed))
    assert {k: widths[1][0][k] for k in widths[0][0]} == widths[0][0] and widths[0][1] == widths[1][1]


def test_pruners_that_share_a_target_see_each_others_steps():
    model, x = make_network("plain")
    target = PruningTarget(model, x)
    first = BudgetPruner(
        target.model,
        target.example_inputs,
        target=target,
        loader=class_loader(32),
        importance="obs",
        budget=Budget(macs=0.7),
    )
    second = BudgetPruner(
        target.model,
        target.example_inputs,
        target=target,
        loader=class_loader(32),
        importance="catro",
        budget=Budget(macs=0.5),
    )
    assert first.plan().widths and second.plan().widths  # both have collected
    first.step()
    report = second.step()  # on the smaller network: its statistics are collected anew
    assert report.before.macs <= 0.7 * target.dense.macs and report.cost.macs <= 0.5 * target.dense.macs


def test_another_importance_is_collected_anew():
    model, x = make_network("plain")
    pruner, twin = (BudgetPruner(model, x, class_loader(32), importance="obs", budget=HALF) for _ in range(2))
    pruner.plan()
    pruner.importance = twin.importance = CATROImportance()
    assert pruner.plan().removed == twin.plan().removed


def test_a_shared_importance_refits_with_the_data_of_its_pruner():
    others = [(3 * x + 1, y) for x, y in class_loader(32, seed=5)]
    reports = []
    for shared in (False, True):
        model, x = make_network("plain")
        importance = OBSImportance()
        pruner = BudgetPruner(model, x, class_loader(32), importance=importance, budget=HALF)
        plan = pruner.plan()
        if shared:
            BudgetPruner(model, x, others, importance=importance, budget=HALF, target=pruner.target).plan()
        reports.append(pruner.apply(plan, refit="parallel").refit)
    assert reports[0] == reports[1]


def test_plans_of_another_network_or_time_are_refused():
    model, x = make_network("plain")
    pruner = BudgetPruner(model, x, importance="l1", budget=HALF)
    nothing, half = pruner.plan(Budget(macs=1.0)), pruner.plan()
    pruner.step(Budget(macs=0.7))
    for stale in (nothing, half):
        with pytest.raises(ValueError, match="the plan was made for 8 channels of group"):
            pruner.apply(stale)
    with pytest.raises(ValueError, match=r"no prunable group is called|of another network|was made for"):
        pruner.apply(BudgetPruner(*make_network("residual"), importance="l1", budget=HALF).plan())


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (lambda cost: cost.full, "above the limits"),
        (lambda cost: 0 * cost.full, "0 units; admissible are"),
        (lambda cost: cost.full - 0.5, "7.5 units; admissible are"),
        (lambda cost: cost.full[:-1], "one number per group"),
    ],
)
def test_allocators_that_break_their_promise_are_refused(units, message):
    model, x = make_network("plain")
    pruner = BudgetPruner(model, x, importance="l1", budget=HALF, allocator=lambda _c, cost, _s, _l: units(cost))
    with pytest.raises(ValueError, match=message):
        pruner.step()


def test_what_is_no_method_is_not_registered():
    with pytest.raises(TypeError, match="must be text"):
        register_method(5, OBSImportance)
    with pytest.raises(ValueError, match="cannot be the name"):
        register_method("x y", OBSImportance)
    with pytest.raises(TypeError, match="needs a class or a function"):
        register_method("three", 3)
