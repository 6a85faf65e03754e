"""Questions about factors: an axis of channels is a × b, and whole slices of one of both go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from .layers import along, axes_of, compact, merged
from .ledger import Attended, Follower, Option, Question, connected
from .reasons import Index

__all__ = ["factors_question", "in_order", "norm_groups_question", "scale_question"]

EACH = "one channel of every norm group goes"
WHOLE = "whole norm groups go"


def factors_question(layer: Tensor, where: str, number: int) -> Question:
    """Channels were split into factors: the code keeps one of them, the other can shrink.

    Args:
        layer: labels after the split, which vary on several axes.
        where: for people.
        number: of the operation in the pass.
    """
    axes, small = axes_of(layer), compact(layer)
    labels = _known(small)
    options = []
    for axis in reversed(axes):
        ties = along(small, axis)[1].cpu().numpy()
        options.append(Option(f"axis {axis} of {tuple(layer.shape)} shrinks", ties))
    options.append(Option("the code reshapes to fixed sizes", pinned=labels))
    return Question(where, labels, tuple(options), factors=True, number=number, layer=small.cpu().numpy())


def norm_groups_question(labels: Tensor, followers: Sequence[Follower], where: str) -> Question | None:
    """Channels are normalised in groups: one channel of each goes, or whole groups go.

    Args:
        labels: shape (groups, channels of one).
        followers: numbers that count the groups; without one, no group can go.
        where: for people.

    Returns:
        ``None`` if there is a single group: any channel can go. What would go with an entry without a label is pinned.
    """
    if labels.shape[0] == 1:
        return None
    known = _known(labels)
    each, whole = (_in_step(labels, axis) for axis in (0, 1))
    options = [Option(EACH, merged(labels, 0)[1].cpu().numpy(), each)]
    if followers:
        options.append(Option(WHOLE, merged(labels, 1)[1].cpu().numpy(), whole, tuple(followers)))
    options.append(Option("the norm's groups stay as they are", pinned=known))
    return Question(where, known, tuple(options), factors=True)


def _in_step(labels: Tensor, axis: int) -> Index:
    """Labels that share an axis with entries without one: those stay, so these do, or norm groups would differ."""
    return _known(labels * (labels == 0).any(axis, keepdim=True))


def scale_question(found: Attended, dense: Attended) -> Question:
    """Whether products of queries and keys are divided by the root of how many dimensions they have *then*.

    Args:
        found: labels of the queries.
        dense: the same with a label for every filter.
    """
    return Question(
        found.where,
        found.known,
        (
            Option("the scale of the attention is a constant"),
            Option("the scale of the attention follows the number of dimensions", scaled=(dense,)),
            Option("the scale of the attention is not known", pinned=found.known),
        ),
    )


def _known(labels: Tensor) -> Index:
    found: Index = np.unique(labels.cpu().numpy())
    return found[found > 0]


def in_order(questions: Sequence[Question], ties: Iterable[Index], size: int) -> list[Question]:
    """Of the factors of an axis, try first the one that leaves most units, given all other ties.

    Questions about channels that are coupled are answered together: with GroupNorms on a, b and ``cat(a, b)``, either
    one channel of every norm group goes, or whole groups do; half of this and half of that would leave nothing.

    Args:
        questions: all questions of a pass.
        ties: all ties of the pass.
        size: number of labels.
    """
    if not any(q.factors for q in questions):
        return list(questions)
    classes = connected(ties, size)
    open_ones = [i for i, q in enumerate(questions) if q.factors]
    made = list(questions)
    for together in _components([np.unique(classes[questions[i].labels]) for i in open_ones]):
        mine = [questions[open_ones[k]] for k in together]
        known = np.unique(np.concatenate([classes[q.labels] for q in mine]))
        shrunk = [[np.searchsorted(known, classes[o.ties]) for o in q.options[:-1]] for q in mine]
        alone = [
            sorted(range(len(q.options) - 1), key=lambda n, own=own: -_count([own[n]], len(known)))  # type: ignore[misc]
            for q, own in zip(mine, shrunk, strict=True)
        ]
        chosen = _best(mine, shrunk, [ranks[0] for ranks in alone], len(known))
        for k, q, ranks, first in zip(together, mine, alone, chosen, strict=True):
            order = [first, *(n for n in ranks if n != first)]
            made[open_ones[k]] = replace(q, options=(*(q.options[n] for n in order), q.options[-1]))
    return made


def _best(mine: Sequence[Question], ties: Sequence[Sequence[Index]], alone: list[int], size: int) -> list[int]:
    """The answers, one per question, that leave most classes: each the best by itself, or all the same."""
    candidates = [alone]
    for what in dict.fromkeys(o.what for q in mine for o in q.options[:-1]):
        same = [[o.what for o in q.options[:-1]] for q in mine]
        candidates.append([s.index(what) if what in s else n for s, n in zip(same, alone, strict=True)])
    if len(mine) == 1:
        return alone
    return max(candidates, key=lambda chosen: _count([t[n] for t, n in zip(ties, chosen, strict=True)], size))


def _components(sets: Sequence[Index]) -> list[list[int]]:
    """Sets that share an element, directly or by others, belong together."""
    rows = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    columns = np.unique(np.concatenate(sets), return_inverse=True)[1]
    n = len(sets)
    graph = coo_array((np.ones(len(rows), bool), (rows, n + columns)), shape=(n + len(columns), n + len(columns)))
    component = connected_components(graph, directed=False)[1][:n]
    return [np.flatnonzero(component == c).tolist() for c in dict.fromkeys(component.tolist())]


def _count(ties: Iterable[Index], size: int) -> int:
    """Classes of ``size`` labels under some ties."""
    return int(connected(ties, size).max(initial=-1)) + 1
