"""Where Torch-Pruning's own graph is right, labels find the same groups."""

import pytest
import torch
import torch_pruning as tp
import torchvision.models as zoo
from torchvision.models.resnet import BasicBlock, Bottleneck

from benchmarks.zoo.torchvision_networks import narrow
from tp_importance import prunable_groups
from tp_importance.graph.agreement import agrees, units_at
from tp_importance.graph.host_graph import host_graph
from tp_importance.testing import MISTRACED, TOPOLOGIES, make_network


def resnet(block, **options):
    return lambda: zoo.ResNet(block, [1, 1, 1, 1], num_classes=4, **options)


NETWORKS = {
    "alexnet": lambda: narrow(zoo.alexnet, 4),
    "vgg11": lambda: narrow(zoo.vgg11, 4),
    "vgg11_bn": lambda: narrow(zoo.vgg11_bn, 4),
    "resnet18": lambda: zoo.resnet18(num_classes=4),
    "resnet, basic blocks": resnet(BasicBlock),
    "resnet, bottlenecks": resnet(Bottleneck),
    "wide resnet": resnet(Bottleneck, width_per_group=128),
    "resnext": resnet(Bottleneck, groups=32, width_per_group=4),
    "densenet": lambda: zoo.DenseNet(8, (2, 3, 2), 16, num_classes=4),
    "squeezenet1_0": lambda: zoo.squeezenet1_0(num_classes=4),
    "squeezenet1_1": lambda: zoo.squeezenet1_1(num_classes=4),
    "mobilenet_v2": lambda: zoo.mobilenet_v2(num_classes=4),
    "mobilenet_v3_small": lambda: zoo.mobilenet_v3_small(num_classes=4),
    "mnasnet0_5": lambda: zoo.mnasnet0_5(num_classes=4),
    "regnet_y_400mf": lambda: zoo.regnet_y_400mf(num_classes=4),
    "googlenet": lambda: zoo.googlenet(num_classes=4, init_weights=False),
}
EXPLAINED = {
    # Torch-Pruning does not run its layers in training mode, where auxiliary heads read channels
    "googlenet": {"training"},
    # two channels per group of a grouped convolution are the least, so that nothing of a group of two can go
    "resnext": {"minimum"},
}


@pytest.mark.parametrize("name", [*sorted(set(TOPOLOGIES) - MISTRACED), *NETWORKS])
def test_groups_are_those_of_the_host(name):
    torch.manual_seed(0)
    model, x = make_network(name) if name in TOPOLOGIES else (NETWORKS[name]().eval(), torch.randn(1, 3, 64, 64))
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
    for group in ours:  # none is ours alone
        assert any(group.member(root, "out") is not None for root in reached), group.name


def test_there_are_enough_networks():
    assert len(set(TOPOLOGIES) - MISTRACED) + len(NETWORKS) >= 30
