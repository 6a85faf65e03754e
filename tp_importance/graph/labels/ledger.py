"""What a pass with labels finds out: which labels live and die together, which must stay, and what is open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from .reasons import ExclusionKind, Index, Reason

__all__ = ["Follower", "Ledger", "Option", "Question", "Site"]


@dataclass(frozen=True)
class Site:
    """One axis of a parameter or buffer; its entries have the labels ``first``, ``first + 1``, ...

    Attributes:
        name: qualified name of the tensor.
        axis: which axis.
        first: label of its first entry.
        size: entries.
    """

    name: str
    axis: int
    first: int
    size: int


@dataclass(frozen=True)
class Follower:
    """A whole number that a module keeps, such as the width of a split, and the channels that it counts.

    Attributes:
        name: ``"<module>.<attribute>"``, with ``".<index>"`` inside of a list.
        value: now.
        labels: of the channels, shape (value,).
        kept: whether the surgery of the layer keeps it up to date anyway.
    """

    name: str
    value: int
    labels: Index
    kept: bool = False


@dataclass(frozen=True)
class Option:
    """One answer to a :class:`Question`: what is tied then, what stays, and which numbers follow."""

    what: str
    ties: Index = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    pinned: Index = field(default_factory=lambda: np.zeros(0, np.int64))
    followers: tuple[Follower, ...] = ()


@dataclass(frozen=True)
class Question:
    """Something that one pass cannot tell: what the code does with a smaller tensor.

    ``x.view(2, c // 2)`` and ``x.view(c // 32, 32)`` look alike. The options are in the order in which they are tried;
    verification decides. The last one lets nothing go.

    Attributes:
        where: layer and operation.
        labels: all labels it is about.
        options: the answers.
        factors: whether the answers but the last say which factor of a reshaped axis shrinks.
    """

    where: str
    labels: Index
    options: tuple[Option, ...]
    factors: bool = False


@dataclass
class Ledger:
    """Collects sites, ties, reasons and questions during a pass.

    Attributes:
        sites: all axes that have labels.
        questions: in the order in which the pass meets them.
        followers: numbers that follow whatever the answers are.
        attended: labels that take part in attention, and where.
        several: labels of axes that must keep two entries, zeros among them.
    """

    sites: list[Site] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    size: int = 1
    followers: list[Follower] = field(default_factory=list)
    attended: list[tuple[Index, str]] = field(default_factory=list)
    several: list[Index] = field(default_factory=list)
    _ties: list[Index] = field(default_factory=list)
    _flags: list[tuple[Index, Reason]] = field(default_factory=list)

    def add_site(self, name: str, axis: int, size: int, device: torch.device) -> Tensor:
        """New labels for an axis, shape (size,)."""
        self.sites.append(Site(name, axis, self.size, size))
        self.size += size
        return torch.arange(self.size - size, self.size, device=device)

    def tie(self, pairs: Tensor) -> None:
        """Labels that live and die together, shape (2, m)."""
        if pairs.numel():
            self._ties.append(pairs.cpu().numpy())

    def flag(self, labels: Tensor | Index, kind: ExclusionKind, text: str) -> None:
        """Labels that must stay, and why; zeros do not count."""
        found = np.unique(labels.cpu().numpy() if isinstance(labels, Tensor) else labels)
        found = found[found > 0]
        if len(found):
            self._flags.append((found, (kind, text)))

    def attend(self, labels: Tensor, where: str) -> None:
        """Labels of queries, keys or values."""
        found = np.unique(labels.cpu().numpy())
        self.attended.append((found[found > 0], where))

    def ask(self, question: Question) -> None:
        """Leave something open."""
        self.questions.append(question)

    def put_in_order(self) -> None:
        """Of the factors of a reshaped axis, try first the one that leaves most units, by all other ties."""
        if not any(q.factors for q in self.questions):
            return
        classes = _connected(self._ties, self.size)
        for i, question in enumerate(self.questions):
            if question.factors:
                *factors, last = question.options
                factors.sort(key=lambda option: -_count(classes, question.labels, option.ties))
                self.questions[i] = replace(question, options=(*factors, last))

    def option(self, number: int, choices: Sequence[int]) -> Option:
        """The answer to question ``number``; the first one where nothing is chosen."""
        options = self.questions[number].options
        return options[min(choices[number] if number < len(choices) else 0, len(options) - 1)]

    def classes(self, choices: Sequence[int] = (), ties: Iterable[Index] = ()) -> Index:
        """Class of every label, shape (size,): labels of one class live and die together.

        Args:
            choices: option per question.
            ties: further pairs, shape (2, m) each.
        """
        chosen = (self.option(q, choices).ties for q in range(len(self.questions)))
        return _connected([*self._ties, *ties, *chosen], self.size)

    def following(self, choices: Sequence[int] = ()) -> list[Follower]:
        """All numbers that follow."""
        chosen = (f for q in range(len(self.questions)) for f in self.option(q, choices).followers)
        return [*self.followers, *chosen]

    def reasons(self, classes: Index, choices: Sequence[int] = ()) -> dict[int, list[Reason]]:
        """Why classes must stay, in the order in which the pass found it out."""
        found: dict[int, list[Reason]] = {}
        flags = list(self._flags)
        for number, question in enumerate(self.questions):
            option = self.option(number, choices)
            flags.append((option.pinned, ("pinned", f"{question.where}: {option.what}")))
        for labels, reason in flags:
            for c in np.unique(classes[labels]).tolist():
                found.setdefault(c, []).append(reason)
        return found


def _connected(pairs: Iterable[Index], size: int) -> Index:
    """Class of each of ``size`` labels."""
    a, b = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _count(classes: Index, labels: Index, ties: Index) -> int:
    """Classes that some labels are in when further ones are tied."""
    known, place = np.unique(classes[labels], return_inverse=True)
    at = dict(zip(labels.tolist(), place.tolist(), strict=True))
    pairs = np.array([[at[a] for a in side] for side in ties.tolist()], np.int64).reshape(2, -1)
    return int(_connected([pairs], len(known)).max(initial=-1)) + 1
