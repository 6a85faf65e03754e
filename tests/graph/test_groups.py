"""Groups of small networks, what is left alone on request, surgery."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.group_cases import EXPECTED, shifted, whole
from helpers.states import state
from tp_importance import prunable_groups
from tp_importance.graph import verify
from tp_importance.graph.agreement import agrees, units_at
from tp_importance.graph.host_graph import host_graph
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed, sample_units
from tp_importance.testing import MISTRACED, TOPOLOGIES, make_network, topology
from tp_importance.testing.networks import head

# group: producers, consumers, pass-through layers
MEMBERS = {
    ("residual", "0.0"): (
        ["0.0", "1.body.1.0"],
        ["1.body.0.0", "2.body.0.0", "2.shortcut.0"],
        ["0.1", "1.body.1.1"],
    ),
    ("depthwise", "1.body.0"): (["1.body.0"], ["1.body.6"], ["1.body.1", "1.body.3", "1.body.4"]),
    ("se", "0.0"): (["0.0", "1.gate.3"], ["1.gate.1", "2.0"], ["0.1"]),
    ("shared_input", "a.0"): (["a.0", "b.0"], ["head.2"], ["a.1", "b.1"]),
    ("dense", "1.conv"): (["1.conv"], ["2.conv", "3.conv", "6.2"], ["2.bn", "3.bn", "4"]),
}


def names(members):
    return [m.name for m in members]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_names_widths_and_units(name):
    groups = topology(name).groups
    assert whole(groups) == EXPECTED[name]
    assert groups.names == list(EXPECTED[name])  # in execution order
    for group in groups:
        assert groups[group.name] is group and group.n_units * group.unit_size == group.width
        assert sorted(np.bincount(group.root_units)) == [group.unit_size] * group.n_units
        for m in group.members:
            modules = dict(groups.trace.model.named_modules())
            assert (m.channels < m.width).all() and len(np.unique(m.channels)) == len(m.channels) == len(m.units)
            assert set(m.units.tolist()) <= set(range(group.n_units)), (group.name, m.name)
            per_unit = np.bincount(m.units, minlength=group.n_units)
            assert (per_unit == per_unit[0]).all()  # else the cost is no function of the width
            assert isinstance(modules[m.name], nn.Module)


@pytest.mark.parametrize(("network", "name"), MEMBERS)
def test_members(network, name):
    group = topology(network).groups[name]
    producers, consumers, passing = MEMBERS[network, name]
    assert names(group.producers) == producers
    assert sorted(names(group.consumers)) == sorted(consumers)
    assert sorted({m.name for m in group.members if m.kind == "passthrough"}) == sorted(passing)


def test_positions_behind_concat_and_flatten():
    concat, flat = topology("concat").groups, topology("flatten").groups
    right = concat["right.0"].member("tail.0.0", "in")
    assert right.positions([0, 15]).tolist() == [12, 27] and right.width == 28
    linear = flat["1.0"].member("3", "in")
    assert linear.positions([2]).tolist() == list(range(32, 48))
    assert flat["1.0"].member("3", "out") is None
    split = topology("split").groups["stem.0/1"]
    assert sorted(split.removed_channels([0, 11])) == [8, 19]  # positions in the stem, not in the piece


def test_units_of_grouped_convolutions_take_one_channel_of_every_conv_group():
    group = topology("grouped").groups["1.body.0.0"]
    assert group.removed_channels([1]) == [1, 5, 9, 13]


@pytest.mark.parametrize("name", sorted(MISTRACED))
def test_what_torch_pruning_traces_wrongly_is_right(name):
    case = topology(name)
    assert not [e for e in case.groups.excluded if e.kind == "unverified"]
    graph = host_graph(case.model, case.x)
    first = case.groups.groups[0]
    module = case.model.get_submodule(first.root[0])
    theirs = graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(module.out_channels)))
    assert not agrees(theirs, case.groups, units_at(case.groups))  # else it would not be one of these networks
    assert masked_equals_removed(case.groups, case.x, sample_units(case.groups)) is None


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_nothing_is_refused_by_the_oracle(name):
    assert not [e for e in topology(name).groups.excluded if "masking" in e.reason]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_outputs_are_left_alone(name):
    case = topology(name)
    assert any(e.reason == "produces the network's output" for e in case.groups.excluded)
    copied = case.copy()
    remove_units(copied.groups, {g.name: range(g.n_units - g.min_units) for g in copied.groups})
    assert copied.model(case.x).shape == case.model(case.x).shape  # at their smallest widths they still run


# --- what is left alone on request ------------------------------------------------------------------------------------


def left_alone(model, x, ignored):
    groups = prunable_groups(model, x, ignored_layers=ignored)
    return set(EXPECTED["residual"]) - set(groups.names)


def test_ignored_layers():
    model, x = make_network("residual")
    everything = set(EXPECTED["residual"])
    assert left_alone(model, x, None) == left_alone(model, x, []) == set()
    assert left_alone(model, x, [model[0][0]]) == {"0.0"}
    assert left_alone(model, x, [model[1].body[1][1]]) == {"0.0"}  # a batch norm of the same group
    assert left_alone(model, x, [model[2]]) == {"2.body.0.0", "2.body.1.0"}  # a container: all it produces
    assert left_alone(model, x, [model[2].shortcut, model[0]]) == {"0.0", "2.body.1.0"}
    assert left_alone(model, x, [nn.BatchNorm2d]) == everything
    assert left_alone(model, x, [nn.Linear]) == set()  # reads only
    assert left_alone(model, x, [type(model[2])]) == everything  # by type of container
    assert left_alone(model, x, [model[2].body[0][0].weight]) == {"2.body.0.0"}
    assert left_alone(model, x, [model[1].body[0][1].bias]) == {"1.body.0.0"}


def test_ignored_layers_give_the_reason_and_are_not_pruned():
    model, x = make_network("residual")
    groups = prunable_groups(model, x, ignored_layers=[model[2].shortcut])
    reasons = {e.name: e.reason for e in groups.excluded}
    assert reasons["2.body.1.0"] == "2.shortcut.0 is in ignored_layers"
    remove_units(groups, sample_units(groups))
    assert model[2].shortcut[0].out_channels == 24


@pytest.mark.parametrize("bad", ["0.0", 3, torch.zeros(2)])
def test_ignored_layers_refuse(bad):
    model, x = make_network("plain")
    with pytest.raises(TypeError, match="ignored_layers"):
        prunable_groups(model, x, ignored_layers=[bad])


class Scaled(nn.Module):
    """A free parameter with one entry per channel, as LayerScale has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(1, 8, 1, 1, generator=torch.Generator().manual_seed(0)))
        self.second = nn.Conv2d(8, 6, 3)
        self.head = head(6)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(x) * self.scale)))


def test_free_parameters():
    model, x = Scaled().eval(), torch.randn(2, 3, 8, 8)
    for options in ({}, {"unwrapped_parameters": [(model.scale, 1)]}):
        groups = prunable_groups(model, x, **options)
        assert groups.names == ["first", "second"]
        assert masked_equals_removed(groups, x, {"first": [0, 3, 4]}) is None
        assert masked_equals_removed(groups, x, {"first": [0, 3, 4]}, gated=shifted(groups)) is not None
    assert prunable_groups(model, x, ignored_layers=[model.scale]).names == ["second"]


# --- surgery ----------------------------------------------------------------------------------------------------------


def test_remove_units_refuses():
    case = topology("grouped")
    before = state(case.model)
    for removed in ({"nope": [0]}, {"0.0": [12]}, {"0.0": [-1]}, {"0.0": range(12)}, {"1.body.1.0": [0, 1, 2]}):
        with pytest.raises(ValueError):
            remove_units(case.groups, removed)
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())


def test_remove_units_keeps_the_right_filters():
    case = topology("plain").copy()
    weight, consumer = case.model[0][0].weight.clone(), case.model[1][0].weight.clone()
    remove_units(case.groups, {"0.0": [7, 1, 4, 4]})
    kept = [0, 2, 3, 5, 6]
    assert torch.equal(case.model[0][0].weight, weight[kept])
    assert torch.equal(case.model[1][0].weight, consumer[:, kept])


def test_remove_units_is_what_torch_pruning_would_do():
    case, (other, x) = topology("residual").copy(), make_network("residual")
    remove_units(case.groups, {"0.0": [2, 5]})
    graph = tp.DependencyGraph().build_dependency(other, x)
    graph.get_pruning_group(other[0][0], tp.prune_conv_out_channels, idxs=[2, 5]).prune()
    assert all(
        torch.equal(a, b) for a, b in zip(case.model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_groups_that_share_a_root_go_together():
    case = topology("split").copy()
    remove_units(case.groups, {"stem.0/0": [0, 1], "stem.0/1": [3]})
    assert case.model.stem[0].out_channels == 17
    assert (case.model.left[0].in_channels, case.model.right[0].in_channels) == (6, 11)
    case.model(case.x)


class ByKeyword(nn.Module):
    """Layers called by keyword, and an output that is no float."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        y = self.c(input=self.b(input=torch.relu(self.a(x))).mean((2, 3)))
        return y, y > 0


def test_layers_called_by_keyword_and_a_boolean_output():
    model, x = ByKeyword().eval(), torch.randn(2, 3, 8, 8)
    groups = prunable_groups(model, x)
    assert groups.widths == {"a": 8, "b": 6}, groups.excluded
    loader = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)]
    from tp_importance import CATROImportance

    assert set(CATROImportance().collect(model, x, loader, groups=groups).curves()) == {"a", "b"}


def test_verification_runs_in_full_precision(monkeypatch):
    """TensorFloat-32, on by default on GPUs, once made deep groups look unsafe."""
    seen = []
    monkeypatch.setattr(verify, "remove_units", lambda *_, **__: seen.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, x = make_network("plain")
    verify.verify_groups(prunable_groups(model, x, verify=False), x)
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "form",
    [
        lambda y: (y, None),
        lambda y: {"logits": y, "aux": None},
        lambda y: (y, 1.5, "a"),
        lambda y: SimpleNamespace(logits=y, n=3),
    ],
)
def test_outputs_of_any_form(form):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)

        def forward(self, x):
            return form(self.b(torch.relu(self.a(x))))

    groups = prunable_groups(Net().eval(), torch.randn(2, 3, 12, 12))
    assert groups.names == ["a"] and groups.excluded[0].reason == "produces the network's output"


def test_scripted_layers_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 2, 3))
    with pytest.raises(TypeError, match=r"model\.1 is a RecursiveScriptModule: .*script or trace it afterwards"):
        prunable_groups(model, torch.randn(2, 3, 12, 12))


def test_groups_are_shown_on_a_line_each():
    lines = str(topology("depthwise").groups).splitlines()
    assert lines[0] == f"{len(topology('depthwise').groups)} groups, 1 left out" and lines[-1].startswith("left out: ")
    assert len(lines) == len(topology("depthwise").groups) + 2
