"""Rotary positions and learned biases: against sums written out head by head, and against timm if it is there."""

import pytest
import torch
from torch import nn

from tp_importance import explicit_attention, prunable_groups
from tp_importance.attention.rotary import explicit_positions, explicit_rotary, rotated


def double(*shape):
    return torch.randn(*shape, dtype=torch.double)


@pytest.mark.parametrize("half", [True, False])
def test_rotated_is_a_product_of_complex_numbers(half):
    torch.manual_seed(0)
    x, angle = double(2, 3, 5, 6), double(5, 3)
    pairs = torch.stack([x[..., :3], x[..., 3:]], -1) if half else x.unflatten(-1, (3, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    expected = torch.cat([turned[..., 0], turned[..., 1]], -1) if half else turned.flatten(-2)
    angles = torch.cat([angle, angle], -1) if half else angle.repeat_interleave(2, -1)
    rope = torch.cat([angles.sin(), angles.cos()], -1)
    torch.testing.assert_close(rotated(x, rope, half=half), expected, rtol=1e-12, atol=1e-12)


class Holder(nn.Module):
    """What the functions look at, under the names that timm gives them."""

    def __init__(self, packed):
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.num_prefix_tokens = 3, 4, 0.5, 1
        self.qkv = nn.Linear(12, 36, bias=False) if packed else None
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(12)) if packed else None for _ in range(2))
        self.q_proj, self.v_proj = (None if packed else nn.Linear(12, 12) for _ in range(2))
        self.k_proj = None if packed else nn.Linear(12, 12, bias=False)
        self.q_norm, self.k_norm, self.norm = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(12)
        self.gate = None if packed else nn.Linear(12, 12)
        self.proj = nn.Linear(12, 12)

    def projected(self, x):
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        return q + self.q_bias, k, v + self.v_bias


def attended(old, x, rope=None, bias=None):
    done = []
    for h, (q, k, v) in enumerate(zip(*(t.chunk(3, -1) for t in old.projected(x)), strict=True)):
        q, k = old.q_norm(q), old.k_norm(k)
        if rope is not None:
            q, k = (torch.cat([t[:, :1], rotated(t[:, 1:], rope, half=False)], 1) for t in (q, k))
        products = q @ k.mT * old.scale + (0 if bias is None else bias[h])
        done.append(products.softmax(-1) @ v)
    return torch.cat(done, -1)


@pytest.mark.parametrize("packed", [True, False])
def test_rotary_written_out(packed):
    torch.manual_seed(0)
    old, x, rope = Holder(packed).double(), double(2, 6, 12), double(5, 8)
    expected = old.norm(attended(old, x, rope))
    if old.gate is not None:
        expected = expected * old.gate(x).sigmoid()
    torch.testing.assert_close(explicit_rotary(old)(x, rope=rope), old.proj(expected), rtol=1e-12, atol=1e-12)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(double(3, 6, 6))

    def get_bias(self):
        return self.table


@pytest.mark.parametrize("own", [True, False])
def test_biases_written_out(own):
    torch.manual_seed(0)
    old, x = Holder(packed=True), double(2, 6, 12)
    old.qkv = nn.Linear(12, 36)
    for bias in (old.q_bias, old.v_bias):
        nn.init.zeros_(bias)
    old = old.double()
    old.rel_pos, bias = (Table(), None) if own else (None, double(3, 6, 6))
    expected = old.proj(attended(old, x, bias=old.rel_pos.table if own else bias))
    torch.testing.assert_close(explicit_positions(old)(x, bias), expected, rtol=1e-12, atol=1e-12)


TIMM = {"eva02_tiny_patch14_224": 224, "vit_small_patch16_dinov3": 256, "vit_relpos_small_patch16_224": 224}


@pytest.mark.parametrize("name", TIMM)
def test_heads_and_stream_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5).eval(), torch.randn(1, 3, TIMM[name], TIMM[name])
    before = model(x)
    assert explicit_attention(model, x).rewritten
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    groups = prunable_groups(model, x)
    heads = [g for g in groups if any(m.name.endswith("attn.q_proj") for m in g.producers)]
    assert len(heads) == len(model.blocks) and {g.n_units for g in heads} == {model.blocks[0].attn.num_heads}
    assert "patch_embed.proj" in groups.names and {e.kind for e in groups.excluded} == {"output"}
