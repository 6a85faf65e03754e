"""What a pruner selects by NNI's config_list, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

nni = pytest.importorskip("nni")

from helpers.nni_catro_cases import CONVS, catro, widths  # noqa: E402
from nni_plugins import CATROPruner, speedup  # noqa: E402
from nni_plugins.testing import assert_masked_is_removed, case, output, wrappers  # noqa: E402
from tp_importance import Budget  # noqa: E402
from tp_importance.testing import (  # noqa: E402
    NUM_CLASSES,
    Snapshot,
    class_loader,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
    monkeypatch.setattr("nni_plugins.pruners.selection.verify_groups", lambda *_: {"0.0": reason})
    with pytest.warns(UserWarning, match="left alone, though selected.*output of the network"):
        assert catro().left_out == {"0.0": reason}


def test_reason_is_not_hidden_by_an_unselected_layer():
    """The group goes through a softmax and holds an unselected layer: selecting that one would not help."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.fc = nn.Linear(8, NUM_CLASSES)

        def forward(self, x):
            return self.fc(self.c((self.a(x) + self.b(x)).softmax(1)).mean((2, 3)))

    with pytest.warns(UserWarning, match="left alone"):
        pruner = CATROPruner(Mixed(), [{**CONVS, "exclude_op_names": ["b"]}], loader=class_loader())
    assert "softmax" in pruner.left_out["a"]


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
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        CATROPruner(model, config_list, loader=case("plain").loader)
    before.check()


def test_module_types_unknown_to_nni_are_refused():
    class Conv(nn.Conv2d):
        pass

    model = nn.Sequential(Conv(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 144, NUM_CLASSES))
    before = Snapshot(model)
    for config in ({"op_names": ["0", "2"], "sparse_ratio": 0.5}, {"op_names_re": [".*"], "sparse_ratio": 0.5}):
        with pytest.raises(ValueError, match=r"NNI refuses.*is not registered"):
            CATROPruner(model, [config], loader=class_loader())
        before.check()


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
            self.a, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, NUM_CLASSES)

        def forward(self, x):
            return self.fc(self.a(x).softmax(1).mean((2, 3)))

    model = Normalised()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="softmax"):
        CATROPruner(model, [CONVS], loader=class_loader())
    before.check()


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
