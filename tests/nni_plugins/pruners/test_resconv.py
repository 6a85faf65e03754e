"""ResConv through NNI: conversion, masks, removal."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

nni = pytest.importorskip("nni")

from helpers.nni_resconv_cases import (  # noqa: E402
    CONVS,
    HALF,
    LAYERS,
    LOADER,
    MARKS,
    assert_sped_up,
    evaluator_of,
    network,
    pruner_of,
    scale,
)
from nni_plugins import ResConvPruner, speedup  # noqa: E402
from nni_plugins.testing import assert_same_masks, hooks, output, relative_error, wrappers  # noqa: E402
from tp_importance import Budget, BudgetError, convert_to_resconv, count_ops, load_pruned, save_pruned  # noqa: E402
from tp_importance.budget import Cost  # noqa: E402
from tp_importance.methods.resconv import resconv_layers  # noqa: E402
from tp_importance.testing import Snapshot  # noqa: E402
from tp_importance.testing.networks import head  # noqa: E402

pytestmark = MARKS


# -- conversion, selected by config_list


def test_conversion_keeps_the_function_and_lists_what_it_left_out():
    model, x = network()
    before = output(model, x)
    pruner = ResConvPruner(model, CONVS, budget=HALF, example_inputs=x)
    assert list(resconv_layers(model)) == LAYERS
    assert pruner.left_out.keys() == {"0.0", "4.body.0.0", "4.shortcut.0"}
    assert torch.equal(output(model, x), before)
    assert {n for n in wrappers(model) if "body" not in n} == {"1.0._nni_wrapper", "2.0._nni_wrapper"}
    assert list(pruner.get_masks()) == LAYERS


@pytest.mark.parametrize(
    ("config_list", "layers"),
    [
        ([{"op_names": ["1.0", "3.body.1.0"]}], ["1.0", "3.body.1.0"]),
        ([{"op_names_re": [r"3\.body.*"]}], ["3.body.0.0", "3.body.1.0"]),
        ([{"op_types": ["Conv2d"], "exclude_op_names": ["1.0", "2.0"]}], LAYERS[2:]),
        ([{"op_types": ["Conv2d"], "exclude_op_names_re": [r".*body.*"]}], LAYERS[:2]),
        ([{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}], LAYERS),
        ([{"op_names": ["1.0"]}, {"op_names": ["2.0"], "sparse_ratio": 0.3}], LAYERS[:2]),
        ([{"sparsity": 0.5, "op_types": ["Conv2d"]}, {"exclude": True, "op_names": ["2.0"]}], ["1.0", *LAYERS[2:]]),
    ],
)
def test_selection(config_list, layers):
    config_list = copy.deepcopy(config_list)
    given = copy.deepcopy(config_list)
    pruner, x = pruner_of(config_list, budget=Budget(macs=0.9))
    assert config_list == given
    assert list(resconv_layers(pruner.bound_model)) == layers
    with pytest.warns(UserWarning, match="nothing was trained"):
        _, masks = pruner.compress()
    assert list(masks) == layers
    assert_sped_up(pruner, masks, x)


def test_selection_in_a_converted_model_uses_the_names_before():
    model, x = network()
    convert_to_resconv(model, x, ignored_layers=[model[1][0]])
    layers = LAYERS[1:]
    with pytest.raises(ValueError, match=r"layer 2\.0 is a ResConv2d already"):
        ResConvPruner(model, [{"op_names_re": [r"[34].*"]}], budget=HALF, example_inputs=x)
    pruner = ResConvPruner(model, [{"op_types": ["Conv2d"]}], budget=HALF, example_inputs=x)
    assert list(pruner.get_masks()) == layers


def test_a_layer_that_is_named_and_cannot_be_converted_is_warned_of():
    with pytest.warns(UserWarning, match=r"named in config_list: \{'4\.shortcut\.0': 'stride"):
        pruner_of([{"op_names": ["4.shortcut.0", "1.0", "2.0"]}], budget=Budget(macs=0.9))


@pytest.mark.parametrize(
    ("config_list", "message"),
    [
        ([{"op_types": ["Linear"]}], "selects no nn.Conv2d"),
        ([{"op_names": ["0.0", "4.shortcut.0"]}], "no convolution that could take a shortcut"),
        ([{"op_names": ["nowhere"]}], r"op_names names \['nowhere'\]"),
        ([{**CONVS[0], "max_sparse_ratio": 0.5}], "max_sparse_ratio"),
        ([{**CONVS[0], "sparse_ratio": 0.0}], "ambiguous"),
        ([{**CONVS[0], "sparse_ratio": 1.5}], "sparse_ratio=1.5"),
        ([{**CONVS[0], "sparse_threshold": 0.1}], "sparse_threshold"),
        ([{**CONVS[0], "global_group_id": 1, "sparse_ratio": 0.5}], "global_group_id"),
        ([{**CONVS[0], "granularity": "in_channel"}], "granularity"),
        ([{**CONVS[0], "target_names": ["_output_"]}], "target_names"),
        ([{**CONVS[0], "budget": 1}], "NNI refuses the config_list"),
        ({"op_types": ["Conv2d"]}, "must be a list of dicts"),
    ],
)
def test_bad_config_list(config_list, message):
    model, x = network()
    before = Snapshot(model.train())
    with pytest.raises(ValueError, match=message):
        ResConvPruner(model, config_list, budget=HALF, example_inputs=x)
    before.check()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": Budget(macs=0.01)}, BudgetError, "cannot be reached by removing layers"),
        ({"budget": 0.5}, TypeError, "must be a Budget"),
        ({"reg": -1}, ValueError, "reg=-1"),
        ({"importance": "l1"}, ValueError, "importance='l1'"),
        ({"a": -1}, ValueError, "a=-1"),
        ({"no_option": 1}, TypeError, "no_option"),
        ({"evaluator": "SGD"}, TypeError, "evaluator is a str"),
    ],
)
def test_bad_options_leave_the_model_alone(options, error, message):
    model, x = network()
    before = Snapshot(model.train())
    evaluator = evaluator_of(model)
    state = dict(vars(evaluator))
    options = {"budget": HALF, "evaluator": evaluator, **options}
    with pytest.raises(error, match=message):
        ResConvPruner(model, CONVS, example_inputs=x, **options)
    before.check()
    assert vars(evaluator) == state
    ResConvPruner(model, CONVS, evaluator, budget=HALF, example_inputs=x).compress(max_steps=1)  # still good


def test_a_wrapped_model_is_refused():
    pruner, x = pruner_of()
    before = Snapshot(pruner.bound_model)
    with pytest.raises(RuntimeError, match="still wrapped by NNI"):
        ResConvPruner(pruner.bound_model, CONVS, budget=HALF, example_inputs=x)
    before.check()
    assert before.model is pruner.bound_model
    pruner.unwrap_model()
    ResConvPruner(pruner.bound_model, CONVS, budget=HALF, example_inputs=x)  # converted, but free


# -- without training


@pytest.mark.parametrize("budget", [HALF, Budget(params=0.7), Budget(macs=0.7, params=0.6), Budget(macs=0.5)])
@pytest.mark.parametrize("importance", ["scale", "output", lambda _, layers: dict.fromkeys(layers, 1.0)])
def test_budget_is_met_and_masked_is_removed(budget, importance):
    pruner, x = pruner_of(budget=budget, importance=importance, loader=LOADER)
    dense = Cost(*count_ops(network()[0], x))
    with pytest.warns(UserWarning, match="nothing was trained"):
        model, masks = pruner.compress()
    assert model is pruner.bound_model and wrappers(model)
    assert pruner.plan.dense == dense and pruner.plan.limits == budget.limits(dense)
    assert [n for n, m in masks.items() if not m["s"].item()] == pruner.plan.removed
    assert 0 < len(pruner.plan.removed) < len(LAYERS)
    assert_sped_up(pruner, masks, x)


def test_measured_latency():
    pruner, x = pruner_of(
        budget=Budget(latency=0.999), min_run_time=0.01, importance=lambda _, n: dict.fromkeys(n, 1.0)
    )
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
    assert pruner.plan.latency_ms.measured <= pruner.plan.latency_ms.limit
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the masks remove no layer")  # fusing may be enough
        assert_sped_up(pruner, masks, x)


def test_every_subset_of_layers():
    pruner, x = pruner_of(importance=lambda _, layers: dict.fromkeys(layers, 1.0))
    model = pruner.bound_model
    for bits in range(1, 2 ** len(LAYERS)):
        masks = {n: {"s": torch.tensor([float(not bits >> i & 1)])} for i, n in enumerate(LAYERS)}
        pruner.update_masks(masks)
        masked = output(model, x)
        pruner.unwrap_model()
        twin = speedup(copy.deepcopy(model), x, masks)
        pruner.wrap_model()
        assert relative_error(masked, output(twin, x)) <= 1e-5
        assert not resconv_layers(twin)


def test_a_layer_with_a_zero_is_the_identity():
    model, x = network()
    pruner = ResConvPruner(model, CONVS, budget=HALF, example_inputs=x)
    with pytest.warns(UserWarning, match="nothing was trained"), pytest.warns(UserWarning, match="has a=0: masked"):
        _, masks = pruner.compress()
    assert all(model.get_submodule(n).a.item() == float(n in pruner.plan.removed) for n in LAYERS)
    pruner._planner.budget = Budget(macs=1.0)
    with pytest.warns(UserWarning, match="already meets the budget"):
        pruner.compress()  # everything is to stay
    assert all(model.get_submodule(n).a.item() == 0 for n in LAYERS)
    pruner._planner.budget = HALF
    with pytest.warns(UserWarning, match="nothing was trained"), pytest.warns(UserWarning, match="has a=0: masked"):
        assert_same_masks(masks, pruner.compress()[1])
    assert_sped_up(pruner, masks, x)


def test_batch_norm_without_weights_and_none_at_all():
    torch.manual_seed(0)
    bare = [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)]
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *bare, nn.ReLU(), head(6)), torch.randn(2, 3, 8, 8)
    randomise = model.train()(torch.randn(16, 3, 8, 8))  # running statistics that are not 0 and 1
    assert randomise.shape[0] == 16
    pruner = ResConvPruner(model.eval(), CONVS, budget=Budget(macs=0.21), example_inputs=x, a=0.5)
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
    assert pruner.plan.removed == ["2", "4"]
    assert_sped_up(pruner, masks, x)


def test_masks_survive_a_safe_file_and_a_second_compress():
    pruner, x = pruner_of()
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
        assert_same_masks(masks, pruner.compress()[1])
    file = io.BytesIO()
    torch.save(masks, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same_masks(masks, loaded)
    assert_sped_up(pruner, loaded, x)


def test_the_result_survives_a_safe_file(tmp_path):
    pruner, x = pruner_of()
    with pytest.warns(UserWarning):
        _, masks = pruner.compress()
    assert_sped_up(pruner, masks, x)
    save_pruned(pruner.bound_model, tmp_path / "small.pt")
    loaded = load_pruned(lambda: network(seed=1)[0], tmp_path / "small.pt")
    assert torch.equal(output(loaded.eval(), x), output(pruner.bound_model, x))


def test_one_evaluator_serves_one_pruner_after_the_other():
    pruner, x = pruner_of(train=True, budget=Budget(macs=0.8))
    pruner.compress(max_steps=2)
    pruner.unwrap_model()
    factor = pruner.bound_model.get_submodule("1.0").s.item()
    again = ResConvPruner(pruner.bound_model, CONVS, pruner.evaluator, budget=HALF, example_inputs=x)
    assert scale(again, "1.0").item() == factor
    _, masks = again.compress(max_steps=2)
    assert scale(again, "1.0").item() != factor
    assert_sped_up(again, masks, x)


def test_unwrapping_leaves_the_converted_network():
    pruner, x = pruner_of()
    converted = convert_to_resconv(network()[0], x, a=0.5)
    with pytest.warns(UserWarning):
        pruner.compress()
    assert not torch.equal(output(pruner.bound_model, x), output(converted, x))
    pruner.unwrap_model()
    assert torch.equal(output(pruner.bound_model, x), output(converted, x))
    state, other = pruner.bound_model.state_dict(), converted.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())
    assert all(isinstance(p, nn.Parameter) for p in pruner.bound_model.parameters())


def test_modes_and_flags_stay():
    model, x = network()
    model.train()[1].eval()
    model[2].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in convert_to_resconv(copy.deepcopy(model), x).named_parameters()}
    pruner = ResConvPruner(model, CONVS, evaluator_of(model), budget=HALF, example_inputs=x, a=0.5)
    pruner.compress(max_steps=2)
    assert model.training and model[2][1].training and not model[1][0].training and not model[1][0].conv.training
    pruner.unwrap_model()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    masks = {"1.0": {"s": torch.zeros(1)}}
    speedup(model, x, masks)
    assert model.training and model[3].body[0][0].training and not hooks(model)
