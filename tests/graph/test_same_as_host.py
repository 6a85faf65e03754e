"""Where Torch-Pruning's own graph is right, labels find the same groups."""

import pytest
import torch
import torch_pruning as tp
import torchvision.models as zoo

from tp_importance import prunable_groups
from tp_importance.graph.agreement import agrees, units_at
from tp_importance.graph.host_graph import host_graph
from tp_importance.testing import MISTRACED, TOPOLOGIES, make_network

TORCHVISION = (
    *("alexnet", "vgg11", "vgg13_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121"),
    *("squeezenet1_0", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5"),
    *("regnet_x_400mf", "regnet_y_400mf", "efficientnet_b0", "googlenet"),
)
EXPLAINED = {
    # Torch-Pruning does not run its layers in training mode, where auxiliary heads read channels
    "googlenet": {"training"},
    # two channels per group of a grouped convolution are the least, so that nothing of a group of two can go
    "resnext50_32x4d": {"minimum"},
}


def small(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    return getattr(zoo, name)(num_classes=4, **options).eval(), torch.randn(1, 3, 96 if name == "googlenet" else 64, 64)


@pytest.mark.parametrize("name", [*sorted(set(TOPOLOGIES) - MISTRACED), *TORCHVISION])
def test_groups_are_those_of_the_host(name):
    model, x = make_network(name) if name in TOPOLOGIES else small(name)
    ours = prunable_groups(model, x, verify=False)
    graph, at = host_graph(model, x), units_at(ours)
    stays = {layer: e.kind for e in ours.excluded for layer in e.layers}
    reached = set()
    for theirs in graph.get_all_groups(root_module_types=(tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)):
        root = graph._module2name[theirs[0].dep.target.module]
        units = at.get((root, "out"))
        if units is None or (units < 0).all():
            assert stays[root] in {"output", "mixed", *EXPLAINED.get(name, ())}
            continue
        assert agrees(theirs, ours, at), root
        reached.add(root)
    touched = {name for name, units in at.items() if name[1] == "out" for _ in [0] if (units >= 0).any()}
    for group in ours:
        assert any((root, "out") in touched and group.member(root, "out") is not None for root in reached)


def test_there_are_enough_networks():
    assert len(set(TOPOLOGIES) - MISTRACED) + len(TORCHVISION) >= 30
