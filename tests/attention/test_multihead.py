"""Attention of torch and ours compute the same, with every option, in training as well."""

import itertools

import pytest
import torch
from torch import nn

from tp_importance import explicit_attention
from tp_importance.attention.multihead import ExplicitMultiheadAttention
from tp_importance.core.copies import copied

N, L, S, HEADS, WIDTH = 3, 4, 5, 4, 8
WIDTHS = {"self": {}, "cross": {}, "other widths": {"kdim": 6, "vdim": 7}}
MASKS = ("none", "bool", "numbers", "bool per head", "numbers per head", "causal")
PADDING = ("none", "bool", "numbers")


def drawn(*size, dtype=torch.double):
    return torch.randn(size, dtype=dtype)


def rewritten(old, training=False):
    """A copy of an attention in a network, rewritten."""
    net = nn.Sequential(copied(old)).train(training)
    assert explicit_attention(net).rewritten == {"0": "torch.nn.modules.activation.MultiheadAttention"}
    return net[0]


def inputs(kind, batch_first, batched):
    rows = [L, L, L] if kind == "self" else [L, S, S]
    widths = [WIDTH, 6, 7] if kind == "other widths" else [WIDTH] * 3
    made = []
    for n, width in zip(rows, widths, strict=True):
        made.append(drawn(*((N, n) if batch_first else (n, N)), width) if batched else drawn(n, width))
    return made[:1] * 3 if kind == "self" else made


def mask(kind, rows, columns, heads):
    size = (heads, rows, columns) if "per head" in kind else (rows, columns)
    if kind == "causal":
        return torch.ones(rows, columns, dtype=torch.bool).triu(1)
    if "numbers" in kind:
        return drawn(*size)
    masked = torch.rand(size) < 0.4
    masked[..., 0] = False  # a query that may look nowhere gives NaN
    return masked


def options(kind, batched):
    columns, heads = L if kind == "self" else S, HEADS * (N if batched else 1)
    for what, padded, weights, average in itertools.product(MASKS, PADDING, (True, False), (True, False)):
        given = {"need_weights": weights, "average_attn_weights": average}
        if what != "none":
            given["attn_mask"] = mask(what, L, columns, heads)
            given["is_causal"] = what == "causal"
        if padded != "none" and (
            "attn_mask" not in given or given["attn_mask"].is_floating_point() == (padded != "bool")
        ):
            given["key_padding_mask"] = mask(padded, N, columns, 1) if batched else mask(padded, 1, columns, 1)[0]
        yield given


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", WIDTHS)
def test_every_option(kind, batch_first, batched):
    torch.manual_seed(0)
    for bias, training in ((True, True), (False, False)):
        old = nn.MultiheadAttention(WIDTH, HEADS, 0.3, bias, batch_first=batch_first, **WIDTHS[kind]).double()
        for p in old.parameters():
            nn.init.normal_(p)
        new, x = rewritten(old, training), inputs(kind, batch_first, batched)
        old.train(training)
        for given in options(kind, batched):
            torch.manual_seed(1)
            expected = old(*x, **given)
            torch.manual_seed(1)
            found = new(*x, **given)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert found[0].stride() == expected[0].stride() or not training


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("weights", [True, False])
def test_gradients(kind, weights):
    torch.manual_seed(0)
    old = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **WIDTHS[kind]).double()
    new = rewritten(old)
    found = []
    for module in (old, new):
        torch.manual_seed(1)
        x = [t.requires_grad_() for t in inputs(kind, True, True)]
        out, seen = module(*x, need_weights=weights)
        ((out**3).sum() + (0 if seen is None else (seen**2).sum())).backward()
        found.append([t.grad for t in x])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)
    layers = (new.q_proj, new.k_proj, new.v_proj)
    torch.testing.assert_close(old.in_proj_bias.grad, torch.cat([m.bias.grad for m in layers]))
    packed = old.in_proj_weight is not None
    weights = old.in_proj_weight.grad.chunk(3) if packed else [getattr(old, f"{p}_proj_weight").grad for p in "qkv"]
    for layer, weight in zip(layers, weights, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight)
    torch.testing.assert_close(new.out_proj.weight.grad, old.out_proj.weight.grad)


def encoder(batch_first=True, norm_first=False, bias=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first, norm_first=norm_first, bias=bias)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first and bias).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Support for mismatched")
@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"batch_first": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_encoders_of_torch(settings, grad, training):
    old = encoder(**settings)
    new, x = copied(old), drawn(3, 6, 16)
    assert len(explicit_attention(new, (x,)).rewritten) == 2
    padded = torch.arange(6) >= torch.tensor([[6], [4], [3]])
    if settings.get("batch_first") is False:
        x = x.transpose(0, 1)
    old.train(training)
    new.train(training)
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.double)
    for given in ({}, {"src_key_padding_mask": padded}, {"mask": causal}, {"mask": causal, "is_causal": True}):
        both = []
        for model in (old, new):
            torch.manual_seed(1)
            with torch.set_grad_enabled(grad):
                both.append(model(x, **given))
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    torch.manual_seed(0)
    old = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double().eval()
    new = rewritten(old)
    x = torch.nested.as_nested_tensor([drawn(4, WIDTH), drawn(2, WIDTH)])
    with torch.no_grad():
        expected, found = old(x, x, x, need_weights=False)[0], new(x, x, x, need_weights=False)[0]
    for a, b in zip(expected.unbind(), found.unbind(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="self-attention without masks"):
        new(x, x, x, attn_mask=torch.zeros(4, 4))


def test_decoders_and_whole_transformers():
    torch.manual_seed(0)
    old = nn.Transformer(16, 4, 1, 1, 24, batch_first=True).double()
    new, x = copied(old), (drawn(2, 5, 16), drawn(2, 3, 16))
    assert set(explicit_attention(new, x).rewritten) == {
        *("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn")
    }
    with torch.no_grad():
        torch.testing.assert_close(new.eval()(*x), old.eval()(*x), rtol=1e-12, atol=1e-12)


def cut(layer, rows=None, columns=None):
    """Keep some rows or columns of a linear layer."""
    if rows is not None:
        layer.weight, layer.bias = nn.Parameter(layer.weight[rows]), nn.Parameter(layer.bias[rows])
        layer.out_features = len(rows)
    if columns is not None:
        layer.weight, layer.in_features = nn.Parameter(layer.weight[:, columns]), len(columns)


def test_heads_and_dimensions_can_go():
    """A head goes as if its output were zero; values lose a dimension, and queries and keys another number of them."""
    torch.manual_seed(0)
    old = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    new, x = rewritten(old), drawn(2, 5, 12)
    keep, values, queries = [0, 1, 2, 3, 8, 9, 10, 11], [0, 2, 3, 4, 6, 7], [0, 2, 4, 6]
    with torch.no_grad():
        old.out_proj.weight[:, 4:8] = 0
        for layer in (new.q_proj, new.k_proj, new.v_proj):
            cut(layer, rows=keep)
        cut(new.out_proj, columns=keep)
        new.num_heads = 2
        torch.testing.assert_close(new(x, x, x)[0], old(x, x, x)[0], rtol=1e-12, atol=1e-12)
        old.out_proj.weight[:, [1, 9]] = 0
        cut(new.v_proj, rows=values)
        cut(new.out_proj, columns=values)
        new.value_dim = 3
        for half in (0, 12):
            old.in_proj_weight[[half + i for i in (1, 3, 9, 11)]] = 0
            old.in_proj_bias[[half + i for i in (1, 3, 9, 11)]] = 0
        cut(new.q_proj, rows=queries)
        cut(new.k_proj, rows=queries)
        new.head_dim = 2
        torch.testing.assert_close(new(x, x, x)[0], old(x, x, x)[0], rtol=1e-12, atol=1e-12)
    assert (new.embed_dim, new.kdim, new.vdim) == (12, 12, 12)


def test_what_does_not_fit_is_said():
    attention, x = ExplicitMultiheadAttention(2, 4, batch_first=True), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(3, 3\) or \(4, 3, 3\), not \(3, 4\)"):
        attention(x, x, x, attn_mask=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 3\), not \(3, 2\)"):
        attention(x, x, x, key_padding_mask=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="3 dimensions each"):
        attention(x, x[0], x)
    with pytest.raises(RuntimeError, match="give the mask, too"):
        attention(x, x, x, is_causal=True)
