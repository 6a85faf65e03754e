"""What is said of a budget that cannot be met: what keeps this very network from becoming smaller, and no more."""

from functools import partial

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import (
    Budget,
    BudgetError,
    BudgetPruner,
    CATROPruner,
    ITPruner,
    PSAPPruner,
    ResConvPruner,
    prunable_groups,
    prune,
)
from tp_importance.allocation.space import WidthSpace
from tp_importance.automl import prune_trial
from tp_importance.graph.cost import COST_FIELDS, CostModel
from tp_importance.testing import class_loader, make_network

L1 = partial(tp.importance.MagnitudeImportance, p=1)
LITTLE = Budget(macs=0.001)
REMEDIES = {
    "max_pruning_ratio": "raise max_pruning_ratio",
    "round_to": "lower round_to",
    "min_widths": "lower min_widths",
    "ignored_layers": "ignore fewer layers",
}


def message(options, budget=LITTLE):
    model, x = make_network("plain")
    if "ignored_layers" in options:
        options = {**options, "ignored_layers": [model.get_submodule(n) for n in options["ignored_layers"]]}
    with pytest.raises(BudgetError) as error:
        BudgetPruner(model, x, importance=L1(), budget=budget, **options).plan()
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, []),
        ({"max_pruning_ratio": 0.5}, ["max_pruning_ratio"]),
        ({"max_pruning_ratio": {"0.0": 0.5}}, ["max_pruning_ratio"]),
        ({"max_pruning_ratio": 0.99}, []),  # of 16 channels that leaves one, as the graph does
        ({"round_to": 4}, ["round_to"]),
        ({"round_to": 1}, []),
        ({"min_widths": {"1.0": 3}}, ["min_widths"]),
        ({"min_widths": {"1.0": 1}}, []),
        ({"ignored_layers": ["1.0"]}, ["ignored_layers"]),
        ({"ignored_layers": ["3.2"]}, []),  # it stays anyway: the network's output
        (
            {"round_to": 2, "ignored_layers": ["1.0"], "max_pruning_ratio": 0.5, "min_widths": {"0.0": 4}},
            ["max_pruning_ratio", "round_to", "min_widths", "ignored_layers"],
        ),
    ],
)
def test_only_what_binds_is_named(options, named):
    said = message(options)
    assert [name for name, remedy in REMEDIES.items() if remedy in said] == named
    assert "Give at least" in said


def test_the_largest_groups_left_out_and_why():
    """Shares by hand: multiply-accumulates of the layers at 8, 12 and 16 channels."""
    macs = {"0.0": 3 * 8 * 9 * 64, "1.0": 8 * 12 * 9 * 16, "2.0": 12 * 16 * 9 * 16, "3.2": 16 * 4}
    model, x = make_network("plain")
    found = CostModel.from_groups(prunable_groups(model, x, ignored_layers=[model[2][0], model[0][0]]))
    area = x.shape[2] * x.shape[3] / 64
    macs = {n: v * (area if n != "3.2" else 1) for n, v in macs.items()}
    total = sum(macs.values())
    assert found.dense.macs == total
    assert {e.group.name: e.shares["macs"] for e in found.left_out} == pytest.approx(
        {n: macs[n] / total for n in ("0.0", "2.0", "3.2")}
    )
    said = message({"ignored_layers": ["2.0", "0.0"]})
    assert said.endswith(
        f"ignore fewer layers. Left out: 2.0 (16 channels, {100 * macs['2.0'] / total:.1f} % of the macs: 2.0 is in "
        f"ignored_layers), 0.0 (8 channels, {100 * macs['0.0'] / total:.1f} % of the macs: 0.0 is in ignored_layers), "
        f"3.2 (4 channels, {100 * macs['3.2'] / total:.1f} % of the macs: produces the network's output)"
    )


def test_not_more_than_three_are_named():
    model, x = make_network("residual")
    with pytest.raises(BudgetError, match=r"Left out: (\S+ \(.*?\)(, )?){3} and 1 more$"):
        layers = [model[0], model[2]]
        BudgetPruner(model, x, importance=L1(), budget=Budget(params=0.001), ignored_layers=layers).plan()


def test_shares_of_a_layer_that_is_split_add_up():
    model, x = make_network("split")
    groups = prunable_groups(model, x)
    left = CostModel.from_groups(groups.exclude(dict.fromkeys(groups.names, "for the test"))).left_out
    for name in COST_FIELDS:
        assert 0 < sum(e.shares[name] for e in left) <= 1 + 1e-9


def test_options_that_bind_by_hand():
    model, x = make_network("plain")
    groups = prunable_groups(model, x).groups
    assert WidthSpace.of(groups).binding == ()
    assert WidthSpace.of(groups, round_to=32).binding == ("round_to",)  # nothing but the present widths
    later = WidthSpace.of(groups, max_pruning_ratio=0.5, initial_widths={g.name: 4 * g.width for g in groups})
    assert later.binding == ("max_pruning_ratio",)  # reached by earlier steps


# -- an absolute number that was meant as a percentage


@pytest.mark.parametrize(
    ("budget", "hint"),
    [
        (Budget(macs=50), "A limit of 50 is 50 macs in all; for 50 % of them give Budget(macs=0.5)"),
        (Budget(params=7), "A limit of 7 is 7 params in all; for 7 % of them give Budget(params=0.07)"),
        (Budget(macs=101), ""),
        (Budget(macs=0.001), ""),
    ],
)
def test_tiny_absolute_limits(budget, hint):
    said = message({}, budget)
    assert said.endswith(hint) and ("in all" in said) == bool(hint)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x, data, b: prune(m, x, data, budget=b),
        lambda m, x, data, b: prune(m, x, data, budget=b, allocator="lagrange"),
        lambda m, x, data, b: prune(m, x, data, budget=b, allocator="program"),
        lambda m, x, data, b: prune(m, x, data, budget=b, allocator="uniform"),
        lambda m, x, data, b: CATROPruner(m, x, data, budget=b).step(),
        lambda m, x, data, b: ITPruner(m, x, data, budget=b).plan(),
        lambda m, x, data, b: PSAPPruner(m, x, budget=b),
        lambda m, x, data, b: prune_trial(m, {"method": "l1"}, example_inputs=x, evaluate=lambda m: 0.0, budget=b),
    ],
)
def test_the_same_from_everybody(use):
    model, x = make_network("plain")
    with pytest.raises(BudgetError, match=r"Left out: 3\.2 \(4 channels.*A limit of 50 is 50 macs in all"):
        use(model, x, class_loader(32), Budget(macs=50))


def test_a_tiny_limit_that_a_tiny_network_meets_is_one():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    report = BudgetPruner(net, torch.randn(1, 1, 1, 1), importance=L1(), budget=Budget(macs=2)).step()
    assert report.cost.macs == 2


def test_layers_that_cannot_go():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    pruner = ResConvPruner(nn.Sequential(*layers), torch.randn(1, 3, 8, 8), budget=Budget(macs=50))
    with pytest.raises(BudgetError, match=r"Left out: 0 \(reads the network's input\).*A limit of 50 is 50 macs"):
        pruner.plan()


def test_in_the_words_of_nni():
    pytest.importorskip("nni")
    import nni_plugins

    def said(configs):
        model = make_network("plain")[0]
        with pytest.raises(BudgetError) as error:
            nni_plugins.CATROPruner(model, configs, loader=class_loader(32), budget=Budget(macs=0.001))
        return str(error.value)

    conv = {"op_types": ["Conv2d"]}
    some = said([{"op_names": ["1.0"]}])
    assert ", or select more layers. Left out: 2.0 (16 channels" in some and "config_list does not select it" in some
    every = said([{**conv, "max_sparse_ratio": 0.5}])
    assert ", or raise max_sparse_ratio. Left out: 3.2" in every and "select more" not in every
    assert not any(ours in some + every for ours in ("ignored_layers", "max_pruning_ratio", "round_to"))
