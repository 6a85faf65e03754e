"""Importances of Torch-Pruning score our groups as they score its own."""

import copy
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.group_cases import zoo
from tp_importance import prunable_groups
from tp_importance.allocation.curves import host_scores
from tp_importance.graph.host_group import score_group
from tp_importance.testing.networks import MISTRACED, TOPOLOGIES, make_network

IMPORTANCES = {
    "magnitude": tp.importance.MagnitudeImportance,
    "l1 of the first layer": partial(tp.importance.MagnitudeImportance, p=1, group_reduction="first", normalizer=None),
    "largest": partial(tp.importance.MagnitudeImportance, group_reduction="max", bias=True),
    "product": partial(tp.importance.MagnitudeImportance, group_reduction="prod", normalizer="max"),
    "bn scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.TaylorImportance,
    "hessian": tp.importance.HessianImportance,
}
BEYOND_THE_HOST = {("fpgm", "grouped"): "it cannot repeat a two-dimensional importance over conv groups"}
OTHERWISE = {("l1 of the first layer", "depthwise"): "Torch-Pruning's search decides which layer is first"}


@cache
def scored(name):
    """Groups of a network with gradients, and Torch-Pruning's own graph of it; scoring changes neither."""
    model, x = make_network(name)
    model(x).square().sum().backward()
    groups = prunable_groups(model, x, verify=False)
    return groups, graph_of(groups)


def graph_of(groups):
    return tp.DependencyGraph().build_dependency(groups.trace.model, groups.trace.example_inputs)


def as_the_host(importance, groups, group, graph):
    """Score per unit by the group that Torch-Pruning's own graph gives; `None` where it gives none."""
    module = groups.trace.model.get_submodule(group.root[0])
    pruner = graph.get_pruner_of_module(module)
    whole = graph.get_pruning_group(module, pruner.prune_out_channels, range(graph.get_out_channels(module)))
    scores = importance(whole)
    if scores is None:
        return None
    scores = scores.double().numpy()
    mean = np.bincount(group.root_units, scores[group.root_channels], group.n_units) / group.unit_size
    return mean - min(mean.min(), 0.0)


@pytest.mark.parametrize("name", sorted(set(TOPOLOGIES) - MISTRACED))
@pytest.mark.parametrize("kind", IMPORTANCES)
def test_as_on_the_groups_of_the_host(kind, name):
    groups, graph = scored(name)
    compared = 0
    for group in groups:
        if (kind, name) in BEYOND_THE_HOST and group.unit_size > 1:
            continue
        expected = as_the_host(IMPORTANCES[kind](), groups, group, graph)
        if expected is None:
            continue
        found = host_scores(IMPORTANCES[kind](), groups, group)
        if (kind, name) in OTHERWISE and not np.allclose(found, expected, rtol=1e-5):
            continue
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        compared += 1
    assert compared or kind == "bn scale"


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_on_networks_of_torchvision(name):
    case = zoo(name)
    graph = graph_of(case.groups)
    for group in list(case.groups)[::7]:
        expected = as_the_host(tp.importance.MagnitudeImportance(), case.groups, group, graph)
        np.testing.assert_allclose(
            host_scores(tp.importance.MagnitudeImportance(), case.groups, group), expected, rtol=1e-5
        )


def test_obdc():
    """Torch-Pruning's own preparation of it fails on every network without attention; its scores are fine."""
    model, x = make_network("residual")
    model(x).square().sum().backward()
    groups = prunable_groups(model, x, verify=False)
    importance = tp.importance.OBDCImportance(num_classes=0)
    importance.steps = 1
    graph = graph_of(groups)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            importance.Fisher[module] = module.weight.detach().flatten(1).abs()
    for group in groups:
        expected = as_the_host(importance, groups, group, graph)
        np.testing.assert_allclose(host_scores(importance, groups, group), expected, rtol=1e-5)


def test_parametrised_layers_look_like_others():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    normed = copy.deepcopy(plain)
    nn.utils.parametrizations.weight_norm(normed[0])
    x = torch.randn(1, 3, 8, 8)
    scores = []
    for model in (plain, normed):
        groups = prunable_groups(model, x)
        scores.append(host_scores(tp.importance.MagnitudeImportance(), groups, groups["0"]))
    np.testing.assert_allclose(*scores, rtol=1e-5)


class Scaled(nn.Module):
    """Channels that a parameter without a layer scales."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(1, 8) + 0.5)

    def forward(self, x):
        return self.last(self.first(x) * self.scale)


def test_raw_parameters_are_nodes_of_their_axis():
    model = Scaled()
    groups = prunable_groups(model, torch.randn(2, 5, 6), verify=False)
    view, _, _ = score_group(groups, groups["first"])
    (item,) = (item for item in view if item.dep.target.module is model.scale)
    assert item.dep.target.type == tp.ops.OPTYPE.PARAMETER and item.dep.target.pruning_dim == 1
    assert item.dep.handler == tp.pruner.function.prune_parameter_out_channels and item.idxs == list(range(8))
    assert view._DG.get_out_channels(item.dep.target) == 8


def test_indices_ascend_so_that_sorting_unpairs_nothing():
    for name in ("flatten", "concat", "grouped", "split"):
        model, x = make_network(name)
        groups = prunable_groups(model, x, verify=False)
        for group in groups:
            view, _, _ = score_group(groups, group)
            for item in view:
                assert item.idxs == sorted(item.idxs) and len(item.idxs) == len(item.root_idxs)
                assert set(item.root_idxs) <= set(view[0].root_idxs)


def test_a_group_to_be_scored_is_not_pruned():
    model, x = make_network("plain")
    groups = prunable_groups(model, x, verify=False)
    with pytest.raises(TypeError, match="to be scored"):
        score_group(groups, groups["0.0"])[0].prune()
