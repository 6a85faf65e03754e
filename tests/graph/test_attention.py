"""Heads, dimensions of heads, MLPs and the residual stream of transformers, in the ways in which they are written."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.attention_networks import ATTENTION, Block, Encoder, Packed, Separate
from tp_importance import Budget, count_ops, load_pruned, prunable_groups, prune, save_pruned
from tp_importance.graph.cost import CostModel
from tp_importance.graph.history import PruningHistory, repeat
from tp_importance.graph.masking import masked_units
from tp_importance.graph.narrowing import narrowed
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import sample_units

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HEADS = {
    "packed": (72, 3),
    "packed, fused": (72, 3),
    "separate": (24, 3),
    "grouped queries, rotary": (48, 3),
    "shifted windows": (72, 3),
    "normalised queries": (24, 3),
}
"""Width of the first projection, and units."""
DIMS = {
    "packed": (72, 8),
    "packed, fused": (72, 8),
    "separate": (24, 8),
    "shifted windows": (72, 8),
}


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    return ATTENTION[name]().eval().to(dtype)


def units(groups):
    return {g.name: (g.width, g.n_units) for g in groups}


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_stream_and_mlps_are_groups(name):
    net = made(name)
    groups = prunable_groups(net, X)
    assert {e.kind for e in groups.excluded} <= {"output"}
    found = units(groups)
    assert found.pop("patches") == (24, 24)
    mlps = {n: u for n, u in found.items() if n.endswith(".up")}
    assert set(mlps.values()) == {(40, 40)} and len(mlps) == len(net.blocks)
    attention = {n: u for n, u in found.items() if "attention" in n}
    assert set(attention.values()) == {HEADS[name]} and len(attention) == len(net.blocks)


@pytest.mark.parametrize("name", DIMS)
def test_dimensions_are_units_of_all_heads(name):
    groups = prunable_groups(made(name), X, attention="dims")
    attention = {n: u for n, u in units(groups).items() if "attention" in n}
    assert set(attention.values()) == {DIMS[name]}


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("name", ATTENTION)
def test_removed_is_masked_to_rounding(name, attention):
    """End to end, in the precision itself; the verification by default repeats in float64 what it doubts."""
    net = made(name)
    groups = prunable_groups(net, X, attention=attention)
    assert "patches" in groups.names
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        twin, x, removed = copy.deepcopy(net).to(dtype), X.to(dtype), sample_units(groups, 1)
        small = copy.deepcopy(twin)
        remove_units(groups, removed, model=small)
        with torch.no_grad():
            with masked_units(twin, groups, removed):
                masked = twin(x)
            assert (small(x) - masked).abs().max() <= tolerance * masked.abs().max()
            assert (twin(x) - masked).abs().max() > 1e-3 * masked.abs().max()


def test_pruned_twice_heads_then_dimensions():
    """Both at once would make the cost cubic; one after the other, a network loses both."""
    torch.manual_seed(0)
    net, loader = made("packed"), [torch.randn(32, 3, 16, 16)]
    dense = count_ops(net, X)[0]
    prune(net, X, loader, budget=Budget(macs=0.7), ignored_layers=[net.patches], method="l2", max_pruning_ratio=0.4)
    heads = net.blocks[0].attention.heads
    prune(net, X, loader, budget=Budget(macs=0.7), attention="dims", method="l2", refit="parallel")
    attention = net.blocks[0].attention
    assert heads == attention.heads == 2 and attention.dim < 8 and attention.all == 2 * attention.dim
    assert count_ops(net, X)[0] <= 0.49 * dense


@pytest.mark.parametrize("split", ["reshape", "unflatten"])
def test_as_many_heads_as_dimensions(split):
    """Both numbers are five; each follows its own axis of the shape."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = self.dim = 5
            self.qkv, self.out, self.head = nn.Linear(25, 75), nn.Linear(25, 25), nn.Linear(25, 3)

        def forward(self, x):
            y = self.qkv(x)
            if split == "reshape":
                y = y.reshape(*x.shape[:-1], 3, self.heads, self.dim)
            else:
                y = y.unflatten(-1, (3, self.heads, self.dim))
            q, k, v = y.permute(2, 0, 3, 1, 4)
            return self.head(self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    net, x = Square().eval(), torch.randn(2, 7, 25)
    for attention, left in (("heads", (3, 5)), ("dims", (5, 3))):
        groups, small = prunable_groups(net, x, attention=attention), copy.deepcopy(net)
        assert groups["qkv"].n_units == 5
        remove_units(groups, {"qkv": [1, 4]}, model=small)
        assert (small.heads, small.dim) == left and small(x).shape == (2, 7, 3)


def test_attention_stays_if_asked():
    groups = prunable_groups(made("packed"), X, attention="none")
    assert not [n for n in groups.names if "attention" in n]
    reasons = [e.reason for e in groups.excluded if e.kind == "mixed"]
    assert reasons and all("take part in attention" in r for r in reasons)
    with pytest.raises(ValueError, match="attention='head' must be one of 'heads', 'dims', 'none'"):
        prunable_groups(made("packed"), X, attention="head")


def test_a_head_is_what_it_says():
    """By hand: rows of head 1 of queries, keys and values, and columns of the output projection."""
    net = made("packed")
    small, groups = copy.deepcopy(net), prunable_groups(net, X)
    remove_units(groups, {"blocks.0.attention.qkv": [1]}, model=small)
    gone = {i * 24 + 8 + d for i in range(3) for d in range(8)}
    kept = [i for i in range(72) if i not in gone]
    a, b = net.blocks[0].attention, small.blocks[0].attention
    assert torch.equal(b.qkv.weight, a.qkv.weight[kept]) and torch.equal(b.qkv.bias, a.qkv.bias[kept])
    assert torch.equal(b.proj.weight, a.proj.weight[:, [*range(8), *range(16, 24)]])
    assert (b.heads, b.dim, b.all) == (2, 8, 16) and (a.heads, a.all) == (3, 24)


@pytest.mark.parametrize("name", ["packed", "packed, fused", "separate"])
def test_queries_make_up_for_a_scale_that_follows(name):
    """A constant scale is left alone; what is divided by the root of five dimensions instead of eight is multiplied."""
    net = made(name)
    groups = prunable_groups(net, X, attention="dims")
    group = next(g for g in groups if "blocks.0.attention" in g.name)
    small = copy.deepcopy(net)
    remove_units(groups, {group.name: [0, 3, 7]}, model=small)
    kept = [h * 8 + d for h in range(3) for d in (1, 2, 4, 5, 6)]
    first = (lambda m: m.blocks[0].attention.q) if name == "separate" else (lambda m: m.blocks[0].attention.qkv)
    factor = 1.0 if name == "packed" else (5 / 8) ** 0.5
    torch.testing.assert_close(first(small).weight[:15], first(net).weight[kept] * factor)
    torch.testing.assert_close(first(small).bias[:15], first(net).bias[kept] * factor)
    if name != "separate":
        torch.testing.assert_close(first(small).weight[15:30], first(net).weight[[24 + i for i in kept]])
    assert small.blocks[0].attention.dim == 5


@pytest.mark.parametrize("name", ["packed, fused", "separate"])
def test_histories_repeat_the_scale(name):
    net, twin = made(name), made(name)
    groups = prunable_groups(net, X, attention="dims")
    removed = sample_units(groups)
    history = PruningHistory.of(groups, removed, remove_units(groups, removed))
    for entries, again in ((history.direct, twin), (history.host, made(name))):
        repeat(entries, prunable_groups(again, X, attention="dims"))
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("name", DIMS)
def test_narrowed_groups_are_those_of_the_smaller_network(name, attention):
    net = made(name)
    groups = prunable_groups(net, X, attention=attention)
    removed = {n: u[: max(len(u) // 2, 1)] for n, u in sample_units(groups).items()}
    remove_units(groups, removed)
    left, fresh = narrowed(groups, removed), prunable_groups(net, X, attention=attention)
    for group in fresh:
        twin = left[group.name]
        for a, b in zip(group.dimensions, twin.dimensions, strict=True):
            assert (a.name, a.width, a.channels.tolist(), a.units.tolist()) == (
                b.name, b.width, b.channels.tolist(), b.units.tolist(),
            )  # fmt: skip
        assert [s.groups for s in group.statistics] == [s.groups for s in twin.statistics]


@pytest.mark.parametrize("name", ["packed", "separate", "shifted windows", "normalised queries"])
def test_the_cost_is_that_of_torch(name):
    """Half of the floating-point operations that torch counts, to the unit, before and after."""
    net = made(name)
    groups = prunable_groups(net, X)
    model = CostModel.from_groups(groups)
    for removed in ({}, sample_units(groups)):
        small = copy.deepcopy(net)
        remove_units(groups, removed, model=small)
        # FlopCounterMode does not know the fused kernel of the CPU
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
            with FlopCounterMode(display=False) as flops:
                small(X)
            macs, params = count_ops(small, X)
        assert 2 * len(X) * macs == flops.get_total_flops()
        widths = {n: groups[n].width - len(u) * groups[n].unit_size for n, u in removed.items()}
        assert (model.cost(widths).macs, model.cost(widths).params) == (macs, params)


def test_products_can_be_left_out_of_the_cost():
    net = made("packed")
    with_products = CostModel.from_groups(prunable_groups(net, X)).dense.macs
    without = CostModel.from_groups(prunable_groups(net, X, count_attention=False)).dense.macs
    assert with_products - without == 2 * 2 * 3 * 8 * 17 * 17  # blocks, QKᵀ and AV, heads, dimensions, pairs
    assert without == count_ops(net, X, attention=False)[0]
    report = prune(net, X, budget=Budget(macs=0.5), method="l2", refit=None, count_attention=False).report
    assert report.dense.macs == without and report.cost.macs == count_ops(net, X, attention=False)[0]


def test_positions_that_do_not_count_are_no_channels():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.attention = nn.Embedding(50, 24), Separate(24, 3, 8)
            self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

        def forward(self, ids, counts):
            x = self.words(ids)
            x = self.norm(x + self.attention(x, counts))
            return self.head((x * counts[..., None]).sum(1) / counts.sum(1, keepdim=True))

    torch.manual_seed(0)
    inputs = {"ids": torch.randint(0, 50, (2, 9)), "counts": torch.arange(9) < torch.tensor([[9], [5]])}
    groups = prunable_groups(Padded(), inputs)
    assert units(groups) == {"attention.q": (24, 3), "attention.out": (24, 24)}
    assert "words" in [m.name for m in groups["attention.out"].members]


def test_an_embedding_shares_its_weight_with_the_head():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.block = nn.Embedding(50, 24), Block(Packed(24, 3, 8, fused=True), 24, 40)
            self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 50, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.norm(self.block(self.words(ids))))

    torch.manual_seed(0)
    net, ids = Language(), torch.randint(0, 50, (2, 9))
    result = prune(net, ids, budget=Budget(params=0.5), method="l2", refit=None)
    assert net.head.weight is net.words.weight and net.head.in_features == net.words.embedding_dim < 24
    assert result.report.cost.params == sum(p.numel() for p in net.parameters())


def test_a_pruned_transformer_is_saved_and_loaded(tmp_path):
    net = made("packed, fused")
    result = prune(net, X, budget=Budget(macs=0.4), method="l2", refit=None)
    assert result.report.cost.macs <= 0.4 * result.report.dense.macs
    save_pruned(net, tmp_path / "net.pt")
    torch.testing.assert_close(load_pruned(lambda: made("packed, fused"), tmp_path / "net.pt")(X), net(X))


def test_the_least_is_a_few_percent():
    torch.manual_seed(0)
    net = Encoder(*(Block(Packed(48, 6, 8, fused=False), 48, 96) for _ in range(2)), width=48)
    groups = prunable_groups(net, X)
    model = CostModel.from_groups(groups)
    least = model.cost({g.name: g.min_units * g.unit_size for g in groups})
    assert least.macs < 0.05 * model.dense.macs
