"""NNI pruners that are wrong in one way each: tests of the contract find them."""

import pytest
import torch

nni = pytest.importorskip("nni")

from nni.compression.pruning import LinearPruner  # noqa: E402

from nni_plugins import OBSPruner  # noqa: E402
from nni_plugins.testing import NNIPrunerContract  # noqa: E402
from tp_importance import Budget  # noqa: E402
from tp_importance.testing import LoaderError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def first_of(masks):
    return masks["0.0"]["weight"]


def each(masks, change):
    return {name: {t: m if m is None else change(m) for t, m in ts.items()} for name, ts in masks.items()}


class MasksOneLayerOnly(OBSPruner):
    """Of a group."""

    def generate_masks(self):
        masks = super().generate_masks()
        first_of(masks).fill_(1)
        return masks


class MasksOneFilterMore(OBSPruner):
    def generate_masks(self):
        masks = super().generate_masks()
        kept = first_of(masks).flatten().nonzero()
        for targets in masks.values():
            if targets.get("weight") is not None and len(targets["weight"]) == len(first_of(masks)):
                for mask in targets.values():
                    if mask is not None:
                        mask[int(kept[0])] = 0
        return masks


class Overspends(OBSPruner):
    def __init__(self, *args, budget=None, **options):
        super().__init__(*args, budget=Budget(macs=0.9) if budget else None, **options)


class Random(OBSPruner):
    def generate_masks(self):
        return each(super().generate_masks(), lambda mask: mask[torch.randperm(len(mask))])


class ChangesWeights(OBSPruner):
    def compress(self, *args, **options):
        result = super().compress(*args, **options)
        for parameter in self.bound_model.parameters():
            parameter.data.mul_(1.01)
        return result


class LeavesAHook(OBSPruner):
    def compress(self, *args, **options):
        result = super().compress(*args, **options)
        self.bound_model.register_forward_hook(lambda *_: None)
        return result


class ChangesModes(OBSPruner):
    def compress(self, *args, **options):
        self.bound_model.eval()
        return super().compress(*args, **options)


class ForgetsMasks(OBSPruner):
    def get_masks(self):
        return each(super().get_masks(), torch.ones_like)


class TakesAnyData(OBSPruner):
    def compress(self, *args, **options):
        try:
            return super().compress(*args, **options)
        except LoaderError:
            return self.bound_model, self.get_masks()


class TakesAnyOption(OBSPruner):
    def __init__(self, *args, no_option=None, **options):
        super().__init__(*args, **options)


WRONG = {
    "one layer of a group": (MasksOneLayerOnly, ("test_coupled_layers_lose_the_same_channels",)),
    "one filter more": (
        MasksOneFilterMore,
        ("test_by_ratio_the_sped_up_model_computes_what_the_masked_one_did", "residual"),
    ),
    "overspends": (
        Overspends,
        ("test_to_a_budget_the_sped_up_model_costs_what_was_planned", "residual", "macs"),
        ("test_absolute_budget",),
        ("test_schedule", LinearPruner, Budget(macs=0.4)),
    ),
    "random": (Random, ("test_same_data_same_masks",), ("test_compressing_again_changes_nothing",)),
    "weights": (ChangesWeights, ("test_compress_leaves_the_model_wrapped_and_unwrap_restores_it",)),
    "hook": (LeavesAHook, ("test_modes_flags_hooks_data_and_random_state_are_left_alone",)),
    "modes": (ChangesModes, ("test_modes_flags_hooks_data_and_random_state_are_left_alone",)),
    "forgets masks": (ForgetsMasks, ("test_get_and_update_masks",)),
    "any data": (TakesAnyData, ("test_error_while_collecting_leaves_the_masks_alone",)),
    "any option": (TakesAnyOption, ("test_error_of_the_constructor_leaves_the_model_alone",)),
}


def contract_of(pruner):
    contract = NNIPrunerContract()
    contract.pruner_class = pruner
    return contract


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_pruner_fails(kind):
    pruner, *found_by = WRONG[kind]
    for name, *arguments in found_by:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            getattr(contract_of(pruner), name)(*arguments)


# that a sound pruner passes: tests/nni_plugins/pruners/test_pruner.py
