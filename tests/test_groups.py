import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from contract import removal, topology, zoo
from networks import MISTRACED, TOPOLOGIES, ZOO, conv_bn_relu, head, make_network
from tp_importance import TracingError, count_ops, prunable_groups, verify
from tp_importance.groups import PrunableGroups
from tp_importance.surgery import remove_units
from tp_importance.verify import masked_equals_removed, sample_units

# name: width, or (width, unit size, fewest units)
EXPECTED = {
    "plain": {"0.0": 8, "1.0": 12, "2.0": 16},
    "residual": {"0.0": 8, "1.body.0.0": 12, "2.body.0.0": 16, "2.body.1.0": 24},
    "concat": {"stem.0": 8, "left.0": 12, "right.0": 16, "tail.0.0": 24},
    "dense": {"0": 12, "1.conv": 8, "2.conv": 8, "3.conv": 8},
    "depthwise": {"0.0": 8, "1.body.0": 24, "2.body.0": 32, "2.body.6": 16},
    "grouped": {"0.0": 12, "1.body.0.0": (16, 4, 1), "1.body.1.0": (16, 4, 2), "2.0": 24},
    "split": {"stem.0/0": 8, "stem.0/1": 12, "left.0": 16, "right.0": 24},
    "split_swapped": {"left.0": 16, "right.0": 24},
    "flatten": {"0.0": 8, "1.0": 12, "3": 24},
    "se": {"0.0": 12, "1.gate.1": 6, "2.0": 16, "3.gate.1": 8},
    "shared_input": {"stem.0": 12, "a.0": 16, "c.0": 8},
    "transposed": {"encoder.0": 8, "bottom.0": 24, "up.0": 12, "tail.0.0": 16},
    "transformer_mlp": {"blocks.0.mlp.1": 40, "blocks.1.mlp.1": 48},
    "padded_shortcut": {"features.1.body.0.0": 8, "features.2.body.0.0": 12, "features.3.body.0.0": 16},
    "no_bn": {"0": 8, "2": 12, "5": 16},
    "preact": {"0": 8, "1.conv1": 12, "2.shortcut": 24, "2.conv1": 16},
}
# group: producers, readers, carriers
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


def whole(groups):
    return {
        g.name: g.width if g.unit_size == 1 and g.min_units == 1 else (g.width, g.unit_size, g.min_units)
        for g in groups
    }


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
    producers, readers, carriers = MEMBERS[network, name]
    assert names(group.producers) == producers
    assert sorted(names(group.readers)) == sorted(readers)
    assert sorted({m.name for m in group.members if m.kind == "carrier"}) == sorted(carriers)


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
def test_mistraced_groups_are_refused_with_a_reason(name):
    case = topology(name)
    unverified = prunable_groups(case.model, case.x, verify=False)
    refused = {e.name: e.reason for e in case.groups.excluded if "removal is not masking" in e.reason}
    assert set(unverified.names) - set(case.groups.names) == set(refused) != set()
    assert all("differs" in reason or "shape" in reason for reason in refused.values())
    assert all(e.width == unverified[e.name].width for e in case.groups.excluded if e.name in refused)


@pytest.mark.parametrize("name", sorted(set(TOPOLOGIES) - MISTRACED))
def test_nothing_else_is_refused_by_the_oracle(name):
    assert not [e for e in topology(name).groups.excluded if "masking" in e.reason]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_outputs_are_left_alone(name):
    case = topology(name)
    assert any(e.reason == "produces the network's output" for e in case.groups.excluded)
    copied = case.copy()
    remove_units(copied.groups, {g.name: range(g.n_units - g.min_units) for g in copied.groups})
    assert copied.model(case.x).shape == case.model(case.x).shape  # at their smallest widths they still run


# --- masked = removed -------------------------------------------------------------------------------------------------


def shifted(groups):
    """The groups with every position moved by one: a surgery that is off by one, as seen from the gates."""
    twins = []
    for group in groups:
        members = [dataclasses.replace(m, channels=np.roll(m.channels, 1)) for m in group.members]
        twins.append(dataclasses.replace(group, members=tuple(members)))
    return PrunableGroups(twins, groups.excluded, groups.trace, groups.options)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_masked_is_removed(name, seed):
    case = topology(name)
    removed = removal(case.groups, seed)
    assert masked_equals_removed(case.groups, case.x, removed) is None


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_oracle_notices_a_shift_by_one(name):
    case = topology(name)
    problem = masked_equals_removed(case.groups, case.x, sample_units(case.groups), gated=shifted(case.groups))
    assert problem is not None and "differs by" in problem


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_oracle_notices_a_shift_in_any_single_group(name):
    case = topology(name)
    wrong = shifted(case.groups)
    for group in case.groups:
        only = case.groups.exclude({n: "" for n in case.groups.names if n != group.name})
        removed = sample_units(only, seed=3)
        assert masked_equals_removed(only, case.x, removed) is None
        assert "differs by" in masked_equals_removed(only, case.x, removed, gated=wrong)


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    case = zoo(name)
    assert [e.reason for e in case.groups.excluded] == ["produces the network's output"]
    assert len(case.groups) >= 10
    problem = masked_equals_removed(case.groups, case.x, sample_units(case.groups), gated=shifted(case.groups))
    assert problem is not None and "differs by" in problem


def test_oracle_compares_the_cost():
    case = topology("plain")
    wrong = copy.copy(case.groups)
    first = case.groups["0.0"]
    fewer = tuple(m for m in first.members if m.kind != "carrier")  # forgets a batch norm
    wrong.groups = [dataclasses.replace(first, members=fewer), *case.groups.groups[1:]]
    assert "the cost model says" in masked_equals_removed(wrong, case.x, {"0.0": [1]})


def test_oracle_removes_numbers_that_no_division_into_parts_can_share():
    for name in TOPOLOGIES:
        groups = topology(name).groups
        for unit_name, units in sample_units(groups).items():
            group = groups[unit_name]
            assert 0 < len(units) <= group.n_units - group.min_units
            assert np.gcd(len(units), group.n_units) == 1


class HalvesOfChunk(nn.Module):
    """Equal halves whatever the width: right only if both lose the same number of channels."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.left, self.right = conv_bn_relu(8, 8), conv_bn_relu(8, 8)
        self.head = head(16)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        return self.head(torch.cat([self.left(left), self.right(right)], 1))


def test_chunks_that_could_lose_unequal_numbers_are_refused():
    groups = prunable_groups(HalvesOfChunk().eval(), torch.randn(2, 3, 8, 8))
    assert groups.names == ["left.0", "right.0"]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.PixelShuffle(2), conv_bn_relu(4, 6)],
        [nn.ConvTranspose2d(16, 12, 2, stride=2, groups=4), nn.ReLU(), conv_bn_relu(12, 6)],
    ],
    ids=["PixelShuffle", "grouped transposed convolution"],
)
def test_what_torch_pruning_cannot_do_is_refused_and_the_rest_is_pruned(layers):
    model, x = nn.Sequential(conv_bn_relu(3, 16), *layers, head(6)).eval(), torch.randn(2, 3, 8, 8)
    groups = prunable_groups(model, x)
    assert groups.names == [f"{len(layers)}.0"]
    assert "0.0" in {e.name for e in groups.excluded}
    assert masked_equals_removed(groups, x, sample_units(groups)) is None


# --- what is left alone on request ------------------------------------------------------------------------------------


def left_alone(model, x, ignored):
    groups = prunable_groups(model, x, ignored)
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
    groups = prunable_groups(model, x, [model[2].shortcut])
    reasons = {e.name: e.reason for e in groups.excluded}
    assert reasons["2.body.1.0"] == "2.shortcut.0 is in ignored_layers"
    remove_units(groups, sample_units(groups))
    assert model[2].shortcut[0].out_channels == 24


@pytest.mark.parametrize("bad", ["0.0", 3, torch.zeros(2)])
def test_ignored_layers_refuse(bad):
    model, x = make_network("plain")
    with pytest.raises(TypeError, match="ignored_layers"):
        prunable_groups(model, x, [bad])


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
    assert prunable_groups(model, x, [model.scale]).names == ["second"]


# --- whatever state the model is in -----------------------------------------------------------------------------------


def state(model):
    hooks = [[dict(getattr(m, key)) for key in vars(m) if key.endswith("_hooks")] for m in model.modules()]
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    return hooks, flags, [id(p) for p in model.parameters()]


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_untouched(model, before, values):
    assert state(model) == before
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def prepare(model):
    """Training and evaluation mixed, some parameters frozen, hooks of the user in place."""
    model.train()
    model[1].eval()
    model[0].requires_grad_(False)
    model[2].register_forward_hook(lambda *_: None)
    model[2].register_forward_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("verify", [False, True])
def test_modes_flags_hooks_and_values_stay(verify):
    model, x = make_network("residual")
    prepare(model)
    before, values = state(model), bits(model)
    assert whole(prunable_groups(model, x, verify=verify)) == EXPECTED["residual"]
    assert_untouched(model, before, values)


def test_hooks_of_the_user_do_not_run_wild():
    model, x = make_network("residual")
    model[2].register_forward_hook(lambda _m, _a, out: out * 2)  # changes what comes after, not the channels
    assert whole(prunable_groups(model, x)) == EXPECTED["residual"]


def test_frozen_models():
    model, x = make_network("residual")
    model.requires_grad_(False)
    groups = prunable_groups(model, x)
    assert whole(groups) == EXPECTED["residual"]
    remove_units(groups, sample_units(groups))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_around(context):
    model, x = make_network("residual")
    before, values = state(model), bits(model)
    with context():
        assert whole(prunable_groups(model, x)) == EXPECTED["residual"]
        assert whole(prunable_groups(model, torch.randn(2, 3, 16, 16))) == EXPECTED["residual"]
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert_untouched(model, before, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["residual", "flatten"])
def test_other_precisions(name, dtype):
    model, x = make_network(name)
    model, x = model.to(dtype), x.to(dtype)
    groups = prunable_groups(model, x)
    assert whole(groups) == EXPECTED[name]
    remove_units(groups, sample_units(groups))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(x).dtype == dtype


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv_bn_relu(3, 8), conv_bn_relu(3, 12), head(20)

    def forward(self, left, right):
        return self.head(torch.cat([self.a(left), self.b(right)], 1))


def test_inputs_of_several_tensors():
    model, x = TwoInputs().eval(), torch.randn(2, 3, 8, 8)
    for inputs in ((x, x + 1), [x, x + 1], {"left": x, "right": x + 1}):
        groups = prunable_groups(model, inputs)
        assert whole(groups) == {"a.0": 8, "b.0": 12}
        assert masked_equals_removed(groups, inputs, {"a.0": [1], "b.0": [0, 7]}) is None


def test_forward_fn():
    model, x = TwoInputs().eval(), torch.randn(2, 3, 8, 8)
    groups = prunable_groups(model, x, forward_fn=lambda net, batch: net(batch, batch + 1))
    assert whole(groups) == {"a.0": 8, "b.0": 12}


class TwoOutputs(nn.Module):
    """Classes from the second layer, maps from the first, and the raw features as a third output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv_bn_relu(3, 8), conv_bn_relu(8, 12), conv_bn_relu(8, 10)
        self.classes, self.maps = head(12), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        a = self.a(x)
        b, c = self.b(a), self.c(a)
        return {"classes": self.classes(b), "rest": (self.maps(a), c)}


def test_networks_of_several_outputs():
    model, x = TwoOutputs().eval(), torch.randn(2, 3, 8, 8)
    groups = prunable_groups(model, x)
    assert whole(groups) == {"a.0": 8, "b.0": 12}
    assert {e.name for e in groups.excluded} == {"c.0", "classes.2", "maps"}
    remove_units(groups, {"a.0": [0, 1, 2], "b.0": [5]})
    out = model(x)
    assert out["classes"].shape == (2, 4) and [t.shape[1] for t in out["rest"]] == [5, 10]


class FeaturesAreOutput(nn.Module):
    """Returns what the classifier reads, too: pruning it would change the interface."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv_bn_relu(3, 8), conv_bn_relu(8, 12), head(12)

    def forward(self, x):
        features = self.b(self.a(x))
        return self.head(features), features


def test_outputs_that_are_also_read_are_left_alone():
    groups = prunable_groups(FeaturesAreOutput().eval(), torch.randn(2, 3, 8, 8))
    assert groups.names == ["a.0"]


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv_bn_relu(3, 8), conv_bn_relu(9, 4)

    def forward(self, x):
        return self.second(self.first(x))


class NoTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).sum().item()


@pytest.mark.parametrize(("build", "x"), [(Breaks, torch.randn(1, 3, 8, 8)), (NoTensor, torch.randn(1, 4))])
def test_untraceable_models(build, x):
    model = build().train()
    model[0] if isinstance(model, nn.Sequential) else None
    next(model.children()).requires_grad_(False)
    before, values = state(model), bits(model)
    with pytest.raises(TracingError, match=f"could not trace {build.__name__}"):
        prunable_groups(model, x)
    assert_untouched(model, before, values)


@pytest.mark.parametrize("inputs", [None, 3, "x", (), {}, torch.tensor(1.0)])
def test_inputs_without_a_batch(inputs):
    with pytest.raises(TypeError, match="example_inputs"):
        prunable_groups(make_network("plain")[0], inputs)


# --- attention --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with a scale that does not depend on the width."""

    def __init__(self, heads, width=24, fused=False):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.embed = nn.Linear(32, width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj, self.head = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x)
        qkv = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.head(x + self.proj(mixed.transpose(1, 2).flatten(2))).mean(1)


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_heads_lose_the_same_dimensions(heads):
    torch.manual_seed(0)
    model, x = Attention(heads).eval(), torch.randn(2, 6, 32)
    groups = prunable_groups(model, x, num_heads={model.q: heads, model.k: heads, model.v: heads})
    assert whole(groups) == {"embed": 24, "q": 24 if heads == 1 else (24, heads, 1)}
    assert groups["q"].removed_channels([1]) == [1 + 24 // heads * h for h in range(heads)]
    assert masked_equals_removed(groups, x, {"q": [0, 3]}) is None
    remove_units(groups, {"q": [0, 3]})
    assert model.q.out_features == model.v.out_features == 24 - 2 * heads
    assert count_ops(model, x)[1] == sum(p.numel() for p in model.parameters())


def test_heads_that_were_not_named_are_refused():
    torch.manual_seed(0)
    groups = prunable_groups(Attention(3).eval(), torch.randn(2, 6, 32))
    assert groups.names == ["embed"]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6])
def test_fused_projections_are_never_pruned_wrongly(heads):
    torch.manual_seed(0)
    model, x = Attention(heads, fused=True).eval(), torch.randn(2, 6, 32)
    assert prunable_groups(model, x, num_heads={model.qkv: heads}).names == ["embed"]


def test_width_that_does_not_divide_into_heads():
    torch.manual_seed(0)
    model, x = Attention(1).eval(), torch.randn(2, 6, 32)
    groups = prunable_groups(model, x, num_heads={model.q: 5})
    assert {e.name: e.reason for e in groups.excluded}[
        "q"
    ] == "q: 24 channels do not divide into 5 conv groups or heads"


# --- surgery ----------------------------------------------------------------------------------------------------------


def test_remove_units_refuses():
    case = topology("grouped")
    before = bits(case.model)
    for removed in ({"nope": [0]}, {"0.0": [12]}, {"0.0": [-1]}, {"0.0": range(12)}, {"1.body.1.0": [0, 1, 2]}):
        with pytest.raises(ValueError):
            remove_units(case.groups, removed)
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())


def test_remove_units_keeps_the_right_filters():
    case = topology("plain").copy()
    weight, reader = case.model[0][0].weight.clone(), case.model[1][0].weight.clone()
    remove_units(case.groups, {"0.0": [7, 1, 4, 4]})
    kept = [0, 2, 3, 5, 6]
    assert torch.equal(case.model[0][0].weight, weight[kept])
    assert torch.equal(case.model[1][0].weight, reader[:, kept])


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
    monkeypatch.setattr(verify, "remove_units", lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, x = make_network("plain")
    verify.verify_groups(prunable_groups(model, x, verify=False), x)
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32
