"""The zoo's judge on norms and attention: networks cut by hand, rightly and wrongly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision")

from benchmarks.zoo.embedding import difference
from benchmarks.zoo.norms import Foreign, over_kept, positions, recorded
from benchmarks.zoo.own.diffusion import TimedBlock
from benchmarks.zoo.own.transformers import PermutedConvNeXt, WordTransformer
from benchmarks.zoo.scramble import scramble


def seeded(build, *inputs):
    """A network with distinct values, and a function that runs it in its own precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build().eval()
        for p in net.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=1 / math.sqrt(p.shape[1]))  # attention must be far from uniform
    scramble(net, lambda: net(*inputs), torch.Generator().manual_seed(0))

    def run(model):
        like = next(model.parameters()).dtype
        return model(*(x.to(like) if x.is_floating_point() else x for x in inputs))

    return net, run


def cut(dense, cuts):
    """A copy that keeps positions along axes of its tensors: (name, axis, positions) each."""
    pruned = copy.deepcopy(dense)
    for name, axis, kept in cuts:
        owner, _, key = name.rpartition(".")
        module = pruned.get_submodule(owner)
        values = getattr(module, key).detach().index_select(axis, torch.as_tensor(kept))
        setattr(module, key, nn.Parameter(values) if key in module._parameters else values)
    return pruned


def computes_something_else(dense, pruned, run):
    """The judge sees it in the output, or in front of a norm; all tensors are parts of the dense ones."""
    found = difference(dense, pruned, run) or ""
    return "is off by" in found or found.endswith("reduces is no part of what the dense one does")


def rows(units, size):
    """Positions of units of ``size`` neighbours."""
    return [size * u + i for u in units for i in range(size)]


def numbers(n, *shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))


# Norms written out, rotary embedding, grouped-query attention -----------------------------------------------------

STREAM, HIDDEN, KV_HEADS, DIMS = [0, 2, 3, 7, 8, 11], [1, 2, 5], [1, 2], [0, 2, 4, 6]
WORDS = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(1))


def text():
    return seeded(lambda: WordTransformer(12, heads=6, kv_heads=3, dim=8, hidden=7, depth=2, words=20), WORDS)


def stream_cuts(kept, norm=None):
    yield from (("embed.weight", 1, kept), ("head.weight", 1, kept), ("norm.weight", 0, kept))
    for b in ("blocks.0", "blocks.1"):
        yield from ((f"{b}.{n}.weight", 1, kept) for n in ("attention.q", "attention.k", "attention.v", "gate", "up"))
        yield from ((f"{b}.{n}.weight", 0, kept) for n in ("attention.out", "down"))
        yield from ((f"{b}.{n}.weight", 0, norm or kept) for n in ("norm1", "norm2"))


def head_cuts(block, kv_heads, written=None, size=8):
    """Key and value heads with the two query heads of each; ``written`` are the heads that the last layer reads."""
    queries, read = ([2 * h + i for h in heads for i in range(2)] for heads in (kv_heads, written or kv_heads))
    yield (f"{block}.attention.q.weight", 0, rows(queries, size))
    yield from ((f"{block}.attention.{n}.weight", 0, rows(kv_heads, size)) for n in ("k", "v"))
    yield (f"{block}.attention.out.weight", 1, rows(read, size))


def dim_cuts(block, dims, heads=6, kv_heads=3, size=8):
    yield (f"{block}.attention.frequencies", 0, [d for d in dims if d < size // 2])
    for n, of in (("q", heads), ("k", kv_heads)):
        yield (f"{block}.attention.{n}.weight", 0, [size * h + d for h in range(of) for d in dims])


def fewer_heads(attention, kv_heads):
    attention.heads, attention.kv_heads = 2 * len(kv_heads), len(kv_heads)


@torch.no_grad()
def fold(weight, new, old):
    weight.mul_(math.sqrt(new / old))


def test_the_stream_of_a_transformer_with_written_norms():
    dense, run = text()
    assert difference(dense, cut(dense, stream_cuts(STREAM)), run) is None
    wrong = cut(dense, stream_cuts(STREAM, norm=[0, 2, 3, 7, 8, 10]))
    assert computes_something_else(dense, wrong, run)


def test_statistics_over_all_channels_are_wrong():
    dense, run = text()
    pruned = cut(dense, stream_cuts(STREAM))
    for name, p in pruned.named_parameters():
        if "norm" in name:
            with torch.no_grad():
                p.mul_(math.sqrt(12 / len(STREAM)))  # as if the squares had been divided by the old width
    assert computes_something_else(dense, pruned, run)


def test_heads_go_with_their_columns():
    dense, run = text()
    good = cut(dense, head_cuts("blocks.0", KV_HEADS))
    fewer_heads(good.blocks[0].attention, KV_HEADS)
    assert difference(dense, good, run) is None
    wrong = cut(dense, head_cuts("blocks.0", KV_HEADS, written=[0, 2]))
    fewer_heads(wrong.blocks[0].attention, KV_HEADS)
    assert computes_something_else(dense, wrong, run)
    # queries that are given to the keys of other heads
    swapped = cut(dense, head_cuts("blocks.0", KV_HEADS))
    fewer_heads(swapped.blocks[0].attention, KV_HEADS)
    swapped.blocks[0].attention.q.weight.data = swapped.blocks[0].attention.q.weight.data.roll(16, 0)
    assert computes_something_else(dense, swapped, run)


def test_dimensions_go_in_pairs_and_their_scale_is_made_up_for():
    dense, run = text()
    pruned = cut(dense, dim_cuts("blocks.0", DIMS))
    assert computes_something_else(dense, pruned, run)  # scaled by the new size
    fold(pruned.blocks[0].attention.q.weight, 4, 8)
    assert difference(dense, pruned, run) is None
    fold(pruned.blocks[0].attention.q.weight, 4, 8)
    assert computes_something_else(dense, pruned, run)
    torn = cut(dense, dim_cuts("blocks.0", [0, 2, 5, 7]))  # halves of pairs
    fold(torn.blocks[0].attention.q.weight, 4, 8)
    assert computes_something_else(dense, torn, run)


def test_everything_of_a_transformer_at_once():
    dense, run = text()
    pruned = cut(dense, stream_cuts(STREAM))
    for b in ("blocks.0", "blocks.1"):
        pruned = cut(pruned, head_cuts(b, KV_HEADS))
        pruned = cut(pruned, dim_cuts(b, DIMS, heads=4, kv_heads=2))
        pruned = cut(pruned, [(f"{b}.{n}.weight", int(n == "down"), HIDDEN) for n in ("gate", "up", "down")])
    for block in pruned.blocks:
        fewer_heads(block.attention, KV_HEADS)
        fold(block.attention.q.weight, 4, 8)
    assert difference(dense, pruned, run) is None
    fold(pruned.blocks[1].attention.q.weight, 3, 4)
    assert computes_something_else(dense, pruned, run)


def test_a_norm_that_is_gone_is_missed():
    dense, run = text()
    pruned = cut(dense, stream_cuts(STREAM))
    pruned.norm.forward = lambda x: x * pruned.norm.weight
    assert computes_something_else(dense, pruned, run)
    x, calls = recorded(lambda: numbers(3, 4).mean(1))
    with pytest.raises(Foreign, match="it computes mean where the dense network computes std"):
        over_kept(lambda: numbers(3, 5).std(1), calls, 1e-5)
    with pytest.raises(Foreign, match="it computes nothing where the dense network computes mean"):
        over_kept(lambda: (numbers(3, 4).mean(1), numbers(3, 4).mean(1)), calls, 1e-5)
    with pytest.raises(Foreign, match="it computes more means, variances and norms than the dense network"):
        over_kept(lambda: x, calls, 1e-5)


def test_tensors_that_kept_their_shape_must_have_kept_their_values():
    dense, run = text()
    pruned = cut(dense, stream_cuts(STREAM))
    with torch.no_grad():
        pruned.head.bias[0] += 0.5
    assert computes_something_else(dense, pruned, run)


# Packed projections, layer norms, a class token -------------------------------------------------------------------


class PackedAttention(nn.Module):
    """Queries, keys and values from one matrix, (in, out) or (out, in); they may be normed."""

    def __init__(self, width, heads, dim, by_column, normed):
        super().__init__()
        self.heads, self.dim, self.by_column, self.normed = heads, dim, by_column, normed
        made = 3 * heads * dim
        self.weight = nn.Parameter(torch.empty(*((width, made) if by_column else (made, width))))
        self.bias = nn.Parameter(torch.zeros(made))
        self.out = nn.Linear(heads * dim, width)
        self.q_norm, self.k_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x):
        y = x @ self.weight + self.bias if self.by_column else F.linear(x, self.weight, self.bias)
        q, k, v = y.unflatten(-1, (3, self.heads, self.dim)).permute(2, 0, 3, 1, 4)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Patches(nn.Module):
    """A small vision transformer over patches that are there already."""

    def __init__(self, by_column=False, normed=False):
        super().__init__()
        self.embed, self.token = nn.Linear(5, 12), nn.Parameter(torch.zeros(1, 1, 12))
        self.position = nn.Parameter(torch.zeros(1, 5, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention, self.head = PackedAttention(12, 4, 6, by_column, normed), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        x = x + self.attention(self.norm1(x))
        return self.head(self.norm2(x)[:, 0])


KEPT = [0, 1, 4, 6, 9, 10, 11]


def cut_patches(dense, heads, dims, read=None, kept=KEPT, token=None):
    by_column = dense.attention.by_column
    made = [24 * i + 6 * h + d for i in range(3) for h in heads for d in dims]
    pruned = cut(
        dense,
        [
            *(("embed.weight", 0, kept), ("embed.bias", 0, kept), ("token", 2, token or kept), ("position", 2, kept)),
            *((f"{n}.{t}", 0, kept) for n in ("norm1", "norm2") for t in ("weight", "bias")),
            *(("attention.weight", int(by_column), made), ("attention.weight", int(not by_column), kept)),
            *(("attention.bias", 0, made), ("attention.out.weight", 0, kept), ("attention.out.bias", 0, kept)),
            ("attention.out.weight", 1, [6 * h + d for h in read or heads for d in dims]),
            *((f"attention.{n}_norm.weight", 0, dims) for n in "qk"),
            ("head.weight", 1, kept),
        ],
    )
    pruned.attention.heads, pruned.attention.dim = len(heads), len(dims)
    for norm in (pruned.norm1, pruned.norm2, pruned.attention.q_norm, pruned.attention.k_norm):
        norm.normalized_shape = (len(norm.weight),)
    return pruned


def fold_queries(attention, new, old):
    n = attention.heads * attention.dim
    if attention.normed:
        return fold(attention.q_norm.weight, new, old)
    weight = attention.weight[:, :n] if attention.by_column else attention.weight[:n]
    for t in (weight, attention.bias[:n]):
        fold(t, new, old)
    return None


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_packed_projections(by_column, normed):
    dense, run = seeded(lambda: Patches(by_column, normed), numbers(3, 4, 5))
    assert difference(dense, cut_patches(dense, [0, 3], range(6)), run) is None
    assert computes_something_else(dense, cut_patches(dense, [0, 3], range(6), read=[0, 2]), run)
    pruned = cut_patches(dense, [0, 1, 3], [0, 1, 3, 5])
    assert computes_something_else(dense, pruned, run)
    fold_queries(pruned.attention, 4, 6)
    assert difference(dense, pruned, run) is None
    fold_queries(pruned.attention, 5, 6)
    assert computes_something_else(dense, pruned, run)


def test_a_factor_on_keys_or_values_is_seen():
    dense, run = seeded(Patches, numbers(3, 4, 5))
    pruned = cut_patches(dense, [0, 1, 3], [0, 1, 3, 5])
    fold(pruned.attention.weight[-12:], 4, 6), fold(pruned.attention.bias[-12:], 4, 6)
    assert computes_something_else(dense, pruned, run)
    pruned.attention.weight.data[5, 2] += 0.5
    found = difference(dense, pruned, run)
    assert found == "the values of attention.weight are not found in the dense tensor"


def test_the_class_token_belongs_to_the_stream():
    dense, run = seeded(Patches, numbers(3, 4, 5))
    wrong = cut_patches(dense, range(4), range(6), token=[0, 1, 4, 6, 9, 10, 8])
    assert computes_something_else(dense, wrong, run)


# Group norms ------------------------------------------------------------------------------------------------------


class WrittenGroupNorm(nn.Module):
    def __init__(self, groups, width):
        super().__init__()
        self.num_groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        y = x.unflatten(1, (self.num_groups, -1))
        variance, mean = torch.var_mean(y, (2, 3, 4), keepdim=True, correction=0)
        y = ((y - mean) / torch.sqrt(variance + 1e-5)).flatten(1, 2)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class Timed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.block = TimedBlock(4, 16, 5, 4)
        self.block.norm2 = norm(4, 16)

    def forward(self, x, t):
        return self.block(x, t)


def cut_timed(dense, kept, groups):
    pruned = cut(
        dense,
        [
            *((f"block.{n}.{t}", 0, kept) for n in ("conv1", "time", "norm2") for t in ("weight", "bias")),
            ("block.conv2.weight", 1, kept),
        ],
    )
    pruned.block.norm2.num_groups, pruned.block.norm2.num_channels = groups, len(kept)
    return pruned


@pytest.mark.parametrize("norm", [nn.GroupNorm, WrittenGroupNorm])
def test_group_norms_lose_whole_groups_or_as_much_of_each(norm):
    dense, run = seeded(lambda: Timed(norm), numbers(2, 4, 6, 6), numbers(2, 5))
    assert difference(dense, cut_timed(dense, [0, 1, 2, 3, 8, 9, 10, 11], 2), run) is None
    assert difference(dense, cut_timed(dense, [0, 1, 2, 5, 6, 7, 8, 9, 11, 12, 14, 15], 4), run) is None
    across = cut_timed(dense, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13], 4)
    assert computes_something_else(dense, across, run)
    as_before = cut_timed(dense, [0, 1, 2, 3, 8, 9, 10, 11], 4)
    assert computes_something_else(dense, as_before, run)


# Layer norms over channels, behind permutations and written out ----------------------------------------------------


def test_the_stages_of_a_convnext():
    dense, run = seeded(lambda: PermutedConvNeXt((6, 8), depth=1), numbers(2, 3, 16, 16))
    kept = [0, 2, 3, 5]

    def pruned(norm):
        vectors = ("stem.0", "stages.0.0.depthwise", "pools.0.0", "stages.0.0.norm")
        net = cut(
            dense,
            [
                *((f"{n}.{t}", 0, kept) for n in vectors for t in ("weight", "bias")),
                *((f"stem.1.{t}", 0, norm) for t in ("weight", "bias")),
                *(("stages.0.0.up.weight", 1, kept), ("stages.0.0.down.weight", 0, kept)),
                *(("stages.0.0.down.bias", 0, kept), ("stages.0.0.scale", 0, kept), ("pools.0.1.weight", 1, kept)),
            ],
        )
        net.stages[0][0].depthwise.groups, net.stages[0][0].norm.normalized_shape = 4, (4,)
        return net

    assert difference(dense, pruned(kept), run) is None
    assert computes_something_else(dense, pruned([0, 2, 3, 4]), run)


# Where a part lies ------------------------------------------------------------------------------------------------


def test_positions_along_two_axes_and_of_equal_slices():
    x = numbers(3, 5, 4, 6)
    part = x[:, [0, 3]][..., [1, 2, 5]] * (1 + 1e-7)
    found = positions(x, part, 1e-5)
    assert {axis: at.tolist() for axis, at in found.items()} == {1: [0, 3], 3: [1, 2, 5]}
    x[:, [1, 2]] = 0.0
    assert positions(x, x[:, [0, 1, 2, 4]], 1e-5)[1].tolist() == [0, 1, 2, 4]
    assert positions(x, x[:, [0, 1, 4]] + 0.1, 1e-5) is None
    assert positions(x, numbers(3, 6, 4, 6), 1e-5) is None
