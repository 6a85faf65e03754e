"""Swin and MaxViT of torchvision, and their attention in windows."""

import pytest
import torch
from torch import nn
from torchvision.models import maxvit, swin_transformer

from tp_importance import explicit_attention
from tp_importance.attention.position_bias import ContinuousPositionBias, RelativePositionBias
from tp_importance.attention.windows import ExplicitMaskedAttention, ExplicitWindowAttention, joined, windows
from tp_importance.core.copies import copied

KINDS = {1: swin_transformer.ShiftedWindowAttention, 2: swin_transformer.ShiftedWindowAttentionV2}
SIZES = [(8, 8), (7, 10), (4, 9), (3, 5), (4, 4)]
"""Whole windows, padded ones, one window along an axis, less than one, one."""


def attention(version, shift=(2, 1), training=False, **options):
    torch.manual_seed(0)
    module = KINDS[version](12, [4, 3], list(shift), 3, **options).double()
    for p in module.parameters():
        nn.init.normal_(p)
    return nn.Sequential(module).train(training)


@pytest.mark.parametrize("version", KINDS)
@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (0, 1), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_every_size(version, shift, bias, training):
    old = attention(version, shift, training, qkv_bias=bias, proj_bias=bias, attention_dropout=0.2, dropout=0.3)
    new = copied(old)
    assert list(explicit_attention(new).rewritten) == ["0"] and type(new[0]).__name__ == "ExplicitWindowAttention"
    for size in SIZES:
        x, both = torch.randn(2, *size, 12, dtype=torch.double), []
        for net in (old, new):
            torch.manual_seed(1)
            both.append(net(x))
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", KINDS)
def test_gradients(version):
    old = attention(version)
    new = copied(old)
    explicit_attention(new)
    x = torch.randn(2, 7, 10, 12, dtype=torch.double)
    for net in (old, new):
        (net(x) ** 2).sum().backward()
    old, new = old[0], new[0]
    close = {"rtol": 1e-10, "atol": 1e-9}
    layers = (new.q_proj, new.k_proj, new.v_proj)
    torch.testing.assert_close(old.qkv.weight.grad, torch.cat([m.weight.grad for m in layers]), **close)
    q, k, v = old.qkv.bias.grad.chunk(3)
    torch.testing.assert_close(new.q_proj.bias.grad, q, **close)
    torch.testing.assert_close(new.v_proj.bias.grad, v, **close)
    if version == 1:
        torch.testing.assert_close(
            new.position_bias.table.grad, old.relative_position_bias_table.grad, rtol=1e-10, atol=1e-9
        )
        torch.testing.assert_close(new.k_proj.bias.grad, k, **close)
    else:
        assert new.k_proj.bias is None and not k.any()
        torch.testing.assert_close(new.logit_scale.grad, old.logit_scale.grad, **close)
        torch.testing.assert_close(new.position_bias.mlp[2].weight.grad, old.cpb_mlp[2].weight.grad, **close)


@pytest.mark.parametrize("version", KINDS)
def test_heads_and_dimensions_can_go(version):
    """The middle head goes as if its output were zero, and of the others a dimension of the values."""
    old = attention(version)
    new, x = copied(old), torch.randn(1, 7, 10, 12, dtype=torch.double)
    explicit_attention(new)
    net, keep = new[0], [0, 1, 2, 3, 8, 9, 10, 11]
    values = [i for i in range(8) if i % 4 != 1]
    with torch.no_grad():
        old[0].proj.weight[:, [1, 4, 5, 6, 7, 9]] = 0
        for layer in (net.q_proj, net.k_proj, net.v_proj):
            layer.weight = nn.Parameter(layer.weight[keep])
            layer.bias = None if layer.bias is None else nn.Parameter(layer.bias[keep])
        net.v_proj.weight, net.v_proj.bias = (
            nn.Parameter(net.v_proj.weight[values]),
            nn.Parameter(net.v_proj.bias[values]),
        )
        net.out_proj.weight = nn.Parameter(net.out_proj.weight[:, keep][:, values])
        net.num_heads, net.value_dim = 2, 3
        if version == 1:
            net.position_bias.table = nn.Parameter(net.position_bias.table[:, [0, 2]])
        else:
            net.logit_scale = nn.Parameter(net.logit_scale[[0, 2]])
            net.position_bias.mlp[2].weight = nn.Parameter(net.position_bias.mlp[2].weight[[0, 2]])
        torch.testing.assert_close(new(x), old(x), rtol=1e-12, atol=1e-12)


def test_tables_are_those_of_torchvision():
    first, second = (attention(version)[0] for version in KINDS)
    plain, continuous = RelativePositionBias((4, 3), 3), ContinuousPositionBias((4, 3), 3)
    assert torch.equal(plain.index, first.relative_position_index)
    assert plain.table.shape == first.relative_position_bias_table.shape
    assert torch.equal(continuous.index, second.relative_position_index)
    torch.testing.assert_close(continuous.coordinates, second.relative_coords_table[0].float())


def test_windows_that_somebody_else_has_cut():
    """Those of an image, rolled or not, are those that our own cutting makes."""
    torch.manual_seed(0)
    options = {"window_size": (4, 3), "cosine": True}
    whole, cut = ExplicitWindowAttention(3, 4, **options).double(), ExplicitMaskedAttention(3, 4, **options).double()
    cut.load_state_dict(whole.state_dict())
    x, mask = torch.randn(2, 8, 9, 12, dtype=torch.double), torch.randn(6, 12, 12, dtype=torch.double)
    tokens = windows(x, (4, 3)).flatten(0, 1)
    expected = joined(cut(tokens).unflatten(0, (2, 6)), (4, 3), (8, 9))
    torch.testing.assert_close(whole(x), expected, rtol=1e-12, atol=1e-12)
    expected = joined(cut(tokens, mask).unflatten(0, (2, 6)), (4, 3), (8, 9))
    torch.testing.assert_close(whole(x, mask[:, None]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_maxvit(training):
    torch.manual_seed(0)
    old = nn.Sequential(maxvit.RelativePositionalMultiHeadAttention(12, 4, 9)).double().train(training)
    for p in old.parameters():
        nn.init.normal_(p)
    new, x = copied(old), torch.randn(2, 5, 9, 12, dtype=torch.double)
    assert len(explicit_attention(new, x).rewritten) == 1
    torch.testing.assert_close(new(x), old(x), rtol=1e-12, atol=1e-12)


PARTS = {
    1: (swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging),
    2: (swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2),
}


@pytest.mark.parametrize("version", KINDS)
def test_whole_networks(version):
    torch.manual_seed(0)
    block, merging = PARTS[version]
    sizes = ([4, 4], 8, [2, 2], [2, 4], [4, 4])
    old = swin_transformer.SwinTransformer(*sizes, 2.0, num_classes=5, block=block, downsample_layer=merging)
    old = old.double().eval()
    new, x = copied(old), torch.randn(2, 3, 36, 28, dtype=torch.double)
    report = explicit_attention(new, x)
    assert len(report.rewritten) == 4 and not report.left_out
    torch.testing.assert_close(new(x), old(x), rtol=1e-11, atol=1e-11)
