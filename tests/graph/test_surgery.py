"""Cuts without a graph: members say what goes, whatever it is."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tp_importance import prunable_groups
from tp_importance.graph.classes import build_groups
from tp_importance.graph.cuts import Cut, make_cuts
from tp_importance.graph.groups import ChannelGroup, Member, PrunableGroups
from tp_importance.graph.layer_pruners import LayerPruners
from tp_importance.graph.remap import Survivors
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.trace_options import TraceOptions
from tp_importance.graph.tracing import trace
from tp_importance.testing import TOPOLOGIES, Snapshot, make_network, topology

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def member(name, role, kind, width, per_unit=1, axis=None):
    """All channels of one dimension, ``per_unit`` next to one another for every unit."""
    return Member(name, role, kind, np.arange(width), np.arange(width) // per_unit, width, axis)


def by_hand(model, members, attributes=(), x=X):
    """One group of a network, as a label engine would find it."""
    root = members[0]
    units = int(root.units.max()) + 1
    group = ChannelGroup(
        root.name,
        root.width,
        root.width // units,
        tuple(members),
        (root.name, root.role),
        root.channels,
        root.units,
        attributes=tuple(attributes),
    )
    return PrunableGroups([group], [], trace(model, x))


def kept(tensor, axis, gone):
    left = [i for i in range(tensor.shape[axis]) if i not in gone]
    return tensor.index_select(axis, torch.tensor(left))


# --- what is cut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_copy_is_cut_like_the_model_itself(name):
    case = topology(name).copy()
    twin, removed = copy.deepcopy(case.model), {g.name: [0] for g in case.groups}
    before = Snapshot(case.model)
    cuts = remove_units(case.groups, removed, model=twin)
    before.check()
    assert [(c.name, c.side, c.positions) for c in remove_units(case.groups, removed)] == [
        (c.name, c.side, c.positions) for c in cuts
    ]
    assert all(torch.equal(a, twin.state_dict()[n]) for n, a in case.model.state_dict().items())
    assert torch.equal(case.model(case.x), twin(case.x))


class Multiplied(nn.Module):
    """A convolution with one input and several outputs per group."""

    def __init__(self, make, transposed=False):
        super().__init__()
        self.a, self.multiplied, self.c = nn.Conv2d(3, 6, 1), make(), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.c(self.multiplied(self.a(x).relu()).relu())


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("sides", ["out", "in", "both"])
def test_whole_groups_go_once(kind, sides):
    model = Multiplied(lambda: kind(6, 12, 3, groups=6)).eval()
    twin = copy.deepcopy(model)
    members = [member("a", "out", "producer", 6), member("c", "in", "consumer", 12, 2)]
    if sides != "out":
        members.append(member("multiplied", "in", "consumer", 6))
    if sides != "in":
        members.append(member("multiplied", "out", "producer", 12, 2))
    remove_units(by_hand(model, members), {"a": [1, 4]})
    layer, gone = model.multiplied, [2, 3, 8, 9]
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 8, 4)
    with torch.no_grad():  # the channels that went, set to zero
        twin.c.weight[:, gone] = 0
        torch.testing.assert_close(model(X), twin(X))


def test_several_inputs_and_one_output_per_group():
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    twin = copy.deepcopy(model)
    members = [
        *(member("0", "out", "producer", 12, 2), member("1", "in", "consumer", 12, 2)),
        *(member("1", "out", "producer", 6), member("3", "in", "consumer", 6)),
    ]
    remove_units(by_hand(model, members), {"0": [0, 5]})
    assert (model[1].in_channels, model[1].out_channels, model[1].groups) == (8, 4, 4)
    with torch.no_grad():
        twin[3].weight[:, [0, 5]] = 0
        torch.testing.assert_close(model(X), twin(X))


def test_parts_of_a_group_are_refused():
    model = Multiplied(lambda: nn.Conv2d(6, 12, 3, groups=6))
    cut = Cut("multiplied", "out", (2, 3, 4))
    with pytest.raises(RuntimeError, match="loses whole groups only, which output channels \\[2, 3, 4\\] are not"):
        make_cuts(model, [cut], LayerPruners(model))


class Raw(nn.Module):
    """Parameters and buffers that are nobody's, cut along axis 1, and numbers that follow."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.scale = nn.Parameter(torch.randn(1, 6, 1, 1), requires_grad=False)
        self.register_buffer("shift", torch.randn(1, 6, 1, 1), persistent=False)
        self.channels, self.shape, self.sizes = 6, (3, 6), [1, 6]
        self.inner = nn.Module()
        self.inner.width, self.inner.sizes = 6, self.sizes

    def forward(self, x):
        y = self.a(x) * self.scale + self.shift
        assert y.shape[1] == self.channels == self.shape[1] == self.sizes[1]
        return self.c(y.relu())


NUMBERS = ["channels", "shape.1", "sizes.1", "inner.width"]


def raw_groups(model):
    members = [
        *(member("a", "out", "producer", 6), member("c", "in", "consumer", 6)),
        *(member(name, "out", "passthrough", 6, axis=1) for name in ("scale", "shift")),
    ]
    return by_hand(model, members, [member(name, "out", "passthrough", 6) for name in NUMBERS])


def test_raw_tensors_and_numbers_follow():
    model = Raw()
    scale, shift, sizes, weight = model.scale, model.shift, model.sizes, model.a.weight
    model.a.weight.requires_grad_(False)
    remove_units(raw_groups(model), {"a": [0, 4]})
    assert torch.equal(model.scale, kept(scale, 1, [0, 4])) and torch.equal(model.shift, kept(shift, 1, [0, 4]))
    assert isinstance(model.scale, nn.Parameter) and not model.scale.requires_grad and not model.a.weight.requires_grad
    assert "shift" in dict(model.named_buffers()) and "shift" not in model.state_dict()
    assert (model.channels, model.shape, model.sizes) == (4, (3, 4), [1, 4])
    assert model.inner.sizes is model.sizes and model.inner.width == 4
    assert sizes == [1, 6]  # not written into
    assert torch.equal(model.a.weight, kept(weight, 0, [0, 4]))
    model(X)


def test_survivors_know_raw_tensors():
    model = Raw()
    groups, before = raw_groups(model), Snapshot(model)
    survivors = Survivors.of(groups, {"a": [0, 4]})
    before.check()
    tensors = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    remove_units(groups, {"a": [0, 4]})
    survivors.settle(tensors, model)
    assert survivors.alive("scale").flatten().tolist() == [False, True, True, True, False, True]


def test_raw_tensors_are_found_with_their_axis():
    model = Raw().eval()
    model.forward = lambda x: model.c((model.a(x) * model.scale + model.shift).relu())
    groups = prunable_groups(model, X, unwrapped_parameters=[(model.scale, -3)], verify=False)
    assert groups["a"].member("scale", "out").axis == groups["a"].member("shift", "out").axis == 1
    remove_units(groups, {"a": [0]})
    assert model.scale.shape[1] == model.shift.shape[1] == 5 and model(X).shape == (2, 4, 8, 8)


# --- what is shared ---------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Two layers with one weight, which the root holds as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        self.alias = self.a.weight

    def forward(self, x):
        return self.c((self.a(x) + self.b(x)).relu())


SHARED = [member("a", "out", "producer", 6), member("b", "out", "producer", 6), member("c", "in", "consumer", 6)]


def test_a_shared_weight_is_cut_once_and_stays_shared():
    model, x = Shared(), torch.randn(2, 4)
    weight, bias = model.a.weight, model.b.bias
    with torch.no_grad():
        weight[1, 1] = torch.nan
    remove_units(by_hand(model, SHARED, x=x), {"a": [2, 5]})
    assert model.a.weight is model.b.weight is model.alias and model.a.out_features == model.b.out_features == 4
    torch.testing.assert_close(model.a.weight, kept(weight, 0, [2, 5]), equal_nan=True)
    assert torch.equal(model.b.bias, kept(bias, 0, [2, 5])) and model(x).shape == (2, 3)


def test_a_shared_raw_tensor_stays_shared():
    model = Shared()
    scale = model.b.scale = model.c.scale = model.scale = nn.Parameter(torch.randn(6))
    make_cuts(model, [Cut("scale", 0, (1,)), Cut("c", "in", (1,))], LayerPruners(model))
    assert torch.equal(model.scale, kept(scale, 0, [1])) and model.c.in_features == 5
    assert model.b.scale is model.c.scale is model.scale


@pytest.mark.parametrize("gone", [{"a": (1,)}, {"a": (1,), "b": (2,)}])
def test_a_shared_weight_that_would_part_is_refused(gone):
    model = Shared()
    with pytest.raises(RuntimeError, match=r"a\.weight and b\.weight are one tensor and lose different parts"):
        make_cuts(model, [Cut(name, "out", positions) for name, positions in gone.items()], LayerPruners(model))


def test_one_module_under_two_names_is_cut_once():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()), torch.randn(2, 4)
    model.append(model[2]).append(nn.Linear(6, 2))
    members = [
        *(member("0", "out", "producer", 6), member("2", "in", "consumer", 6), member("2", "out", "producer", 6)),
        *(member("4", "in", "consumer", 6), member("5", "in", "consumer", 6)),
    ]
    cuts = remove_units(by_hand(model, members, x=x), {"0": [3]})
    assert [(c.name, c.side) for c in cuts] == [("0", "out"), ("2", "in"), ("2", "out"), ("5", "in")]
    assert model[2].weight.shape == (5, 5) and model(x).shape == (2, 2)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "error", "match"),
    [
        (Cut("nope", "out", (0,)), ValueError, "no outputs of nope"),
        (Cut("a", "out", (6,)), ValueError, r"there are 6 outputs of a; \[6\] cannot go"),
        (Cut("a", "in", (0, 1, 2)), ValueError, "all 3 inputs of a were to go"),
        (Cut("a", "out", (0,), 8), RuntimeError, "there are 6 outputs of a, not 8: the groups are of another network"),
        (Cut("scale", 4, (0,)), ValueError, "no axis 4 of scale"),
        (Cut("a.nope", 0, (0,)), ValueError, "no axis 0 of a.nope"),
        (Cut("inner", "out", (0,)), RuntimeError, "no pruning function is known for inner"),
        (Cut("sizes.2", "attribute", (0,)), ValueError, "no attribute sizes.2"),
        (Cut("sizes", "attribute", (0,)), ValueError, "is no whole number"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_cut(cut, error, match):
    model = Raw()
    before = Snapshot(model)
    with pytest.raises(error, match=match):
        make_cuts(model, [Cut("c", "in", (1,)), cut], LayerPruners(model))
    before.check()


@pytest.mark.parametrize(
    ("units", "error", "match"),
    [
        ([8], ValueError, "group 0 has units 0..7"),
        ([1.5], TypeError, "'0'.* list the numbers"),
        ("12", TypeError, "'0'.* list the numbers"),
        (np.arange(8) < 2, TypeError, "'0'.* list the numbers"),
        (torch.arange(8) < 2, TypeError, "'0'.* list the numbers"),
    ],
)
def test_units_are_listed_by_number(units, error, match):
    """A mask would be read as the units 0 and 1."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval(), torch.zeros(1, 3, 8, 8)
    groups, before = prunable_groups(model, x), Snapshot(model)
    with pytest.raises(error, match=match):
        remove_units(groups, {"0": units})
    before.check()
    for numbers in (np.array([1, 5]), torch.tensor([5, 1]), (np.int64(1), 5)):
        copied = copy.deepcopy(model)
        remove_units(groups, {"0": numbers}, model=copied)
        assert torch.equal(copied[2].weight, model[2].weight[:, [0, 2, 3, 4, 6, 7]])


def test_groups_of_the_network_before_are_refused():
    model, x = make_network("plain")
    groups = build_groups(trace(model, x))
    remove_units(groups, {"0.0": [0]})
    with pytest.raises(RuntimeError, match=r"there are 7 outputs of 0\.0, not 8"):
        remove_units(groups, {"0.0": [0]})


class Careless(LayerPruners):
    """Says that everything is done, and does nothing."""

    def of(self, module):
        pruner = copy.copy(super().of(module))
        pruner.prune_out_channels = lambda layer, idxs: layer
        return pruner


def test_a_function_that_leaves_too_much_is_found_out():
    model = Raw()
    with pytest.raises(RuntimeError, match="6 outputs of a are left, not 5"):
        make_cuts(model, [Cut("a", "out", (0,))], Careless(model))


class TwoSided(nn.Module):
    """A layer of the user's own."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return F.relu(x * self.weight[:, None, None])


def test_the_users_functions_go_before_all_others():
    import torch_pruning as tp

    class Mine(tp.BasePruningFunc):
        def prune_out_channels(self, layer, idxs):
            keep = [i for i in range(len(layer.weight)) if i not in idxs]
            layer.weight = nn.Parameter(layer.weight.detach()[keep])
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer):
            return len(layer.weight)

        get_in_channels = get_out_channels

    model = nn.Sequential(nn.Conv2d(3, 6, 1), TwoSided(6), nn.Conv2d(6, 4, 1))
    options = TraceOptions(customized_pruners={TwoSided: Mine()})
    groups = build_groups(trace(model, X, options), options=options)
    weight, twin = model[1].weight, copy.deepcopy(model)
    for each in (model, twin):
        remove_units(groups, {"0": [1, 2]}, model=each)
        assert torch.equal(each[1].weight, kept(weight, 0, [1, 2])) and each(X).shape == (2, 4, 8, 8)
