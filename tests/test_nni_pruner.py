import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

nni = pytest.importorskip("nni")

from nni.compression.pruning import L1NormPruner  # noqa: E402
from nni.compression.quantization import QATQuantizer  # noqa: E402

from networks import NUM_CLASSES, class_loader  # noqa: E402
from nni_contract import (  # noqa: E402
    HALF,
    NNIPrunerContract,
    TrainingLog,
    assert_masked_is_removed,
    assert_same_masks,
    assert_unchanged,
    case,
    make_evaluator,
    output,
    removed_filters,
    snapshot,
    threads,
    wrappers,
)
from nni_plugins import CATROPruner, ImportancePruner, OBSPruner, speedup  # noqa: E402
from tp_importance import Budget, BudgetError, CATROImportance, Cost, Latency, LatencyTable, count_ops  # noqa: E402

CONVS = {"op_types": ["Conv2d"], "sparse_ratio": 0.5}


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


class TestCATROPruner(NNIPrunerContract):
    pruner_class = CATROPruner


class TestOBSPruner(NNIPrunerContract):
    pruner_class = OBSPruner


class TestChannelSpace(NNIPrunerContract):
    """Any importance does: the literal form of CATRO, through the general class."""

    def make_pruner(self, model, config_list, evaluator=None, *, loader, budget=None, **options):
        importance = CATROImportance(space="channel")
        return ImportancePruner(
            model, config_list, evaluator, loader=loader, budget=budget, importance=importance, **options
        )

    test_generated_metrics_and_masks_keep_their_dimensions = None  # its best sets are not nested: no metric ranks them
    # what does not hang on the importance is not tried twice
    test_half_precision = test_batches_of_two_inputs_and_of_keywords = test_explicit_example_inputs = None
    test_schedule = test_fused_with_a_distiller = test_fused_and_scheduled = test_fused_with_a_quantizer = None


def catro(name="plain", config_list=(CONVS,), **options):
    this = case(name)
    return CATROPruner(copy.deepcopy(this.model), list(config_list), **{"loader": this.loader, **options})


def widths(name="plain", config_list=(CONVS,), **options):
    """Widths after masking, read off the masks and off the plan."""
    pruner = catro(name, config_list, **options)
    _, masks = pruner.compress()
    for group in case(name).groups:
        if group.name in masks and group.name in pruner.plan.widths:
            assert group.width - removed_filters(masks, group.name) == pruner.plan.widths[group.name]
    return pruner.plan.widths


# -- config_list: what is selected, and how much of it goes


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.7, 0.99])
def test_ratio_is_rounded_down_per_group(ratio):
    kept = widths("residual", [{"op_types": ["Conv2d"], "sparse_ratio": ratio}])
    assert kept == {g.name: max(g.width - int(g.width * ratio), 1) for g in case("residual").groups}


def test_first_config_wins():
    first = {"op_names": ["1.0"], "sparse_ratio": 0.25}
    assert widths(config_list=[first, CONVS]) == {"0.0": 4, "1.0": 9, "2.0": 8}
    assert widths(config_list=[CONVS, first]) == {"0.0": 4, "1.0": 6, "2.0": 8}


@pytest.mark.parametrize(
    "config",
    [
        {"op_names": ["1.0", "2.0"], "sparse_ratio": 0.5},
        {"op_names_re": [r"[12]\.0"], "sparse_ratio": 0.5},
        {**CONVS, "exclude_op_names": ["0.0"]},
        {**CONVS, "exclude_op_names_re": ["0.*"]},
        {
            "op_types": ["Conv2d", "Linear"],
            "exclude_op_types": ["Linear"],
            "op_names_re": ["[12].*"],
            "sparse_ratio": 0.5,
        },
        {"op_names": ["1.0", "2.0"], "target_settings": {"weight": {"sparse_ratio": 0.5}}},
    ],
)
def test_selection(config):
    pruner = catro(config_list=[config])
    _, masks = pruner.compress()
    assert pruner.plan.widths == {"1.0": 6, "2.0": 8}
    assert masks.keys() == {"1.0", "1.1", "2.0", "2.1"}
    assert not pruner.left_out
    assert_masked_is_removed(pruner, masks, case("plain"))


@pytest.mark.parametrize("options", [{}, {"budget": Budget(macs=0.7)}])
def test_max_sparse_ratio(options):
    capped = {"op_names": ["1.0"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.25}
    kept = widths(config_list=[capped, CONVS], **options)
    assert kept["1.0"] >= 9 and kept["2.0"] < 16
    if not options:
        assert kept == {"0.0": 4, "1.0": 9, "2.0": 8}


@pytest.mark.parametrize(
    "config_list, kept",
    [
        ([{"op_types": ["Conv2d"], "sparsity": 0.5}], {"0.0": 4, "1.0": 6, "2.0": 8}),
        ([{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["0.0"], "exclude": True}], {"1.0": 6, "2.0": 8}),
        (
            [{"op_types": ["Conv2d"], "sparsity_per_layer": 0.5, "max_sparsity_per_layer": 0.25}],
            {"0.0": 6, "1.0": 9, "2.0": 12},
        ),
    ],
)
def test_legacy_config(config_list, kept):
    assert widths(config_list=config_list) == kept


def test_batch_norms_follow_even_if_a_legacy_config_excludes_them():
    pruner = catro(
        config_list=[{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_types": ["BatchNorm2d"], "exclude": True}]
    )
    _, masks = pruner.compress()
    assert_masked_is_removed(pruner, masks, case("plain"))


@pytest.mark.parametrize("name", ["plain", "no_bn"])
def test_bias_goes_with_its_filter_even_if_only_weights_are_targets(name):
    pruner = catro(name, [{**CONVS, "target_names": ["weight"]}])
    _, masks = pruner.compress()
    assert_masked_is_removed(pruner, masks, case(name))


def test_selected_batch_norms_follow_their_convolution():
    pruner = catro(config_list=[{"op_types": ["BatchNorm2d", "Conv2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    assert_masked_is_removed(pruner, masks, case("plain"))


@pytest.mark.parametrize("first", ["0.0", "1.body.1.0"])
def test_partly_selected_group_is_left_alone_and_listed(first):
    other = {"0.0": "1.body.1.0", "1.body.1.0": "0.0"}[first]
    with pytest.warns(UserWarning, match=f"left alone.*shares its channels with {other}, which config_list does not"):
        pruner = catro("residual", [{**CONVS, "exclude_op_names": [other]}])
    assert pruner.left_out.keys() == {"0.0"} and other in pruner.left_out["0.0"]
    _, masks = pruner.compress()
    assert "0.0" not in pruner.plan.widths
    assert bool((masks[first]["weight"] == 1).all()) and other not in masks
    assert_masked_is_removed(pruner, masks, case("residual"))


def test_depthwise_convolution_left_out_is_named():
    with pytest.raises(ValueError, match=r"selects no coupled group.*1\.body\.3.*does not select"):
        catro("depthwise", [{"op_names_re": [r".*body\.0$"], "sparse_ratio": 0.5}])


def test_reason_that_speaks_of_the_output_is_listed_too(monkeypatch):
    reason = "removal is not masking: output of the network: differs by 1 on a scale of 2"
    monkeypatch.setattr("tp_importance.verify.verify_groups", lambda *_: {"0.0": reason})
    with pytest.warns(UserWarning, match="left alone, though selected.*output of the network"):
        assert catro().left_out == {"0.0": reason}


def test_reason_is_not_hidden_by_an_unselected_layer():
    """The group holds a LayerNorm and an unselected layer: selecting that one would not help."""
    with pytest.warns(UserWarning, match="left alone"):
        pruner = catro(
            "transformer_mlp", [{"op_types": ["Linear"], "exclude_op_names": ["blocks.0.mlp.3"], "sparse_ratio": 0.5}]
        )
    assert "LayerNorm" in pruner.left_out["embed"]


def test_outputs_of_the_network_stay_without_a_word(recwarn):
    pruner = catro(config_list=[{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}])
    assert not pruner.left_out and not recwarn.list
    assert pruner.compress()[1].keys() >= {"0.0", "1.0", "2.0"}


# -- config_list: what is refused

SETTING = "in config_list is not supported: "


@pytest.mark.parametrize(
    "config_list, message",
    [
        ([{**CONVS, "sparse_ratio": 1.0}], r"sparse_ratio=1.0 must be a float in \[0, 1\)"),
        ([{**CONVS, "sparse_ratio": 0}], "sparse_ratio=0 must be a float"),
        ([{**CONVS, "sparse_ratio": True}], "sparse_ratio=True must be a float"),
        ([{**CONVS, "sparse_ratio": -0.1}], "sparse_ratio=-0.1 must be a float"),
        ([{**CONVS, "sparse_ratio": float("nan")}], "sparse_ratio=nan must be a float"),
        ([{**CONVS, "sparse_ratio": "0.5"}], "sparse_ratio='0.5' must be a float"),
        ([{**CONVS, "sparse_ratios": 0.5}], "NNI refuses the config_list: Wrong key 'sparse_ratios'"),
        ([{**CONVS, "max_sparse_ratio": 2}], "NNI refuses the config_list: .*max_sparse_ratio"),
        ([{**CONVS, "target_settings": None}], "NNI refuses the config_list: .*target_settings"),
        ([{**CONVS, "target_settings": {"weight": None}}], "NNI refuses the config_list: .*target_settings"),
        ([{"sparse_ratio": 0.5}], "NNI refuses the config_list: Missing key"),
        ([{"op_types": "Conv2d", "sparse_ratio": 0.5}], "NNI refuses the config_list: .*op_types"),
        ([{"op_types": ["Conv3d"], "sparse_ratio": 0.5}], "Conv3d.* selects no module of Sequential"),
        ([CONVS, {"op_names": ["nowhere"], "sparse_ratio": 0.5}], r"op_names names \['nowhere'\]"),
        (
            [{**CONVS, "target_settings": {"weight": {"sparse_ratio": 0.25}}}],
            "(?s)NNI refuses the config_list: .*multiple keys",
        ),
        ([], "no convolution or linear layer a sparse_ratio"),
        ([{"op_types": ["Conv2d"]}], "no convolution or linear layer a sparse_ratio"),
        ([{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], "no convolution or linear layer a sparse_ratio"),
        ([{"op_types": ["Linear"], "sparse_ratio": 0.5}], "selects no coupled group that can be pruned"),
        (CONVS, "config_list must be a list of dicts"),
        ("Conv2d", "config_list must be a list of dicts"),
        (None, "config_list must be a list of dicts"),
        ([{"op_types": ["Conv2d"], "sparse_threshold": 0.1}], f"sparse_threshold=0.1 {SETTING}give sparse_ratio"),
        ([{**CONVS, "global_group_id": "a"}], f"global_group_id='a' {SETTING}.*Budget"),
        ([{**CONVS, "target_settings": {"weight": {"global_group_id": 1}}}], f"global_group_id=1 {SETTING}"),
        ([{"op_types": ["Conv2d"], "total_sparsity": 0.5}], f"{SETTING}total_sparsity is what budget= does"),
        ([{**CONVS, "min_sparse_ratio": 0.1}], f"min_sparse_ratio=0.1 {SETTING}leave it out"),
        ([{**CONVS, "granularity": "per_channel"}], "granularity='per_channel' is not supported: whole filters"),
        ([{**CONVS, "granularity": [1, 1]}], r"granularity=\[1, 1\] is not supported: whole filters"),
        ([{**CONVS, "target_names": ["bias"]}], r"target_names=\['bias'\] is not supported"),
        ([{**CONVS, "target_names": ["weight", "_output_"]}], "target_names=.* is not supported"),
    ],
    ids=lambda value: None if not isinstance(value, str) else "",
)
def test_refused_config(config_list, message):
    model = copy.deepcopy(case("plain").model).train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        CATROPruner(model, config_list, loader=case("plain").loader)
    assert_unchanged(before, model)


def test_module_types_unknown_to_nni_are_refused():
    class Conv(nn.Conv2d):
        pass

    model = nn.Sequential(Conv(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 144, NUM_CLASSES))
    before = snapshot(model)
    for config in ({"op_names": ["0", "2"], "sparse_ratio": 0.5}, {"op_names_re": [".*"], "sparse_ratio": 0.5}):
        with pytest.raises(ValueError, match=r"NNI refuses.*is not registered"):
            CATROPruner(model, [config], loader=class_loader())
        assert_unchanged(before, model)


def test_error_after_wrapping_unwraps(monkeypatch):
    def fail(self):
        assert wrappers(self.bound_model)
        raise RuntimeError("too late")

    monkeypatch.setattr(CATROPruner, "_register_scalers", fail)
    model = copy.deepcopy(case("plain").model)
    with pytest.raises(RuntimeError, match="too late"):
        CATROPruner(model, [CONVS], loader=case("plain").loader)
    assert not wrappers(model)
    assert torch.equal(output(model, case("plain").x), output(case("plain").model, case("plain").x))


@pytest.mark.parametrize("config", [CONVS, {"op_names": ["a", "again", "d"], "sparse_ratio": 0.5}])
def test_module_with_two_names(config):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.d = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 3)
            self.again, self.fc = self.b, nn.Linear(12, NUM_CLASSES)

        def forward(self, x):
            x = F.relu(self.again(F.relu(self.b(F.relu(self.a(x))))))
            return self.fc(F.relu(self.d(x)).mean((2, 3)))

    pruner = CATROPruner(Recurrent(), [config], loader=class_loader())
    _, masks = pruner.compress()
    assert pruner.plan.widths == {"a": 4, "d": 6}
    assert masks.keys() == {"a", "b", "d"}
    assert torch.equal(masks["a"]["bias"], masks["b"]["bias"])  # it reads what it writes
    pruner.unwrap_model()


def test_different_ratios_of_coupled_layers_are_refused():
    with pytest.raises(ValueError, match=r"inside one coupled group: \{'0\.0': 0\.25, '1\.body\.1\.0': 0\.5\}"):
        catro("residual", [{"op_names": ["0.0"], "sparse_ratio": 0.25}, CONVS])


def test_whole_filters_by_another_name_and_dependencies_are_accepted():
    config = {**CONVS, "granularity": "out_channel", "dependency_group_id": "a"}
    assert widths("residual", [config]) == widths("residual", [CONVS])


def test_nothing_that_can_be_pruned():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, NUM_CLASSES)

        def forward(self, x):
            return self.fc(F.relu(self.norm(self.a(x))).mean((2, 3)))

    model = Normalised()
    before = snapshot(model)
    with pytest.raises(ValueError, match="GroupNorm"):
        CATROPruner(model, [CONVS], loader=class_loader())
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    "ratio, options, message",
    [
        (0.01, {}, "nothing is masked: a sparse_ratio of 0.01 removes no whole channel"),
        (0.5, {"budget": Budget(macs=1.0)}, "nothing is masked: the network already meets the budget"),
    ],
)
def test_masking_nothing_is_no_silent_success(ratio, options, message):
    pruner = catro(config_list=[{**CONVS, "sparse_ratio": ratio}], **options)
    with pytest.warns(UserWarning, match=message):
        _, masks = pruner.compress()
    assert pruner.plan.is_noop
    pruner.unwrap_model()
    with pytest.raises(ValueError, match="remove nothing"):
        speedup(pruner.bound_model, case("plain").x, masks)


# -- budgets


def test_with_a_budget_the_ratio_may_be_left_out():
    kept = widths("residual", budget=Budget(macs=0.5))
    assert widths("residual", [{"op_types": ["Conv2d"]}], budget=Budget(macs=0.5)) == kept
    with pytest.raises(ValueError, match=r"sparse_ratio=0\.0 together with a budget"):
        catro(config_list=[{**CONVS, "sparse_ratio": 0.0}], budget=Budget(macs=0.5))


def test_unreachable_budget_fails_before_anything_is_trained():
    model = copy.deepcopy(case("plain").model)
    before = snapshot(model)
    with pytest.raises(BudgetError, match=r"22124 macs cannot be reached.* 134832 macs are left"):
        CATROPruner(model, [{**CONVS, "max_sparse_ratio": 0.25}], loader=case("plain").loader, budget=Budget(macs=0.1))
    assert_unchanged(before, model)
    assert widths(config_list=[{**CONVS, "max_sparse_ratio": 0.25}], budget=Budget(macs=134832)) == {
        "0.0": 6,
        "1.0": 9,
        "2.0": 12,
    }


def test_budget_of_a_partial_selection_counts_the_whole_network():
    pruner = catro(config_list=[{"op_names": ["1.0"]}], budget=Budget(macs=0.8))
    pruner.compress()
    assert pruner.plan.dense == case("plain").cost.dense
    assert pruner.plan.cost.macs <= 0.8 * pruner.plan.dense.macs
    assert pruner.plan.widths.keys() == {"1.0"}


@pytest.mark.parametrize("budget", [0.5, {"macs": 0.5}])
def test_budget_must_be_a_budget(budget):
    with pytest.raises(TypeError, match="budget must be a Budget"):
        catro(budget=budget)


# -- options of the method and of the planner


@pytest.mark.parametrize("options", [{"seed": 3, "positions": 2}, {"space": "channel"}, {"class_weight": 1.0}])
def test_same_seed_same_masks(options):
    assert_same_masks(catro(**options).compress()[1], catro(**options).compress()[1])


def test_classes_select_a_subtask():
    x, y = map(torch.cat, zip(*case("plain").loader, strict=True))
    mine = (y == 0) | (y == 2)
    _, masks = catro(classes=[0, 2], positions=None).compress()
    _, filtered = catro(loader=[(x[mine], y[mine])], positions=None).compress()
    _, other = catro(positions=None).compress()
    assert_same_masks(masks, filtered)
    assert any(not torch.equal(masks[n]["weight"], other[n]["weight"]) for n in masks)


def test_options_of_the_planner(capsys):
    assert widths(config_list=[{**CONVS, "sparse_ratio": 0.4}], round_to=4) == {"0.0": 8, "1.0": 8, "2.0": 12}
    assert widths(max_pruning_ratio=0.25) == {"0.0": 6, "1.0": 9, "2.0": 12}
    capped = [{**CONVS, "max_sparse_ratio": 0.75}]
    assert widths(config_list=capped, max_pruning_ratio={"1.0": 0.25}) == {"0.0": 4, "1.0": 9, "2.0": 8}
    assert "collecting" not in capsys.readouterr().err
    even = widths(allocator="uniform", budget=Budget(macs=0.5), progress=True)
    assert max(even[g.name] / g.width for g in case("plain").groups) < 0.9
    assert "collecting" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["pruning_ratio", "ignored_layers"])
def test_unknown_option(option):
    with pytest.raises(TypeError, match=option):
        catro(**{option: 0.5})


@pytest.mark.parametrize("options", [{"round_to": 0}, {"max_pruning_ratio": 2.0}, {"space": "pixel"}])
def test_bad_option(options):
    model = copy.deepcopy(case("plain").model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        CATROPruner(model, [CONVS], loader=case("plain").loader, **options)
    assert_unchanged(before, model)


# -- data


def test_unlabelled_batches_and_label_fn():
    batches = [x for x, _ in case("plain").loader]
    labels = {id(x): y for x, y in case("plain").loader}
    with pytest.raises(ValueError, match="gives no labels"):
        catro(loader=batches).compress()
    _, masks = catro(loader=batches, label_fn=lambda x: labels[id(x)]).compress()
    assert_same_masks(masks, catro().compress()[1])


def test_batches_of_another_form():
    batches = [("file name", {"image": x}, y) for x, y in case("plain").loader]
    with pytest.raises(TypeError, match="forward_fn"):
        catro(loader=batches)
    forms = {"forward_fn": lambda model, batch: model(batch[1]["image"]), "label_fn": lambda batch: batch[2]}
    _, masks = catro(loader=batches, **forms).compress()
    assert_same_masks(masks, catro().compress()[1])


def test_tensors_without_a_batch_dimension_are_passed_on():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(case("plain").model)

        def forward(self, x, scale):
            return self.net(x * scale)

    loader = [{"x": x, "scale": torch.tensor(2.0), "labels": y} for x, y in case("plain").loader]
    pruner = CATROPruner(Scaled(), [CONVS], loader=loader)
    pruner.compress()
    assert pruner.plan.widths == {"net.0.0": 4, "net.1.0": 6, "net.2.0": 8}


@pytest.mark.parametrize(
    "loader, error, message",
    [([], ValueError, "no batch.*pass example_inputs="), (torch.zeros(2, 3, 16, 16), TypeError, "single Tensor")],
)
def test_bad_loader(loader, error, message):
    with pytest.raises(error, match=message):
        catro(loader=loader)


def test_error_of_the_loader_passes_unchanged():
    class Broken:
        error = OSError("disk on fire")

        def __iter__(self):
            raise self.error

    model = copy.deepcopy(case("plain").model)
    before = snapshot(model)
    with pytest.raises(OSError) as caught:
        CATROPruner(model, [CONVS], loader=Broken())
    assert caught.value is Broken.error
    assert_unchanged(before, model)


def test_every_mask_generation_looks_at_the_data_once():
    class Counted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(case("plain").loader)

    loader = Counted()
    pruner = catro(loader=loader, example_inputs=case("plain").x)
    ones = pruner.get_masks()
    assert loader.passes == 0
    _, masks = pruner.compress()
    assert loader.passes == 1
    pruner.update_masks(ones)
    with torch.no_grad():  # as if training had given up the channels that were kept
        pruner._module_wrappers["2.0"].weight.mul_(torch.where(masks["2.0"]["weight"] == 1, 1e-3, 1.0))
    _, again = pruner.compress()
    assert loader.passes == 2
    assert torch.equal(again["2.0"]["weight"], 1 - masks["2.0"]["weight"])


# -- other compressors


def test_wrapped_model_is_refused():
    pruner = catro()
    pruner.compress()
    wrapped = wrappers(pruner.bound_model)
    with pytest.raises(RuntimeError, match=r"still wrapped by NNI, at '0\.0\._nni_wrapper'; call unwrap_model\(\)"):
        CATROPruner(pruner.bound_model, [CONVS], loader=case("plain").loader)
    assert wrappers(pruner.bound_model) == wrapped
    pruner.unwrap_model()
    again = CATROPruner(pruner.bound_model, [CONVS], loader=case("plain").loader)
    assert_same_masks(again.compress()[1], pruner.get_masks())


def test_two_pruners_cannot_share_a_layer():
    model = copy.deepcopy(case("plain").model)
    other = L1NormPruner(model, [CONVS])
    wrapped = wrappers(model)
    with pytest.raises(ValueError, match=r"0\.0, 1\.0, 2\.0 already have masks of the other compressor"):
        CATROPruner.from_compressor(other, [CONVS], loader=case("plain").loader)
    assert wrappers(model) == wrapped
    assert other.compress()[1].keys() == {"0.0", "1.0", "2.0"}  # as if nothing had happened
    other.unwrap_model()


def test_two_pruners_share_a_network():
    log, this = TrainingLog(), case("plain")
    model = copy.deepcopy(this.model)
    other = L1NormPruner(model, [{"op_names": ["0.0"], "sparse_ratio": 0.25}], make_evaluator(model, this.loader, log))
    other.interval_steps = 1
    log.pruner = pruner = CATROPruner.from_compressor(
        other, [{"op_names": ["1.0", "2.0"], "sparse_ratio": 0.5}], loader=this.loader
    )
    _, masks = pruner.compress(max_steps=2, max_epochs=None)
    assert [removed_filters(masks, name) for name in ("0.0", "1.0", "2.0")] == [2, 6, 8]


def test_pruner_comes_first_in_a_fusion():
    log, this = TrainingLog(), case("plain")
    model = copy.deepcopy(this.model)
    log.pruner = pruner = CATROPruner(model, [CONVS], make_evaluator(model, this.loader, log), loader=this.loader)
    pruner.interval_steps = 2
    config = [{"op_types": ["Conv2d"], "target_names": ["weight"], "quant_dtype": "int8"}]
    quantizer = QATQuantizer.from_compressor(pruner, config)
    quantizer.compress(max_steps=4, max_epochs=None)
    assert log.masked == [0, 18, 18, 18]
    assert pruner.plan.widths == {"0.0": 4, "1.0": 6, "2.0": 8}


def test_fusion_takes_the_evaluator_given_and_needs_a_duration():
    log, this = TrainingLog(), case("plain")
    model = copy.deepcopy(this.model)
    other = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.25}])
    evaluator = make_evaluator(model, this.loader, log)
    pruner = CATROPruner.from_compressor(other, HALF, evaluator=evaluator, loader=this.loader)
    assert pruner.evaluator is evaluator
    with pytest.raises(AssertionError):  # NNI's own
        pruner.compress()
    pruner.compress(max_steps=1, max_epochs=None)
    assert len(log.losses) == 1


def test_without_an_evaluator_one_shot():
    pruner = catro()
    assert pruner.evaluator is None
    with pytest.raises(AssertionError, match="training aware"):  # NNI's own
        pruner.compress(max_steps=3)
    _, masks = pruner.compress()
    masked = output(pruner.bound_model, case("plain").x)
    pruner.unwrap_model()
    small = speedup(pruner.bound_model, case("plain").x, masks)
    assert torch.allclose(masked, output(small, case("plain").x), atol=1e-6)
    assert Cost(*count_ops(small, case("plain").x)) == pruner.plan.cost


# -- without NNI


def test_packages_without_a_working_nni(tmp_path):
    package = tmp_path / "nni"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    program = """
        import sys
        import tp_importance
        assert "nni" not in sys.modules

        def reason():
            try:
                import nni_plugins
            except ImportError as error:
                assert type(error).__name__ == "NNIUnavailableError", type(error)
                return str(error)
            raise AssertionError("imported")

        broken = reason()
        assert 'pip install "tp-importance[nni]"' in broken, broken
        assert "RuntimeError: operator torchvision::nms does not exist" in broken, broken
        sys.modules["nni"] = None  # what Python says if there is none
        missing = reason()
        assert 'pip install "tp-importance[nni]"' in missing and "ModuleNotFoundError" in missing, missing
    """
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_latency_budget_and_its_schedule():
    """By a clock that counts weights: masks follow the predicted latency, at once or on the way."""

    def measure(model, x, **_):
        alone = not list(model.children())
        return Latency((not alone) + sum(p.numel() for p in model.parameters()) / 1e3, 0.0, 1, 1, "fake", 1)

    options = {"latency_table": LatencyTable(measure=measure)}
    pruner = catro("plain", [{"op_types": ["Conv2d"]}], budget=Budget(latency=0.6), **options)
    pruner.compress()
    found = pruner.plan.latency_ms
    assert 0 < found["predicted"] <= found["limit"] == 0.6 * found["dense"]
    cost = pruner._planner.cost_model
    dense = cost.timed.predict(cost.full)
    assert pruner._budget_at(0.5).latency_ms == pytest.approx(dense - 0.5 * (dense - found["limit"]))
    with pytest.raises(BudgetError, match=r"latency_ms are predicted.*select more layers"):
        catro("plain", [{"op_names": ["1.0"]}], budget=Budget(latency=0.05), **options)
