"""Attention of vision transformers: against sums written out head by head, and against timm if it is there."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tp_importance import explicit_attention, load_pruned, save_pruned
from tp_importance.attention import tokens as ours
from tp_importance.attention.windows import explicit_shared_bias
from tp_importance.core.copies import copied

SIZE = (5, 7)


class Holder(nn.Module):
    """What the functions look at: layers and rates under the names that timm gives them."""

    def __init__(self, dim, num_heads, **layers):
        super().__init__()
        self.num_heads, self.proj = num_heads, nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        for name, layer in layers.items():
            setattr(self, name, layer)


def heads(x, number):
    return x.chunk(number, -1)


def attended(q, k, v, number):
    """Head by head: softmax(q kᵀ / √d) v."""
    done = []
    for one, two, three in zip(*(heads(t, number) for t in (q, k, v)), strict=True):
        weights = (one @ two.transpose(-2, -1) / one.shape[-1] ** 0.5).softmax(-1)
        done.append(weights @ three)
    return torch.cat(done, -1)


def reduced(old, x):
    keys = x
    if old.sr is not None:
        image = old.pool(x.transpose(1, 2).reshape(len(x), -1, *SIZE))
        keys = old.act(old.norm(old.sr(image).flatten(2).transpose(1, 2)))
    return old.proj(attended(old.q(x), *old.kv(keys).chunk(2, -1), old.num_heads))


def plain(old, x):
    return old.proj(attended(*old.qkv(x).chunk(3, -1), old.num_heads))


def class_token(old, x):
    return old.proj(attended(old.q(x[:, :1]), old.k(x), old.v(x), old.num_heads))


def channels(old, x):
    done = []
    for h, (q, k, v) in enumerate(zip(*(heads(t, old.num_heads) for t in old.qkv(x).chunk(3, -1)), strict=True)):
        products = F.normalize(q, dim=1).transpose(1, 2) @ F.normalize(k, dim=1)
        done.append(v @ (products * old.temperature[h]).softmax(-1).transpose(1, 2))
    return old.proj(torch.cat(done, -1))


def grouped(old, x):
    """Window by window of the padded map, whose zeros take part."""
    image = F.pad(x.unflatten(1, SIZE), (0, 0, 0, -SIZE[1] % old.ws, 0, -SIZE[0] % old.ws))
    out = torch.empty_like(image)
    for i in range(0, image.shape[1], old.ws):
        for j in range(0, image.shape[2], old.ws):
            part = image[:, i : i + old.ws, j : j + old.ws]
            q, k, v = old.qkv(part.flatten(1, 2)).chunk(3, -1)
            out[:, i : i + old.ws, j : j + old.ws] = attended(q, k, v, old.num_heads).view(part.shape)
    return old.proj(out[:, : SIZE[0], : SIZE[1]].flatten(1, 2))


def linears(*names):
    return {name: nn.Linear(12, 12) for name in names}


def grouped_holder():
    made = Holder(12, 3, qkv=nn.Linear(12, 36))
    made.ws = 3
    return made


CASES = {
    "same map": (
        lambda: Holder(12, 3, q=nn.Linear(12, 12, bias=False), kv=nn.Linear(12, 24, bias=False), sr=None),
        ours.explicit_reduced,
        reduced,
    ),
    "smaller map": (
        lambda: Holder(
            12,
            3,
            **linears("q"),
            kv=nn.Linear(12, 24),
            pool=nn.AdaptiveAvgPool2d(3),
            sr=nn.Conv2d(12, 12, 2),
            norm=nn.LayerNorm(12),
            act=nn.GELU(),
        ),
        ours.explicit_reduced,
        reduced,
    ),
    "tokens": (lambda: Holder(12, 3, qkv=nn.Linear(12, 36)), ours.explicit_tokens, plain),
    "groups": (grouped_holder, ours.explicit_groups, grouped),
    "class token": (lambda: Holder(12, 3, **linears("q", "k", "v")), ours.explicit_class_token, class_token),
    "channels": (
        lambda: Holder(12, 3, qkv=nn.Linear(12, 36), temperature=nn.Parameter(torch.ones(3, 1, 1))),
        ours.explicit_channels,
        channels,
    ),
}


def drawn(make):
    torch.manual_seed(0)
    module = make().double()
    for p in module.parameters():
        nn.init.normal_(p)
    return module


@pytest.mark.parametrize("kind", CASES)
def test_written_out(kind):
    make, rewrite, reference = CASES[kind]
    old, x = drawn(make), torch.randn(2, SIZE[0] * SIZE[1], 12, dtype=torch.double)
    new = rewrite(old)
    size = (SIZE,) if kind in ("same map", "smaller map", "groups") else ()
    torch.testing.assert_close(new(x, *size), reference(old, x), rtol=1e-11, atol=1e-11)
    assert (new.num_heads, new.head_dim, new.value_dim) == (3, 4, 4)


@pytest.mark.parametrize("own", [True, False])
def test_shared_biases_of_positions(own):
    """Written out, for tokens of which the first is no pixel: its rows of the table are no relative positions."""
    torch.manual_seed(0)
    old = Holder(12, 3, qkv=nn.Linear(12, 36, bias=False)).double()
    old.q_bias, old.v_bias = nn.Parameter(torch.randn(12).double()), nn.Parameter(torch.randn(12).double())
    old.window_size = (2, 3) if own else None
    old.relative_position_bias_table = nn.Parameter(torch.randn(18, 3).double()) if own else None
    old.relative_position_index = torch.randint(0, 18, (7, 7)) if own else None
    shared, x = torch.randn(3, 7, 7, dtype=torch.double), torch.randn(2, 7, 12, dtype=torch.double)
    q, k, v = old.qkv(x).chunk(3, -1)
    bias, done = shared, []
    if own:
        bias = bias + old.relative_position_bias_table[old.relative_position_index].permute(2, 0, 1)
    parts = (heads(t, 3) for t in (q + old.q_bias, k, v + old.v_bias))
    for h, (one, two, three) in enumerate(zip(*parts, strict=True)):
        done.append((one @ two.transpose(1, 2) / 2 + bias[h]).softmax(-1) @ three)
    new = explicit_shared_bias(old)
    torch.testing.assert_close(
        new(x, shared_rel_pos_bias=shared), old.proj(torch.cat(done, -1)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", CASES)
def test_a_head_can_go(kind):
    """The middle one, as if its output were zero."""
    make, rewrite, _ = CASES[kind]
    old, x = drawn(make), torch.randn(2, SIZE[0] * SIZE[1], 12, dtype=torch.double)
    size = (SIZE,) if kind in ("same map", "smaller map", "groups") else ()
    new, keep = rewrite(old), [0, 1, 2, 3, 8, 9, 10, 11]
    masked = copied(new)
    with torch.no_grad():
        masked.out_proj.weight[:, 4:8] = 0
        for layer in (new.q_proj, new.k_proj, new.v_proj):
            layer.weight = nn.Parameter(layer.weight[keep])
            layer.bias = None if layer.bias is None else nn.Parameter(layer.bias[keep])
        new.out_proj.weight = nn.Parameter(new.out_proj.weight[:, keep])
        new.num_heads = 2
        if kind == "channels":
            new.temperature = nn.Parameter(new.temperature[[0, 2]])
        torch.testing.assert_close(new(x, *size), masked(x, *size), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["tokens", "groups", "class token", "channels"])
def test_checkpoints_take_the_plain_factory(kind, tmp_path):
    make, rewrite, _ = CASES[kind]

    def factory():
        return nn.Sequential(drawn(make))

    model = factory()
    explicit_attention(model, rewriters={Holder: rewrite})
    model[0].scale = 0.3
    save_pruned(model.eval(), tmp_path / "model.pt")
    again, x = load_pruned(factory, tmp_path / "model.pt"), torch.randn(1, SIZE[0] * SIZE[1], 12, dtype=torch.double)
    size = (SIZE,) if kind == "groups" else ()
    assert type(again[0]) is type(model[0]) and torch.equal(again[0](x, *size), model[0](x, *size))


TIMM = {
    "pvt_v2.Attention": ((32, 4), {"sr_ratio": 2}),
    "pvt_v2.Attention, linear": ((32, 4), {"linear_attn": True}),
    "twins.GlobalSubSampleAttn": ((32, 4), {"sr_ratio": 2}),
    "twins.LocallyGroupedAttn": ((32, 4), {"ws": 3}),
    "metaformer.Attention": ((32,), {"head_dim": 8}),
    "davit.WindowAttention": ((32, (4, 4), 4), {}),
    "cait.ClassAttn": ((32, 4), {"qkv_bias": True}),
    "crossvit.CrossAttention": ((32, 4), {}),
    "xcit.XCA": ((32, 4), {"qkv_bias": True}),
    "edgenext.CrossCovarianceAttn": ((32, 4), {}),
    "beit.Attention": ((32, 4), {"qkv_bias": True, "window_size": (3, 5)}),
    "beit.Attention, no table": ((32, 4), {}),
    "swin_transformer_v2.WindowAttention": ((32, (4, 4), 4), {}),
}


@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.parametrize("training", [True, False])
def test_timm(kind, training):
    pytest.importorskip("timm")
    module, _, name = kind.partition(",")[0].partition(".")
    arguments, options = TIMM[kind]
    dropping = {} if "davit" in kind or kind.startswith("twins.Local") else {"attn_drop": 0.2, "proj_drop": 0.3}
    make = getattr(importlib.import_module(f"timm.models.{module}"), name)
    old = nn.Sequential(drawn(lambda: make(*arguments, **options, **dropping))).train(training)
    new = copied(old)
    assert list(explicit_attention(new).rewritten) == ["0"]
    given = [torch.randn(6, 16, 32, dtype=torch.double)]
    if module in ("pvt_v2", "twins"):
        given.append((4, 4))
    found = []
    for net in (old, new):
        torch.manual_seed(1)
        out = net[0](*given)
        out.pow(2).sum().backward()
        found.append((out, net[0].get_parameter("proj.weight" if net is old else "out_proj.weight").grad))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    if module == "beit":
        bias = torch.randn(4, 16, 16, dtype=torch.double)
        both = [net.eval()[0](*given, shared_rel_pos_bias=bias) for net in (old, new)]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    if "swin" in kind:
        mask = torch.where(torch.rand(3, 16, 16) < 0.3, -100.0, 0.0).double()
        torch.testing.assert_close(new.eval()[0](*given, mask), old.eval()[0](*given, mask), rtol=1e-12, atol=1e-12)
