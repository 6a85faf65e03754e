"""What Torch-Pruning's pruners and users ask a dependency graph, answered from our groups."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance.graph.history import repeat_cuts
from tp_importance.graph.label_graph import LabelGraph
from tp_importance.testing import Snapshot, same_values
from tp_importance.testing.networks import make_network


def built(name, **options):
    model, x = make_network(name)
    return model, x, LabelGraph(**options).build_dependency(model, x)


def without(name):
    """A verifier that refuses a group."""
    return lambda groups, _: {name: "refused for the test"}


def sides(group):
    graph = group._DG
    return {
        (item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)): (item.idxs, item.root_idxs)
        for item in group
    }


@pytest.mark.parametrize("name", ["residual", "depthwise", "flatten", "dense", "transposed"])
def test_a_group_is_that_of_the_host(name):
    model, x, graph = built(name)
    theirs = tp.DependencyGraph().build_dependency(model, x)
    asked = 0
    for group in graph.groups:
        module = model.get_submodule(group.producers[0].name)
        fn = graph.get_pruner_of_module(module).prune_out_channels
        expected = theirs.get_pruning_group(module, fn, [1, 3])
        expected = {
            key: (sorted(idxs), None) for key, (idxs, _) in sides(expected).items() if key[0] in set(model.modules())
        }
        found = graph.get_pruning_group(module, fn, [3, 1])
        assert {key: (idxs, None) for key, (idxs, _) in sides(found).items()} == expected
        asked += 1
    assert asked


def test_any_member_is_a_start():
    model, _, graph = built("flatten")
    (linear,) = (m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == 12 * 16)
    group = graph.get_pruning_group(linear, tp.prune_linear_in_channels, list(range(16, 32)))
    conv = model[1][0]
    assert sides(group)[conv, True] == ([1], [16])
    with pytest.raises(ValueError, match=r"0\.\.191; \[192\]"):
        graph.get_pruning_group(linear, tp.prune_linear_in_channels, [192])


def test_channels_of_a_unit_go_together():
    model, x, graph = built("grouped")
    conv = model[1].body[1][0]
    assert conv.groups == 4
    group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, [1, 5])
    assert group[0].idxs == [1, 5, 9, 13] and group[0].dep.target.module is conv
    group.prune()
    assert conv.out_channels == 12 and conv.groups == 4 and model(x).shape == (2, 4)


def test_what_would_leave_nothing_is_named():
    model, _, graph = built("grouped")
    conv = model[1].body[1][0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"channels \[0, 1, 2\] of 1\.body\.1\.0 split units of group 1\.body\.1\.0: \[0, 4, 8, 12\]"
    ):
        graph.get_pruning_group(conv, tp.prune_conv_out_channels, [0, 1, 2])
    whole = graph.get_pruning_group(conv, tp.prune_conv_out_channels, range(16))
    assert not graph.check_pruning_group(whole)
    with pytest.raises(ValueError, match="keeps at least 2 of its 4 units"):
        whole.prune()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and graph.pruning_history() == []


def test_what_is_left_out_is_named():
    model, _, graph = built("plain")
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with pytest.raises(ValueError, match=r"no output channels that can be pruned .*produces the network's output"):
        graph.get_pruning_group(classifier, tp.prune_linear_out_channels, [0])
    with pytest.raises(ValueError, match="Conv2d is no layer of Sequential"):
        graph.get_pruning_group(nn.Conv2d(3, 3, 1), tp.prune_conv_out_channels, [0])
    assert all(
        classifier is not item.dep.target.module or not graph.is_out_channel_pruning_fn(item.dep.handler)
        for group in graph.get_all_groups()
        for item in group
    )
    assert [e.kind for e in graph.excluded] == ["output"]


def test_all_groups_may_be_narrowed_down():
    _, _, graph = built("flatten")
    roots = [group[0].dep.target.module for group in graph.get_all_groups()]
    assert [type(m).__name__ for m in roots] == ["Conv2d", "Conv2d", "Linear"]
    assert [g[0].dep.target.module for g in graph.get_all_groups(ignored_layers=[roots[0]])] == roots[1:]
    assert [g[0].dep.target.module for g in graph.get_all_groups(root_module_types=[nn.Linear])] == roots[2:]


@pytest.mark.parametrize("name", ["concat", "dense", "split", "residual"])
def test_a_group_that_is_kept_stays_in_step(name):
    """Groups are asked for first and pruned later, when others have moved their channels."""
    model, x, graph = built(name)
    groups = list(graph.get_all_groups())
    asked = [graph.get_pruning_group(g[0].dep.target.module, g[0].dep.handler, g[0].idxs[::2]) for g in groups]
    for group in reversed(asked):
        group.prune()
    other, _ = make_network(name)
    once = LabelGraph().build_dependency(other, x)
    for group in groups:
        module = other.get_submodule(graph._module2name[group[0].dep.target.module])
        once.get_pruning_group(module, group[0].dep.handler, group[0].idxs[::2]).prune()
    assert torch.equal(model(x), other(x))
    with pytest.raises(ValueError, match="was pruned meanwhile"):
        asked[0].prune()


def test_behind_a_split_there_is_one_group_as_in_the_host():
    model, _, graph = built("split")
    assert graph.groups.names[:2] == ["stem.0/0", "stem.0/1"]
    first = next(iter(graph.get_all_groups()))
    assert first[0].dep.target.module is model.stem[0] and first[0].idxs == list(range(20))


def test_channels_that_fill_no_layer():
    """The other half of the split may not be pruned: the group starts at something that stands for this half."""
    model, x, graph = built("split", verify=without("stem.0/1"))
    first = next(iter(graph.get_all_groups()))
    root = first[0].dep.target.module
    assert first[0].idxs == list(range(8)) and graph.get_out_channels(root) == 8 and root not in set(model.modules())
    with pytest.raises(ValueError, match=r"channels \[8\] of stem\.0 are in no group .*refused for the test"):
        graph.get_pruning_group(model.stem[0], tp.prune_conv_out_channels, [8])
    with pytest.raises(ValueError, match=r"are 0\.\.7; \[8\]"):
        graph.get_pruning_group(root, first[0].dep.handler, [8])
    graph.get_pruning_group(root, first[0].dep.handler, [0, 5]).prune()
    assert (model.stem[0].out_channels, model.left[0].in_channels, model.right[0].in_channels) == (18, 6, 12)
    assert graph.get_out_channels(root) == 6
    (entry,) = graph.pruning_history()
    twin, _ = make_network("split")
    tp.DependencyGraph().build_dependency(twin, x).load_pruning_history([list(entry)])
    assert entry[0] == "stem.0" and torch.equal(twin(x), model(x))


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "depthwise"])
def test_histories_go_both_ways(name):
    model, x, graph = built(name)
    for group in list(graph.get_all_groups()):
        module, fn = group[0].dep.target.module, group[0].dep.handler
        graph.get_pruning_group(module, fn, [1, 2] if name != "grouped" else [1]).prune()
    history = graph.pruning_history()
    assert history
    for make in (LabelGraph, tp.DependencyGraph):
        twin, _ = make_network(name)
        replayed = make().build_dependency(twin, x)
        replayed.load_pruning_history([list(entry) for entry in history])
        assert torch.equal(twin(x), model(x)) and replayed.pruning_history() == history


def test_other_channels_of_the_same_layer():
    model, _, graph = built("plain")
    group = graph.get_pruning_group(model[0][0], tp.prune_conv_out_channels, [0])
    group.prune(idxs=[1, 2])
    assert model[0][0].out_channels == 6 and [entry[2] for entry in graph.pruning_history()] == [[1, 2]]
    with pytest.raises(TypeError, match="cannot be replaced"):
        group[0] = group[1]


class Raw(nn.Module):
    """Parameters and a buffer of the network's own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8, 1) + 0.5)

    def forward(self, x):
        return self.last(self.first(x) * self.scale.T)


def test_raw_parameters_are_cut_and_found_again():
    torch.manual_seed(0)
    model, x = Raw(), torch.randn(4, 6)
    graph = LabelGraph().build_dependency(model, x, unwrapped_parameters=[(model.scale, 0)])
    old = model.scale
    for left in (6, 4):
        graph.get_pruning_group(model.first, tp.prune_linear_out_channels, [0, 2]).prune()
        assert model.scale.shape == (left, 1) and model(x).shape == (4, 3)
    assert graph.unwrapped_parameters == [(model.scale, 0)]
    group = graph.get_pruning_group(model.scale, tp.prune_parameter_out_channels, [1])
    assert group[0].dep.target.pruning_dim == 0
    group.prune()
    assert model.first.out_features == 3
    with pytest.raises(ValueError, match="was replaced"):
        graph.get_pruning_group(old, tp.prune_parameter_out_channels, [1])


def test_gradients_and_frozen_parameters():
    """Gradients are cut along, as the host does; what was frozen stays frozen, which the host forgets."""
    model, x, graph = built("residual")
    model[0][0].weight.requires_grad_(False)
    model(x).sum().backward()
    conv = model[1].body[0][0]
    expected = conv.weight.grad[2:].clone()
    graph.get_pruning_group(conv, tp.prune_conv_out_channels, [0, 1]).prune()
    assert torch.equal(conv.weight.grad, expected) and conv.weight.requires_grad
    assert not model[0][0].weight.requires_grad


class Scale(nn.Module):
    """A layer of the user's."""

    def __init__(self, channels):
        super().__init__()
        self.per_channel = nn.Parameter(torch.rand(channels))

    def forward(self, x):
        return x * self.per_channel.view(-1, 1, 1)


class ScalePruner(tp.pruner.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        keep = [i for i in range(len(layer.per_channel)) if i not in set(idxs)]
        layer.per_channel = self._prune_parameter_and_grad(layer.per_channel, keep, 0)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return len(layer.per_channel)

    get_in_channels = get_out_channels


def test_layers_of_the_user_are_cut_by_the_user():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), Scale(8), nn.Conv2d(8, 4, 3)), torch.randn(1, 3, 8, 8)
    graph = LabelGraph().build_dependency(model, x, customized_pruners={Scale: ScalePruner()})
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [7])
    assert any(item.dep.target.module is model[1] for item in group)
    group.prune()
    assert len(model[1].per_channel) == 7 and model(x).shape == (1, 4, 4, 4)


def test_a_pruning_function_for_one_layer_is_used():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), Scale(8), nn.Conv2d(8, 4, 3)), torch.randn(1, 3, 8, 8)
    graph = LabelGraph().build_dependency(model, x, customized_pruners={model[1]: ScalePruner()})
    graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [7]).prune()
    assert len(model[1].per_channel) == 7 and model(x).shape == (1, 4, 4, 4)


class Failing(ScalePruner):
    def prune_out_channels(self, layer, idxs):
        raise RuntimeError("not today")

    prune_in_channels = prune_out_channels


def test_a_cut_that_fails_leaves_the_network_as_it_was():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), Scale(8), nn.Conv2d(8, 4, 3)), torch.randn(1, 3, 8, 8)
    graph = LabelGraph(verify=False).build_dependency(model, x, customized_pruners={Scale: Failing()})
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="not today"):
        graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [7]).prune()
    before.check()
    assert graph.groups["0"].width == 8 and not graph.direct_history and not graph.pruning_history()


def test_a_history_is_repeated_as_a_whole_and_added():
    model, _, graph = built("plain")
    before = Snapshot(model)
    with pytest.raises(ValueError, match="nope"):
        graph.load_pruning_history([["0.0", True, [1]], ["nope", True, [1]]])
    before.check()
    assert not graph.pruning_history()
    conv = model[0][0]
    graph.get_pruning_group(conv, tp.prune_conv_out_channels, [0]).prune()
    graph.load_pruning_history([["0.0", True, [1]], ["0.0", True, [0, 3]]])
    assert graph.pruning_history() == [["0.0", True, [0]], ["0.0", True, [1]], ["0.0", True, [0, 3]]]
    twin, _ = make_network("plain")
    repeat_cuts(twin, graph.direct_history)
    assert same_values(model, twin)


def test_cuts_under_inference_mode_can_be_trained():
    model, x, graph = built("plain")
    with torch.inference_mode():
        graph.get_pruning_group(model[0][0], tp.prune_conv_out_channels, [0]).prune()
    model(x).sum().backward()
    assert model[0][0].weight.grad.shape == model[0][0].weight.shape


def test_a_direct_history_is_sent_to_the_function_that_repeats_it():
    _, _, graph = built("plain")
    with pytest.raises(ValueError, match=r"direct history: repeat_cuts"):
        graph.load_pruning_history([["0.0", "out", [1]]])
