"""Torch-Pruning's pruners do on our groups what they do alone where those are right, and are right elsewhere."""

import copy
import threading
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.attention_networks import Packed
from helpers.networks import make_zoo_network
from tp_importance import OBSImportance, label_groups, prunable_groups, refitted_step
from tp_importance.graph.label_graph import LabelGraph
from tp_importance.testing.networks import MISTRACED, TOPOLOGIES, make_network

RIGHT = sorted(set(TOPOLOGIES) - MISTRACED)
"""Networks that Torch-Pruning alone prunes rightly."""


@cache
def left_out(name):
    """The layers that make outputs, and others that we leave alone: Torch-Pruning would prune them."""
    groups = prunable_groups(*(make_zoo_network if name in ZOO else make_network)(name))
    return [layer for e in groups.excluded for layer in e.layers]


ZOO = ("resnet18", "mobilenet_v2", "densenet", "vgg16_bn", "regnet_y_400mf")


def pruner_of(kind, model, x, ignored=(), **options):
    """A pruner with dictionaries of its own, which Torch-Pruning would share among all pruners."""
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    options = {"importance": tp.importance.MagnitudeImportance(), "pruning_ratio": 0.5, **fresh, **options}
    return kind(model, x, ignored_layers=[model.get_submodule(n) for n in ignored], **options)


def both(name, kind=tp.pruner.BasePruner, steps=1, train=None, **options):
    """The network pruned by Torch-Pruning alone, and on our groups; options may depend on the network."""
    pruned = []
    for ours in (False, True):
        model, x = (make_zoo_network if name in ZOO else make_network)(name)
        made = {
            key: value(model) if callable(value) and key.endswith("dict") else value for key, value in options.items()
        }
        build = partial(pruner_of, kind, model, x, left_out(name), **made)
        if ours:
            with label_groups(verify=False):
                pruner = build()
        else:
            pruner = build()
        assert isinstance(pruner.DG, LabelGraph) == ours
        for _ in range(steps):
            if train is not None:
                train(pruner, model, x)
            pruner.step()
        with torch.no_grad():
            model(x)
        pruned.append(model)
    return pruned


def require_same(alone, ours):
    """Equal, and smaller than the network was."""
    expected, found = alone.state_dict(), ours.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.equal(v, expected[k]) for k, v in found.items())


WAYS = {
    "local": {},
    "global": {"global_pruning": True},
    "in three steps": {"global_pruning": True, "iterative_steps": 3, "steps": 3},
    "multiples of four": {"round_to": 4},
    "limited": {"global_pruning": True, "max_pruning_ratio": 0.6, "iterative_steps": 2, "steps": 2},
    "one layer": {
        "pruning_ratio": 0.2,
        "pruning_ratio_dict": lambda model: {[m for m in model.modules() if isinstance(m, nn.Conv2d)][1]: 0.5},
    },
}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (way, name)
        for way, options in WAYS.items()
        for name in RIGHT
        if name != "transformer_mlp"  # it has no convolutions
        and not (name == "split" and "steps" in options)  # Torch-Pruning forgets after one step where a split is
    ],
)
def test_same_network_as_alone(way, name):
    dense, _ = make_network(name)
    alone, ours = both(name, **WAYS[way])
    require_same(alone, ours)
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in dense.parameters())


def test_several_steps_through_a_split():
    model, x = make_network("split")
    with label_groups():
        pruner = pruner_of(tp.pruner.BasePruner, model, x, iterative_steps=3)
    for left in (16, 13, 10):  # of 20
        pruner.step()
        assert model.stem[0].out_channels == left == model.left[0].in_channels + model.right[0].in_channels
        assert model(x).shape == (2, 4)
    assert prunable_groups(model, x).names == pruner.DG.groups.names


@pytest.mark.parametrize("name", ZOO)
def test_same_network_of_torchvision_as_alone(name):
    require_same(*both(name, global_pruning=True))


def test_isomorphic():
    """Scopes are told apart by the layers of a group only; Torch-Pruning's also by the operations between them."""
    require_same(*both("resnet18", global_pruning=True, isomorphic=True))


def regularised(pruner, model, x, **options):
    """Some steps of sparse training on the groups as they are now."""
    if pruner.current_step:
        pruner.update_regularizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        pruner.regularize(model, **options)
        optimizer.step()


def growing(pruner, model, x):
    regularised(pruner, model, x)
    pruner.update_reg()
    regularised(pruner, model, x)


@pytest.mark.parametrize(
    ("kind", "train", "options"),
    [
        (tp.pruner.GroupNormPruner, regularised, {}),
        (tp.pruner.BNScalePruner, regularised, {"importance": tp.importance.BNScaleImportance()}),
        (tp.pruner.BNScalePruner, regularised, {"importance": tp.importance.BNScaleImportance(), "group_lasso": True}),
        (tp.pruner.GrowingRegPruner, growing, {}),
        (tp.pruner.MagnitudePruner, None, {"importance": tp.importance.LAMPImportance()}),
        (tp.pruner.MetaPruner, None, {"importance": tp.importance.FPGMImportance()}),
    ],
)
@pytest.mark.parametrize("name", ["plain", "depthwise"])
def test_all_pruners(name, kind, train, options):
    alone, ours = both(name, kind, steps=2, train=train, iterative_steps=2, global_pruning=True, **options)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("importance", [tp.importance.TaylorImportance, tp.importance.HessianImportance])
def test_gradients_of_the_first_step_serve_all(importance):
    def once(pruner, model, x):
        if pruner.current_step == 0:
            model(x).square().sum().backward()

    require_same(*both("concat", steps=2, train=once, iterative_steps=2, importance=importance()))


def dead_by_halves(name):
    """Every other channel of every group is dead: zero where it is made, and behind its batch norm."""
    model, x = make_network(name)
    groups = prunable_groups(model, x)
    with torch.no_grad():
        for group in groups:
            for member in group.members:
                module = model.get_submodule(member.name)
                dead = torch.from_numpy(member.positions(range(1, group.n_units, 2)))
                if member.role == "out" and isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                    for tensor in (module.weight, module.bias):
                        if tensor is not None:
                            tensor[dead] = 0.0
    return model, x, groups


@pytest.mark.parametrize("name", sorted(MISTRACED))
def test_right_where_the_host_is_wrong(name):
    outputs = {}
    for ours in (False, True):
        model, x, _ = dead_by_halves(name)
        with torch.no_grad():
            dense = model(x)
        importance = tp.importance.MagnitudeImportance(group_reduction="first", normalizer=None)
        build = partial(pruner_of, tp.pruner.BasePruner, model, x, importance=importance, pruning_ratio=0.4)
        heads = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        if ours:
            with label_groups():
                pruner = build(ignored=heads)
        else:
            pruner = build(ignored=heads)
        pruner.step()
        try:
            with torch.no_grad():
                outputs[ours] = torch.allclose(model(x), dense, rtol=1e-4, atol=1e-5)
        except RuntimeError:
            outputs[ours] = False
        assert pruner.pruning_history()
    assert outputs == {False: False, True: True}


def test_all_the_pruner_was_given_counts():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, _ = make_network("grouped")

        def forward(self, *, image):
            return {"logits": self.net(image)}

    model = Wrapped()
    _, x = make_network("grouped")
    kept = model.net[0][0]
    with label_groups():
        pruner = tp.pruner.BasePruner(
            model,
            {"image": x},
            tp.importance.RandomImportance(),
            ignored_layers=[kept],
            forward_fn=lambda m, inputs: m(**inputs),
            output_transform=lambda out: out["logits"],
            num_heads={model.net[2][0]: 3},
        )
    assert any(e.kind == "ignored" and "net.0.0" in e.reason for e in pruner.DG.excluded)
    assert pruner.DG.groups["net.2.0"].unit_size == 3  # the heads
    assert all(
        item.dep.target.module is not kept or not pruner.DG.is_out_channel_pruning_fn(item.dep.handler)
        for group in pruner.DG.get_all_groups()
        for item in group
    )


def test_a_grouped_convolution_that_would_keep_one_channel_per_group_is_left_alone():
    model, x = make_network("grouped")
    inputs = model[1].body[0][0]
    with label_groups(verify=False):
        pruner = pruner_of(tp.pruner.BasePruner, model, x, pruning_ratio_dict={inputs: 0.6})
    pruner.step()  # to 4 of 16 channels, in 4 groups; all other layers to half
    assert (inputs.out_channels, model[1].body[1][0].out_channels, model[2][0].out_channels) == (16, 8, 12)
    ask = partial(pruner.DG.get_pruning_group, inputs, tp.prune_conv_out_channels)
    whole = [i for i in range(16) if i % 4 < 3]
    assert not pruner.DG.check_pruning_group(ask(whole)) and pruner.DG.check_pruning_group(ask([0, 1]))
    with pytest.raises(ValueError, match=r"group 1\.body\.0\.0 keeps at least 2 of its 4 units"):
        ask(whole).prune()
    with pytest.raises(ValueError, match="with all such units fewer than 2 of 4 units would be left"):
        ask([0, 1, 2])


def test_interactive_steps():
    model, x = make_network("dense")
    with label_groups():
        pruner = pruner_of(tp.pruner.BasePruner, model, x)
    widths = {}
    for group in list(pruner.step(interactive=True))[::-1]:
        dep, idxs = group[0]
        widths[dep.target.module] = pruner.DG.get_out_channels(dep.target.module) - len(idxs[:2])
        group.prune(idxs=idxs[:2])
    assert widths and {m: m.out_channels for m in widths} == widths and model(x).shape[0] == 2


def test_statistical_importances_and_refitted_steps():
    model, x = make_network("split")
    loader = [(torch.randn(32, *x.shape[1:]), torch.randint(0, 4, (32,)))]
    importance = OBSImportance().collect(model, x, loader)
    with label_groups(verify=lambda groups, _: {"stem.0/1": "refused for the test"}):
        pruner = pruner_of(tp.pruner.BasePruner, model, x, importance=importance)
    report = refitted_step(pruner, x, loader)
    order = importance.curves()["stem.0/0"].order[:4]
    assert pruner.pruning_history()[0] == ["stem.0", True, np.sort(order).tolist()]
    assert model.left[0].in_channels == 4 and model.right[0].in_channels == 12
    assert all(row.after < row.before for row in report.rows if row.removed)


def test_only_in_the_block_and_only_this_thread():
    original, graph = tp.pruner.BasePruner.__init__, tp.DependencyGraph
    model, x = make_network("plain")
    entered, done, found = threading.Event(), threading.Event(), {}

    def elsewhere():
        entered.wait(10)
        found["elsewhere"] = type(pruner_of(tp.pruner.BasePruner, copy.deepcopy(model), x).DG)
        with label_groups():
            found["own block"] = type(pruner_of(tp.pruner.BasePruner, copy.deepcopy(model), x).DG)
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with pytest.raises(KeyError, match="on purpose"), label_groups():
        entered.set()
        assert done.wait(60)
        found["here"] = type(pruner_of(tp.pruner.GroupNormPruner, copy.deepcopy(model), x).DG)
        assert tp.DependencyGraph is graph
        raise KeyError("on purpose")
    thread.join()
    assert found == {"elsewhere": graph, "own block": LabelGraph, "here": LabelGraph}
    assert tp.pruner.BasePruner.__init__ is original
    assert type(pruner_of(tp.pruner.BasePruner, model, x).DG) is graph


def test_pruners_do_not_share_their_dictionaries():
    model, x = make_network("grouped")
    with label_groups():
        first, second = (tp.pruner.BasePruner(model, x, tp.importance.RandomImportance()) for _ in range(2))
    assert first.out_channel_groups and first.out_channel_groups is not second.out_channel_groups
    mine = {}
    with label_groups():
        assert tp.pruner.BasePruner(model, x, tp.importance.RandomImportance(), num_heads=mine).num_heads is mine


def test_another_version_of_the_host_is_refused(monkeypatch):
    monkeypatch.setattr(tp.pruner.BasePruner, "__init__", lambda self, *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="builds its pruners in another way"), label_groups():
        pass
    monkeypatch.undo()
    model, x = make_network("plain")
    with label_groups():
        assert isinstance(pruner_of(tp.pruner.BasePruner, model, x).DG, LabelGraph)


def test_refitted_steps_where_torch_pruning_itself_cuts_wrong_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)
    ).eval()
    x = torch.randn(8, 3, 12, 12)
    alone = pruner_of(tp.pruner.BasePruner, copy.deepcopy(model), x[:2], ignored=["5"])
    with pytest.raises(IndexError):
        refitted_step(alone, x[:2], [x])
    with label_groups():
        pruner = pruner_of(tp.pruner.BasePruner, model, x[:2])
    report = refitted_step(pruner, x[:2], [x])
    assert [(m.in_channels, m.out_channels) for m in model if isinstance(m, nn.Conv2d)] == [(3, 8), (2, 4), (4, 2)]
    assert {row.name: row.after < row.before for row in report.rows} == {"3": True, "5": True}
    assert refitted_step(pruner, x[:2], [x]).rows == [] and model[0].out_channels == 8  # all steps are done


def test_heads_of_a_packed_projection():
    """Dimensions of all heads by num_heads; whole heads without."""

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(Packed(12, 3, 4, fused=True), nn.Linear(12, 5)).eval()
        return model, torch.randn(2, 5, 12), tp.importance.MagnitudeImportance()

    def sizes(attention):
        assert attention.all == attention.proj.in_features == attention.qkv.out_features / 3
        return attention.heads, attention.dim

    model, x, magnitude = made()
    with label_groups():
        options = {"pruning_ratio": 0.5, "ignored_layers": [model[1]], "num_heads": {model[0].qkv: 3}}
        tp.pruner.BasePruner(model, x, magnitude, **options).step()
    assert sizes(model[0]) == (3, 2)
    model, x, magnitude = made()
    with label_groups():
        options = {"pruning_ratio": 0.3, "ignored_layers": [model[1], model[0].proj]}
        tp.pruner.BasePruner(model, x, magnitude, **options).step()
        with pytest.raises(ValueError, match="prune_num_heads=True: inside label_groups whole heads are units"):
            tp.pruner.BasePruner(model, x, magnitude, **options, prune_num_heads=True)
    assert sizes(model[0]) == (2, 4)
