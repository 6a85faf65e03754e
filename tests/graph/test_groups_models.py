"""Groups of models in any state and of any form."""

import pytest
import torch
from torch import nn

from helpers.group_cases import EXPECTED, whole
from helpers.networks import TwoInputs
from tp_importance import count_ops, prunable_groups
from tp_importance.errors import TracingError
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed, sample_units
from tp_importance.testing import Snapshot, make_network
from tp_importance.testing.networks import conv_bn_relu, head

# --- whatever state the model is in -----------------------------------------------------------------------------------


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
    snapshot = Snapshot(model)
    assert whole(prunable_groups(model, x, verify=verify)) == EXPECTED["residual"]
    snapshot.check()


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
    snapshot = Snapshot(model)
    with context():
        assert whole(prunable_groups(model, x)) == EXPECTED["residual"]
        assert whole(prunable_groups(model, torch.randn(2, 3, 16, 16))) == EXPECTED["residual"]
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert not torch.is_grad_enabled()
    snapshot.check()


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
    snapshot = Snapshot(model)
    with pytest.raises(TracingError, match=f"could not trace {build.__name__}"):
        prunable_groups(model, x)
    snapshot.check()


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
    assert whole(groups) == {"embed": 24, "v": 24 if heads == 1 else (24, heads, 1)}
    assert {e.name: e.kind for e in groups.excluded}["q"] == "unread"  # no weights read what queries and keys make
    assert groups["v"].removed_channels([1]) == [1 + 24 // heads * h for h in range(heads)]
    assert masked_equals_removed(groups, x, {"v": [0, 3]}) is None
    remove_units(groups, {"v": [0, 3]})
    assert model.v.out_features == model.proj.in_features == 24 - 2 * heads and model.q.out_features == 24
    assert count_ops(model, x)[1] == sum(p.numel() for p in model.parameters())


def test_heads_that_were_not_named_go_as_a_whole():
    torch.manual_seed(0)
    model, x = Attention(3).eval(), torch.randn(2, 6, 32)
    groups = prunable_groups(model, x)
    assert whole(groups) == {"embed": 24, "q": (24, 8, 1)}
    assert [m.name for m in groups["q"].attributes] == ["heads"]
    assert whole(prunable_groups(model, x, attention="none")) == {"embed": 24}
    remove_units(groups, {"q": [1]})
    assert (model.heads, model.q.out_features, model.proj.in_features) == (2, 16, 16) and model(x).shape == (2, 4)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6])
def test_fused_projections_are_never_pruned_wrongly(heads):
    torch.manual_seed(0)
    model, x = Attention(heads, fused=True).eval(), torch.randn(2, 6, 32)
    groups = prunable_groups(model, x, num_heads={model.qkv: heads})
    assert groups.names == ["embed", "qkv"] and groups["qkv"].unit_size % (3 * heads) == 0
    assert masked_equals_removed(groups, x, sample_units(groups)) is None


def test_width_that_does_not_divide_into_heads():
    torch.manual_seed(0)
    model, x = Attention(1).eval(), torch.randn(2, 6, 32)
    groups = prunable_groups(model, x, num_heads={model.q: 5})
    assert {e.name: e.reason for e in groups.excluded}[
        "q"
    ] == "q: 24 channels do not divide into 5 conv groups or heads"


SIZED = {
    "the tensor's shape": (lambda t: t * t.new_ones(t.shape), True),
    "the tensor's width": (lambda t: t * t.new_full((1, t.shape[1], 1, 1), 2.0), True),
    "one axis": (lambda t: t + t.new_zeros(t.shape[1])[None, :, None, None], True),
    "written afterwards": (lambda t: t.new_empty(t.shape).copy_(t), True),
    "a literal": (lambda t: t * t.new_ones((2, 8, 6, 6)), False),
}


@pytest.mark.parametrize("name", SIZED)
def test_tensors_made_in_a_size(name):
    """They hold no channels; what matters is whether their size follows."""
    made, follows = SIZED[name]

    class Between(nn.Sequential):
        def forward(self, x):
            return self[1](made(self[0](x)))

    model = Between(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    groups = prunable_groups(model.eval(), torch.randn(2, 3, 8, 8))
    assert groups.names == (["0"] if follows else [])
    assert {e.name: e.kind for e in groups.excluded} == {"1": "output"} | ({} if follows else {"0": "unverified"})
