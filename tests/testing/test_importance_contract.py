"""Importances that are wrong in one way each: every test of the contract fails for some of them."""

import copy

import numpy as np
import pytest
import torch

from tp_importance import CATROImportance
from tp_importance.allocation.curves import curve_from_scores
from tp_importance.errors import NotCollectedError, StaleStatisticsError
from tp_importance.testing import ImportanceContract


class Ties(CATROImportance):
    def __call__(self, group):
        scores = super().__call__(group)
        return None if scores is None else (scores * 3).ceil() / 3


class NotANumber(CATROImportance):
    def __call__(self, group):
        scores = super().__call__(group)
        return None if scores is None else scores.index_fill(0, torch.tensor([0]), float("nan"))


class WrongLength(CATROImportance):
    def __call__(self, group):
        scores = super().__call__(group)
        return None if scores is None else scores[:-1]


class PrecisionOfTheModel(CATROImportance):
    def __call__(self, group):
        scores = super().__call__(group)
        return None if scores is None else scores.to(group[0].dep.target.module.weight.dtype)


class OnTheGraph(CATROImportance):
    def __call__(self, group):
        scores = super().__call__(group)
        return None if scores is None else scores.clone().requires_grad_()


class OtherAtInputs(CATROImportance):
    """A unit scores less where Torch-Pruning enters its group by a consumer."""

    def __call__(self, group):
        scores = super().__call__(group)
        at_output = group[0].dep.target.module.weight.shape[0] == len(group[0].idxs)
        return scores if scores is None or at_output else scores / 2


class SortsWhatIsAskedFor(CATROImportance):
    def __call__(self, group):
        scores = super().__call__(group)
        return scores if scores is None or len(scores) > 3 else scores.sort().values


class UpsideDown(CATROImportance):
    def __call__(self, group):
        scores = super().__call__(group)
        return None if scores is None else 1.5 - scores


class FirstChannelsFirst(CATROImportance):
    def value(self, groups):
        return {g.name: curve_from_scores(np.arange(1.0, g.n_units + 1)) for g in groups}


class Random(CATROImportance):
    def value(self, groups):
        return {g.name: curve_from_scores(np.random.default_rng().random(g.n_units) + 0.1) for g in groups}


class ScoresEverything(CATROImportance):
    def __call__(self, group):
        scores = super().__call__(group)
        return torch.arange(1.0, 1 + len(group[0].idxs)) if scores is None else scores


class GuessesBefore(CATROImportance):
    def __call__(self, group):
        try:
            return super().__call__(group)
        except NotCollectedError:
            return torch.ones(len(group[0].idxs))


class ToldNothingOfStaleness(CATROImportance):
    def __call__(self, group):
        try:
            return super().__call__(group)
        except StaleStatisticsError:
            return torch.ones(len(group[0].idxs))


class ForgetsWhenItFails(CATROImportance):
    def collect(self, *args, **options):
        self._cached_curves = {}
        return super().collect(*args, **options)


class TakesNothing(CATROImportance):
    def collect(self, *args, **options):
        try:
            return super().collect(*args, **options)
        except ValueError:
            return self


class Changes(CATROImportance):
    """The model while it looks at it."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def collect(self, model, *args, **options):
        super().collect(model, *args, **options)
        self.change(model)
        return self


def scale(model):
    model.get_parameter("1.body.0.0.weight").data.mul_(1.001)


def swap(model):
    model[0][0].weight = torch.nn.Parameter(copy.deepcopy(model[0][0].weight.data), requires_grad=False)


CHANGES = {
    "a value": scale,
    "a parameter": swap,
    "a mode": lambda model: model.eval(),
    "a flag": lambda model: model.requires_grad_(True),
    "a hook": lambda model: model[0].register_forward_hook(lambda *_: None),
    "the random state": lambda model: torch.rand(1),
}

COLLECT = "test_collect_leaves_the_model_alone"
WRONG = {
    "ties": (Ties, ("test_scores_of_every_root", "residual"), ("test_torch_pruning_globally", "residual")),
    "NaN": (NotANumber, ("test_scores_of_every_root", "residual"), ("test_other_precisions", torch.bfloat16)),
    "wrong length": (WrongLength, ("test_scores_of_every_root", "residual")),
    "wrong dtype": (PrecisionOfTheModel, ("test_other_precisions", torch.float64)),
    "on the graph": (OnTheGraph, ("test_scores_of_every_root", "residual")),
    "two scores of one unit": (OtherAtInputs, ("test_scores_of_every_root", "residual")),
    "not as asked": (SortsWhatIsAskedFor, ("test_scores_of_some_channels",)),
    "upside down": (
        UpsideDown,
        ("test_ranks_follow_the_curve", "residual"),
        ("test_torch_pruning_locally", "residual"),
    ),
    "by position": (FirstChannelsFirst, ("test_equivariant_to_the_order_of_channels", "residual", "0.0")),
    "random": (Random, ("test_deterministic",)),
    "unsafe groups": (ScoresEverything, ("test_unsafe_groups_get_none_and_are_skipped", "plain")),
    "guesses": (GuessesBefore, ("test_nothing_before_collect",)),
    "stale": (ToldNothingOfStaleness, ("test_stale_after_a_step",)),
    "forgets": (ForgetsWhenItFails, ("test_a_failed_collect_keeps_the_old_statistics",)),
    "takes nothing": (TakesNothing, ("test_no_group_to_prune",)),
    **{f"changes {what}": (lambda change=change: Changes(change), (COLLECT,)) for what, change in CHANGES.items()},
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_importance_fails(kind):
    make, *found_by = WRONG[kind]
    contract = ImportanceContract()
    contract.make = make
    for name, *arguments in found_by:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            getattr(contract, name)(*arguments)


def test_every_test_of_the_contract_can_fail():
    found_by = {name for _, *tests in WRONG.values() for name, *_ in tests}
    assert found_by == {name for name in dir(ImportanceContract) if name.startswith("test_")}


def test_a_sound_importance_passes_all_of_these():
    """So it is the fault, and not the way of calling, that is found."""
    contract = ImportanceContract()
    contract.make = CATROImportance
    for name, *arguments in {test for _, *tests in WRONG.values() for test in tests}:
        getattr(contract, name)(*arguments)
