"""A refit inside a step: undone by errors, removed as masked, statistics used twice."""

import copy
import json

import pytest
import torch

from helpers.refit_cases import L1, MODES
from helpers.states import same_state, state
from tp_importance import Budget, BudgetError, BudgetPruner, CATROImportance, Refit, prunable_groups
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import sample_units
from tp_importance.pruning.report import PruningReport
from tp_importance.refitting.refit import refit_consumers
from tp_importance.testing import class_loader, make_network


class Broken(list):
    def __iter__(self):
        yield from super().__iter__()
        raise OSError("disk")


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_unchanged_after_an_exception(mode):
    model, x = make_network("plain")
    model.train()
    pruner = BudgetPruner(model, x, Broken(class_loader()), importance=L1, budget=Budget(macs=0.6))
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(OSError, match="disk"):
        pruner.step(refit=mode)
    pruner.loader = class_loader()
    with pytest.raises(BudgetError):
        pruner.step(Budget(macs=1), refit=mode)
    pruner.loader = [(x * float("nan"), y[:2]) for x, y in [(x, torch.arange(2))]]
    with pytest.raises(ValueError, match="not finite"):
        pruner.step(refit=mode)
    assert same_state(model, before) and modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    pruner.loader = class_loader()
    assert pruner.step(refit=mode).refit.rows  # and still works


def test_a_failed_surgery_takes_the_refit_back(monkeypatch):
    model, x = make_network("plain")
    before = state(model)
    pruner = BudgetPruner(model, x, class_loader(), importance=L1, budget=Budget(macs=0.6))
    monkeypatch.setattr("tp_importance.graph.tracing.Trace.ops", (1, 1))
    with pytest.raises(RuntimeError, match="planned were"):
        pruner.step(refit=Refit("parallel", recalibrate=False))
    assert same_state(model, before)


@pytest.mark.parametrize("mode", MODES)
def test_budget_pruner_prunes_what_was_refitted(mode):
    model, x = make_network("concat")
    twin = copy.deepcopy(model)
    pruner = BudgetPruner(model, x, class_loader(), importance=L1, budget=Budget(macs=0.6))
    plan = pruner.plan()
    settings = Refit(mode, recalibrate=False)
    report = pruner.step(refit=settings)
    by_hand = refit_consumers(twin, x, class_loader(), plan.removed, settings)
    groups = prunable_groups(twin, x)
    masked = twin(x)
    remove_units(groups, plan.removed)
    assert same_state(model, state(twin)) and report.refit == by_hand
    assert report.cost == plan.cost
    torch.testing.assert_close(twin(x), masked)  # a channel nobody weighs is gone
    again = PruningReport.from_dict(json.loads(report.to_json()))
    assert again == report and "output error" in str(report)


class Counting(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_statistics_of_the_importance_are_used_again():
    models, passes = [], []
    for positions in (8, None):
        model, x = make_network("plain")
        loader = Counting(class_loader())
        pruner = BudgetPruner(model, x, loader, importance=CATROImportance(), budget=Budget(macs=0.5))
        pruner.step(refit=Refit("parallel", positions=positions, recalibrate=False))
        models.append(state(model))
        passes.append(loader.passes)
    assert passes == [1, 2]  # all positions are more than were collected
    assert not all(torch.equal(a, b) for a, b in zip(*(m.values() for m in models), strict=True))


def test_only_the_chosen_classes_count():
    loader = class_loader()
    some = [(x[y < 2], y[y < 2]) for x, y in loader]
    states = []
    for data, classes in ((loader, [0, 1]), (some, None)):
        model, x = make_network("flatten")  # the linear layers have one position each
        groups = prunable_groups(model, x)
        all_positions = Refit("parallel", positions=None)
        refit_consumers(model, x, data, sample_units(groups), all_positions, groups=groups, classes=classes)
        states.append(state(model))
    for a, b in zip(*(s.values() for s in states), strict=True):
        torch.testing.assert_close(a, b)
