"""Which factor of queries, keys and values shrinks: whole heads, or a dimension of every head.

Before products of data with data are seen, nobody knows that a ``view`` makes heads. So the network runs once without
an answer; where the channels of a split then take part in attention, the axis that is summed over (or, for values,
comes out) is that of the dimensions, the other one that of the heads. A second pass is told the answers. Labels are the
same along the other factor then, so that an axis of heads has labels wherever it goes: in scores, in masks and in
tables with one entry per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from .ledger import Attended, Ledger, Question
from .reasons import Index

__all__ = ["Attention", "answers", "checked_attention"]

Attention = Literal["heads", "dims", "none"]
"""What a unit of attention is: a head, a dimension of every head, or nothing, so that its channels stay."""


def checked_attention(value: str) -> None:
    """Refuse what is no :data:`Attention`.

    Raises:
        ValueError: naming what there is.
    """
    if value not in get_args(Attention):
        raise ValueError(f"attention={value!r} must be one of {', '.join(map(repr, get_args(Attention)))}")


def answers(ledger: Ledger, attention: str, with_heads: Sequence[str] = ()) -> dict[int, int]:
    """The axis that shrinks, for every split whose channels take part in attention, by number of the operation.

    Args:
        ledger: of a pass without answers.
        attention: see :data:`Attention`.
        with_heads: layers of which the user has told the number of heads: their dimensions shrink.
    """
    found = {}
    rows = {f"{layer}.weight" for layer in with_heads}
    named = [np.arange(s.first, s.first + s.size) for s in ledger.sites if s.name in rows and s.axis == 0]
    told = np.concatenate([np.zeros(0, np.int64), *named])
    for question in ledger.questions:
        if question.number < 0:
            continue
        wanted = "dims" if np.isin(question.labels, told).any() else attention
        for attended in ledger.attended:
            axis = None if wanted == "none" else _axis(question, attended, wanted)
            if axis is not None:
                found[question.number] = axis
                break
    return found


def _axis(question: Question, attended: Attended, wanted: str) -> int | None:
    """The axis of a split that is the one of heads, or of dimensions, of what is attended; ``None`` if none is."""
    split = question.layer
    labels, dims, heads = attended.places
    shared = np.isin(labels, split)
    if not shared.any():
        return None
    labels, dims, heads = labels[shared], dims[shared], heads[shared]
    at = {int(label): place for place, label in np.ndenumerate(split)}
    places = np.array([at[int(label)] for label in labels])
    axes = [axis for axis in range(split.ndim) if split.shape[axis] > 1]
    found = next((axis for axis in axes if _same_partition(places[:, axis], dims)), None)
    if wanted == "heads" and found is not None:
        return next((axis for axis in axes if axis != found and _same_partition(places[:, axis], heads)), None)
    return found


def _same_partition(a: Index, b: Index) -> bool:
    """Whether two numberings of the same things tell the same ones apart, and more than one."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist())) > 1
