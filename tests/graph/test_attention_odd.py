"""Attention in unusual forms: parts, learned queries, shared keys, layers that run several times."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.attention_networks import ATTENTION, Separate
from tp_importance import count_ops, prunable_groups
from tp_importance.graph.classes import build_groups
from tp_importance.graph.cost import CostModel
from tp_importance.graph.masking import masked_units
from tp_importance.graph.narrowing import narrowed
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.trace_options import TraceOptions
from tp_importance.graph.tracing import trace
from tp_importance.graph.verify import Passed, masked_equals_removed, sample_units, verify_groups

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    return ATTENTION[name]().eval().to(dtype)


def units(groups):
    return {g.name: (g.width, g.n_units) for g in groups}


class TwoParts(nn.Module):
    """Queries, keys and values of two parts each: dimensions of either may go alone."""

    def __init__(self, scale=None):
        super().__init__()
        self.dims, self.scale = [4, 6], scale
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(12, 2 * d) for d in self.dims) for _ in range(3))
        self.out = nn.Linear(20, 3)

    def heads(self, layers, x):
        parts = [layer(x).view(*x.shape[:2], 2, d) for layer, d in zip(layers, self.dims, strict=True)]
        return torch.cat(parts, -1).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(layers, x) for layers in (self.q, self.k, self.v))
        if self.scale is None:
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Repeated(nn.Module):
    """One layer of attention, several times."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = Separate(12, 2, 6), nn.Linear(12, 3)

    def forward(self, x):
        for _ in range(3):
            x = x + self.layer(x)
        return self.head(x)


@pytest.mark.parametrize("removed", [{"q.0": [1]}, {"q.1": [0, 2, 3]}, {"q.0": [0, 1], "q.1": [5]}], ids=str)
def test_queries_make_up_for_all_dimensions_of_their_attention(removed):
    torch.manual_seed(0)
    net, x = TwoParts().double(), torch.randn(2, 5, 12).double()
    groups = prunable_groups(net, x, attention="dims")
    assert units(groups) == {"q.0": (8, 4), "q.1": (12, 6)}
    assert masked_equals_removed(groups, x, removed) is None
    small = copy.deepcopy(net)
    for name, gone in removed.items():  # one after the other, by what is known of the groups that are left
        for unit in reversed(gone):
            remove_units(groups, {name: [unit]}, model=small)
            groups = narrowed(groups, {name: [unit]})
    at_once = copy.deepcopy(net)
    remove_units(prunable_groups(net, x, attention="dims"), removed, model=at_once)
    torch.testing.assert_close(small(x), at_once(x), rtol=1e-12, atol=1e-12)


def test_queries_of_a_layer_that_runs_several_times_are_multiplied_once():
    torch.manual_seed(0)
    net, x = Repeated().double(), torch.randn(2, 5, 12).double()
    groups = prunable_groups(net, x, attention="dims", ignored_layers=[net.layer.out])
    (queries,) = groups["layer.q"].queries
    assert [m.name for m in queries.filters] == ["layer.q"]
    assert masked_equals_removed(groups, x, {"layer.q": [0]}) is None


def test_what_has_passed_with_another_scale_is_tested_again():
    torch.manual_seed(0)
    net, x, passed = TwoParts(scale=0.3), torch.randn(2, 5, 12), Passed()
    traced = trace(net, x, TraceOptions(attention="dims"))
    (number,) = (i for i, q in enumerate(traced.labels.questions) if any(o.scaled for o in q.options))
    constant, follows = (
        build_groups(traced, options=replace(traced.options, choices=(0,) * number + (answer,))) for answer in (0, 1)
    )
    assert verify_groups(constant, x, passed=passed) == {}
    assert set(verify_groups(follows, x, passed=passed)) == {"q.0", "q.1"}


class Remembered(Separate):
    """It keeps what it adds to the scores once it has computed it."""

    table = None

    def forward(self, x):
        if self.table is None:
            at = torch.arange(x.shape[1])
            self.table = -(at[:, None] - at).abs() > -3
        return super().forward(x) + 0 * self.table.sum()


def test_heads_are_found_where_the_first_pass_fills_a_cache():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 12), Remembered(12, 3, 4), nn.Linear(12, 2))
    groups = prunable_groups(net, torch.randn(2, 5, 3))
    assert units(groups) == {"0": (12, 12), "1.q": (12, 3), "1.out": (12, 12)} and net[1].table is None


class Cross(nn.Module):
    """Attention of one stream to another, or to itself."""

    def __init__(self, width, other, heads, dim):
        super().__init__()
        self.dim, self.q = dim, nn.Linear(width, heads * dim)
        self.k, self.v, self.out = nn.Linear(other, heads * dim), nn.Linear(other, heads * dim), nn.Linear(24, width)

    def forward(self, x, y):
        q, k, v = (t.unflatten(-1, (-1, self.dim)).transpose(1, 2) for t in (self.q(x), self.k(y), self.v(y)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Latents(nn.Module):
    """Learned tokens attend to the inputs, as in Perceiver: a norm sees them before any data."""

    def __init__(self, norm):
        super().__init__()
        self.latents, self.norm, self.attention = nn.Parameter(torch.randn(4, 24)), norm(24), Cross(24, 6, 3, 8)
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 5)

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1)
        latents = latents + self.attention(self.norm(latents), x)
        return self.head((latents + self.down(F.gelu(self.up(latents)))).mean(1))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_learned_tokens_are_a_stream(norm):
    torch.manual_seed(0)
    net, x = Latents(norm).requires_grad_(False), torch.randn(2, 7, 6)  # torch counts no views of parameters
    groups = prunable_groups(net, x)
    assert units(groups) == {"attention.q": (24, 3), "attention.out": (24, 24), "up": (40, 40)}
    small, removed = copy.deepcopy(net), sample_units(groups)
    remove_units(groups, removed, model=small)
    assert small.latents.shape == (4, 24 - len(removed["attention.out"]))
    with torch.no_grad(), masked_units(net, groups, removed):
        torch.testing.assert_close(small(x), net(x))
    widths = {n: groups[n].width - len(u) * groups[n].unit_size for n, u in removed.items()}
    assert CostModel.from_groups(groups).cost(widths).macs == count_ops(small, x)[0] == _macs_of_torch(small, x)


def _macs_of_torch(net, x):
    """Per sample."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            net(x)
    return flops.get_total_flops() / 2 / len(x)


def test_products_of_three_tensors_are_counted():
    class Linear(nn.Module):
        """Attention without a softmax, its products in the order in which they are cheap."""

        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 72), nn.Linear(24, 5)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, -1, 8)).permute(2, 0, 3, 1, 4)
            q, k = F.elu(q) + 1, F.elu(k) + 1
            z = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
            y = torch.einsum("bhnd,bhde,bhn->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v), z)
            return self.out(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net, x = Linear(), torch.randn(2, 7, 6)
    assert count_ops(net, x)[0] == _macs_of_torch(net, x)
    assert units(prunable_groups(net, x)) == {"qkv": (72, 3)}


def test_what_is_added_to_a_product_with_weight_zero_does_not_matter():
    class Merged(nn.Module):
        """Heads are part of the batch, and empty memory stands for a mask that is not there, as in diffusers."""

        def __init__(self):
            super().__init__()
            self.heads, self.scale = 3, 8**-0.5
            self.q, self.k, self.v, self.out = (nn.Linear(*sizes) for sizes in [(6, 24)] * 3 + [(24, 5)])

        def forward(self, x):
            q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
            empty = torch.empty(len(q), q.shape[1], k.shape[1], dtype=q.dtype)
            scores = torch.baddbmm(empty, q, k.mT, beta=0, alpha=self.scale)
            y = torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, self.heads))
            return self.out(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net, x = Merged(), torch.randn(2, 7, 6)
    assert units(prunable_groups(net, x)) == {"q": (24, 3)}


@pytest.mark.parametrize("way", ["einsum", "fused"])
def test_heads_of_queries_that_share_one_head_of_keys(way):
    """Keys and values of a single head stay; their dimensions are no reason for the heads of the queries to."""

    class MultiQuery(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.dim = 4, 6
            self.q, self.kv, self.out = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(24, 16)

        def forward(self, x):
            q = self.q(x).view(*x.shape[:-1], self.heads, self.dim).transpose(1, 2)
            k, v = self.kv(x).split(self.dim, -1)
            if way == "einsum":
                scores = torch.einsum("bhid,bjd->bhij", q, k) * self.dim**-0.5
                y = torch.einsum("bhij,bjd->bhid", scores.softmax(-1), v)
            else:
                k, v = (t[:, None].expand(-1, self.heads, -1, -1) for t in (k, v))
                y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(*x.shape[:-1], self.heads * self.dim))

    torch.manual_seed(0)
    groups = prunable_groups(nn.Sequential(MultiQuery(), nn.Linear(16, 3)).eval(), torch.randn(2, 5, 16))
    assert units(groups) == {"0.q": (24, 4), "0.out": (16, 16)}
    (reason,) = [e.reason for e in groups.excluded if e.kind == "mixed"]
    assert "no whole heads: see attention='dims'" in reason


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("way", ["split", "slices", "kept sizes"])
def test_packed_queries_and_shared_keys_are_cut_at_computed_places(way, attention):
    """As in Falcon and Phi-3: four heads of queries, two of keys and two of values in one projection."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.kv_heads, self.dim = 4, 2, 6
            self.q_size, self.kv_size = 24, 12
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(24, 16)

        def parts(self, x):
            q, kv = self.heads * self.dim, self.kv_heads * self.dim
            if way == "split":
                return x.split([q, kv, kv], -1)
            if way == "slices":
                return x[..., :q], x[..., q : q + kv], x[..., q + kv :]
            return x.split([self.q_size, self.kv_size, self.kv_size], -1)

        def forward(self, x):
            q, k, v = (t.view(*x.shape[:2], -1, self.dim).transpose(1, 2) for t in self.parts(self.qkv(x)))
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    groups = prunable_groups(
        nn.Sequential(Packed(), nn.Linear(16, 3)).eval(), torch.randn(2, 5, 16), attention=attention
    )
    assert units(groups) == {"0.qkv": (48, {"heads": 2, "dims": 6}[attention]), "0.out": (16, 16)}
