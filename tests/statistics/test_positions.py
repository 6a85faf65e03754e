"""Padding: statistics and refits of padded sequences are those of the sequences alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tp_importance import Budget, Refit, count_ops, prunable_groups, prune
from tp_importance.core.positions import PaddedForward, counted_positions, with_positions
from tp_importance.methods.itpruner.grams import GramStatistics
from tp_importance.refitting.refit import refit_consumers
from tp_importance.statistics.consumers import ConsumerStatistics
from tp_importance.statistics.observe import observe

LENGTH = 6


class Encoder(nn.Module):
    """One block with attention over the tokens that are no padding."""

    def __init__(self):
        super().__init__()
        self.heads, self.dim = 3, 4
        self.embed, self.norm1, self.norm2 = nn.Embedding(40, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.f1, self.f2, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        (b, n, _), h, d = x.shape, self.heads, self.dim
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[:, None, None] != 0)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, n, h * d))
        x = x + self.f2(F.gelu(self.f1(self.norm2(x))))
        return self.head(x[:, 0])


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder().double().eval()


def batches(padding, count=3):
    """Sequences of one length per batch, with padding behind them of another token per sequence."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in range(LENGTH - count + 1, LENGTH + 1):
        ids = torch.randint(30, (16, length), generator=generator)
        labels = torch.arange(16) % 3
        mask = torch.ones(16, length, dtype=torch.long)
        if padding:
            ids = torch.cat([ids, torch.randint(30, 40, (16, LENGTH + 3 - length))], 1)
            mask = F.pad(mask, (0, LENGTH + 3 - length))
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def groups_of(net):
    return prunable_groups(net, {k: v for k, v in batches(False)[-1].items() if k != "labels"})


@pytest.mark.parametrize("by", ["attention_mask", "function"])
def test_moments_and_energies_are_those_of_the_tokens(net, by):
    groups, found = groups_of(net), []
    example = {k: v for k, v in batches(False)[-1].items() if k != "labels"}
    for padding in (False, True):
        statistics, loader, forward = ConsumerStatistics(groups, positions=None), batches(padding), None
        if by == "function":  # other keys
            loader = [((b["input_ids"], b["attention_mask"]), b["labels"]) for b in loader]
            forward = PaddedForward(lambda batch: batch[0][1]) if padding else lambda m, b: m(*b[0])

        def before(labels, statistics=statistics):
            statistics.labels = labels

        shown = example if by == "attention_mask" else loader[0]
        with statistics.sums(shown, forward):
            observe(net, loader, statistics.watches(), forward_fn=forward, before_batch=before)
        found.append(statistics)
    for member in (m for g in groups for m in g.consumers):
        plain, padded = (s.moments(member.name) for s in found)
        assert plain.rows == padded.rows
        torch.testing.assert_close(padded.total(), plain.total())
        torch.testing.assert_close(padded.between(), plain.between())
        assert found[1].energy(member.name) == pytest.approx(found[0].energy(member.name), rel=1e-9)
        assert found[1].samples(padded) == found[0].samples(plain) == 48


@pytest.mark.parametrize("pool", [False, True])
def test_dependence_of_layers_is_that_of_the_tokens(net, pool):
    found = []
    for padding in (False, True):
        grams = GramStatistics(groups_of(net), kernel="linear", estimator="biased", pool=pool)
        observe(
            net, batches(padding), grams.watches(), before_batch=lambda labels, grams=grams: grams.begin(len(labels))
        )
        found.append(torch.from_numpy(grams.nhsic()))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_without_it_padding_counts(net):
    groups, found = groups_of(net), []
    for forward in (None, lambda m, b: m(b[0], b[1])):
        statistics = ConsumerStatistics(groups, positions=None)
        loader = batches(True)
        if forward is not None:
            loader = [(b["input_ids"], b["attention_mask"]) for b in loader]
        observe(net, loader, statistics.watches(), forward_fn=forward, need_labels=False)
        found.append(statistics.moments("f1").rows)
    assert found == [16 * (4 + 5 + 6), 16 * 3 * 9]


def test_sampled_positions_are_of_tokens(net):
    groups = groups_of(net)
    statistics = ConsumerStatistics(groups, positions=4)
    seen, moments = [], statistics._moments["f1"]
    update = moments.update
    moments.update = lambda rows, labels: (seen.append(rows), update(rows, labels))
    inputs = []
    handle = net.f1.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
    loader = batches(True)
    observe(net, loader, statistics.watches())
    handle.remove()
    for rows, x, batch in zip(seen, inputs, loader, strict=True):
        assert 0 < len(rows) < 16 * 4
        tokens, padding = x[batch["attention_mask"] != 0], x[batch["attention_mask"] == 0]
        near = [(rows.flatten(1)[:, None] == x).all(2).any(1) for x in (tokens, padding)]
        assert near[0].all() and not near[1].any()


@pytest.mark.parametrize("memory", [2**30, 1], ids=["one pass", "one by one"])
@pytest.mark.parametrize("classes", [None, [0, 2]])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_refits_are_those_of_the_tokens(net, mode, classes, memory):
    example = {k: v for k, v in batches(False)[-1].items() if k != "labels"}
    weights = []
    for padding in (False, True):
        model = copy.deepcopy(net)
        groups = prunable_groups(model, example)
        removed = {g.name: list(range(g.n_units // 3)) for g in groups}
        settings = Refit(mode, positions=None, memory_limit=memory)
        report = refit_consumers(model, example, batches(padding), removed, settings, groups=groups, classes=classes)
        assert {r.name for r in report.rows if not r.skipped} >= {"qkv", "proj", "f1", "f2", "head"}
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(weights[0]["f2.weight"], net.f2.weight)


@pytest.mark.parametrize("method", ["obs", "catro", "taylor", "itpruner", "psap"])
def test_padded_batches_in_one_call(net, method):
    model = net.float()
    example = {k: v for k, v in batches(True)[-1].items() if k != "labels"}
    dense, _ = count_ops(model, example)
    prune(model, example, batches(True), budget=Budget(macs=0.6), method=method)
    assert count_ops(model, example)[0] <= 0.6 * dense
    assert torch.isfinite(model(**example)).all()


def test_what_counts():
    mask = torch.tensor([[1, 0], [1, 1]])
    assert counted_positions({"attention_mask": mask}).tolist() == [[True, False], [True, True]]
    assert counted_positions(({"attention_mask": mask}, mask)) is not None
    for batch in ({"attention_mask": torch.ones(2, 2)}, {"attention_mask": mask[None]}, mask, (mask, mask), {}, []):
        assert counted_positions(batch) is None
    labels = torch.tensor([4, -1])
    assert with_positions(labels, mask != 0).tolist() == [[4, -1], [-1, -1]] and with_positions(labels, None) is labels
    with pytest.raises(ValueError, match="positions of 2 samples for a batch of 3"):
        with_positions(torch.zeros(3), mask != 0)
    with pytest.raises(TypeError, match="positions must be a function"):
        PaddedForward(mask)
    with pytest.raises(TypeError, match=r"gives list"):
        counted_positions(mask, PaddedForward(lambda b: b.tolist()))
    with pytest.raises(ValueError, match=r"has shape \(2,\)"):
        counted_positions(mask, PaddedForward(lambda b: b[0]))


class Flat(Encoder):
    """Its MLP runs on the tokens of all sequences as rows."""

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        rows = self.norm2(x).flatten(0, 1)
        return self.head((x + self.f2(F.gelu(self.f1(rows))).view_as(x))[:, 0])


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_padding_among_rows_does_not_count(mode):
    weights, example = [], {k: v for k, v in batches(False)[-1].items() if k != "labels"}
    for padding in (False, True):
        torch.manual_seed(0)
        model = Flat().double().eval()
        dense = model.f2.weight.detach().clone()
        groups = prunable_groups(model, example)
        refit_consumers(model, example, batches(padding), {"f1": [1, 5, 8]}, Refit(mode, positions=None), groups=groups)
        weights.append(model.f2.weight.detach())
    assert not torch.equal(weights[0], dense)
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-8)
