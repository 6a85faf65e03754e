"""Pruners that are wrong in one way each: every test of the contract fails for some of them."""

import warnings

import pytest
import torch
import torch_pruning as tp

from tp_importance import Budget, BudgetPruner, CATROImportance
from tp_importance.graph.history import PruningHistory
from tp_importance.testing import LoaderError, PrunerContract


class Sound(BudgetPruner):
    def __init__(self, model, x, loader, *, budget, **options):
        options.setdefault("importance", tp.importance.MagnitudeImportance(p=1))
        super().__init__(model, x, loader, budget=budget, **options)


class Overspends(Sound):
    def step(self, budget=None, **options):
        return super().step(Budget(macs=0.9), **options)


class OfWhatIsLeft(Sound):
    """Budgets are fractions of the network as it is, not as it was."""

    def plan(self, budget=None):
        budget = self.budget if budget is None else budget
        if isinstance(budget, Budget) and budget.macs is not None and budget.macs <= 1:
            budget = Budget(macs=budget.macs * self.cost_model.dense.macs / self.dense.macs)
        return super().plan(budget)


class PlansByDoing(Sound):
    def plan(self, budget=None):
        self.model.eval()
        next(self.model.parameters()).data.mul_(1.01)
        return super().plan(budget)


class Random(Sound):
    def __init__(self, *args, **options):
        super().__init__(*args, importance=tp.importance.RandomImportance(), **options)


class DrawsNumbers(Sound):
    def step(self, *args, **options):
        torch.rand(1)
        return super().step(*args, **options)


class ForgetsItsHistory(Sound):
    def apply(self, plan, **options):
        report = super().apply(plan, **options)
        history = self.target._history
        self.target._history = PruningHistory(history.direct[:1], history.host[:1])
        return report


class LeavesAHook(Sound):
    """Masks instead of removing: the network computes what its parameters do not say."""

    def apply(self, plan, **options):
        report = super().apply(plan, **options)
        self.model.register_forward_hook(lambda _m, _x, y: 2 * y)
        return report


class Thaws(Sound):
    def apply(self, plan, **options):
        report = super().apply(plan, **options)
        self.model.requires_grad_(True)
        return report


class NeverRefits(Sound):
    def step(self, budget=None, *, refit=None):
        return super().step(budget)


class LeavesInferenceTensors(Sound):
    def apply(self, plan, **options):
        report = super().apply(plan, **options)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())
        return report


class PrunesOnce(Sound):
    def step(self, budget=None, **options):
        return self.report if hasattr(self, "report") else self._first(budget, **options)

    def _first(self, budget, **options):
        self.report = super().step(budget, **options)
        return self.report


class SaysNothing(Sound):
    def step(self, *args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().step(*args, **options)


class LooksAgain(Sound):
    def plan(self, budget=None):
        list(self.loader)
        return super().plan(budget)


class TakesNumbers(Sound):
    def step(self, budget=None, **options):
        return super().step(Budget(macs=budget) if isinstance(budget, float) else budget, **options)


class DropsOptions(Sound):
    def __init__(self, model, x, loader, *, budget, allocator=None, **options):
        super().__init__(model, x, loader, budget=budget)


class TakesAnything(Sound):
    """A step or a history that fails is passed over in silence."""

    def step(self, *args, **options):
        try:
            return super().step(*args, **options)
        except Exception:
            return None

    def load_pruning_history(self, history):
        try:
            super().load_pruning_history(history)
        except Exception:
            self._history = []


class TakesAnyLabels(TakesAnything):
    def __init__(self, *args, **options):
        super().__init__(*args, importance=CATROImportance(), **options)


class LeavesPieces(Sound):
    """A step that fails behind the surgery leaves the channels removed."""

    def step(self, budget=None, **options):
        report = super().step(budget)
        if options:
            list(self.loader)
        return report


OPTIONS = {"round_to": 0}
WRONG = {
    "overspends": (
        Overspends,
        ("test_step_does_what_the_plan_says", "residual"),
        ("test_budgets_are_met", Budget(macs=0.3)),
        ("test_the_user_may_train_between_steps",),
    ),
    "of what is left": (OfWhatIsLeft, ("test_repeated_steps_refer_to_the_original_cost", "greedy")),
    "plans by doing": (PlansByDoing, ("test_step_does_what_the_plan_says", "residual")),
    "random": (Random, ("test_the_same_seed_gives_the_same_network",)),
    "draws numbers": (DrawsNumbers, ("test_the_same_seed_gives_the_same_network",)),
    "forgets its history": (ForgetsItsHistory, ("test_history_replays", "residual")),
    "leaves a hook": (
        LeavesAHook,
        ("test_pruned_network_can_be_saved_and_loaded", "residual"),
        ("test_flags_and_statistics_stay",),
    ),
    "thaws": (Thaws, ("test_flags_and_statistics_stay",)),
    "never refits": (NeverRefits, ("test_recalibration",), ("test_bad_loaders", "NaN")),
    "inference tensors": (LeavesInferenceTensors, ("test_gradients_switched_off_around", torch.inference_mode)),
    "prunes once": (PrunesOnce, ("test_the_user_may_train_between_steps",)),
    "says nothing": (SaysNothing, ("test_whole_budget_changes_nothing_and_warns",)),
    "looks again": (LooksAgain, ("test_one_budget_after_another_needs_no_second_look_at_the_data",)),
    "takes numbers": (TakesNumbers, ("test_bad_budgets", 0.5)),
    "drops options": (
        DropsOptions,
        ("test_options",),
        ("test_bad_options", OPTIONS),
        ("test_allocators", "mine"),
        ("test_no_group_to_prune",),
    ),
    "takes anything": (
        TakesAnything,
        ("test_an_allocator_that_breaks_its_promise",),
        ("test_no_group_to_prune",),
        ("test_bad_loaders", "NaN"),
        ("test_the_loaders_own_exception_passes",),
        ("test_a_step_that_failed_can_be_repeated",),
        ("test_a_history_that_does_not_fit",),
    ),
    "takes any labels": (TakesAnyLabels, ("test_bad_labels", "unlabelled")),
    "leaves pieces": (
        LeavesPieces,
        ("test_the_loaders_own_exception_passes",),
        ("test_a_step_that_failed_can_be_repeated",),
    ),
}


def contract_of(pruner, *, uses_data=False, needs_labels=False):
    contract = PrunerContract()
    contract.uses_data, contract.needs_labels = uses_data, needs_labels
    contract.make = lambda model, x, loader, budget, **options: pruner(model, x, loader, budget=budget, **options)
    return contract


def run(contract, name, *arguments, tmp_path):
    files = [tmp_path] if name in ("test_history_replays", "test_pruned_network_can_be_saved_and_loaded") else []
    getattr(contract, name)(*arguments, *files)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_pruner_fails(kind, tmp_path):
    pruner, *found_by = WRONG[kind]
    contract = contract_of(pruner, uses_data=pruner is TakesAnyLabels, needs_labels=pruner is TakesAnyLabels)
    for name, *arguments in found_by:
        with pytest.raises((AssertionError, pytest.fail.Exception, LoaderError)):
            run(contract, name, *arguments, tmp_path=tmp_path)


def test_every_test_of_the_contract_can_fail():
    found_by = {name for _, *tests in WRONG.values() for name, *_ in tests}
    assert found_by == {name for name in dir(PrunerContract) if name.startswith("test_")}


def test_a_sound_pruner_passes_all_of_these(tmp_path):
    """So it is the fault, and not the way of calling, that is found."""
    contract = contract_of(Sound)
    for name, *arguments in [test for _, *tests in WRONG.values() for test in tests]:
        if name != "test_bad_labels":  # magnitudes read none
            run(contract, name, *arguments, tmp_path=tmp_path)
