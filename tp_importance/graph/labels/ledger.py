"""What a pass with labels finds out: which labels live and die together, which must stay, and what is open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..kept_statistics import StatisticCall
from .reasons import ExclusionKind, Index, Reason

__all__ = ["Attended", "Follower", "Ledger", "Option", "Product", "Question", "Site", "Statistic", "connected"]


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
class Statistic:
    """A mean, a variance or a norm over channels.

    Attributes:
        call: which call of which function takes it.
        axis: of the channels in its argument, counted from the end.
        labels: along that axis, shape (C,).
        groups: norm groups that the axis is divided into.
        where: layer and operation, for people.
    """

    call: StatisticCall
    axis: int
    labels: Index
    groups: int = 1
    where: str = ""


@dataclass(frozen=True)
class Product:
    """A product of data with data; or with a weight that every channel of some axis of the data meets.

    Attributes:
        macs: multiply-accumulates, whole batch.
        axes: labels of every axis that has any, shape (n, m) each: the cost is proportional to the indices that are
            left, those of which not all m are gone.
        weights: parameters that the weight is made of, by qualified name; ``None`` for data with data.
    """

    macs: int
    axes: tuple[Index, ...]
    weights: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Attended:
    """What takes part in attention: labels of queries, keys or values.

    Attributes:
        labels: with one entry on every axis on which they do not vary.
        axis: of the dimensions: what is summed over, or what comes out; ``None`` if labels vary on neither.
        where: layer and operation, for people.
        number: of the operation in the pass.
    """

    labels: Index
    axis: int | None
    where: str
    number: int = -1

    @property
    def known(self) -> Index:
        """The labels, each once."""
        found: Index = np.unique(self.labels)
        return found[found > 0]

    @property
    def varies(self) -> tuple[bool, bool]:
        """Whether labels vary along axes of heads, and along that of the dimensions."""
        axes = {axis for axis, size in enumerate(self.labels.shape) if size > 1}
        return bool(axes - {self.axis}), self.axis is not None

    def may_go(self, attention: str) -> bool:
        """Whether what is varied is only what a unit of attention is: heads or dimensions; ``""``: anything may go."""
        by_heads, by_dims = self.varies
        return {"heads": not by_dims, "dims": not by_heads, "none": False}.get(attention, True)

    @cached_property
    def rows(self) -> Index:
        """Labels by everything else and dimension, shape (n, d)."""
        axis = self.labels.ndim - 1 if self.axis is None else self.axis
        return np.moveaxis(self.labels, axis, -1).reshape(-1, self.labels.shape[axis])

    @cached_property
    def places(self) -> tuple[Index, Index, Index]:
        """Every label once, its index among the dimensions, and its first index along all other axes."""
        labels, first = np.unique(self.rows, return_index=True)
        heads, dims = np.divmod(first, self.rows.shape[1])
        real = labels > 0
        return labels[real], dims[real], heads[real]


@dataclass(frozen=True)
class Option:
    """One answer to a :class:`Question`: what is tied then, what stays, which numbers follow, what is scaled."""

    what: str
    ties: Index = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    pinned: Index = field(default_factory=lambda: np.zeros(0, np.int64))
    followers: tuple[Follower, ...] = ()
    scaled: tuple[Attended, ...] = ()


@dataclass(frozen=True)
class Question:
    """Something that one pass cannot tell: what the code does with a smaller tensor.

    ``x.view(2, c // 2)`` and ``x.view(c // 32, 32)`` look alike. The options are in the order in which they are tried;
    verification decides. The last one lets nothing go.

    Attributes:
        where: layer and operation.
        labels: all labels it is about.
        options: the answers.
        factors: whether the answers but the last say which factor of an axis shrinks.
        number: of the operation in the pass; -1 if nobody will ask.
        layer: labels after a split, with one entry on every axis on which they do not vary.
    """

    where: str
    labels: Index
    options: tuple[Option, ...]
    factors: bool = False
    number: int = -1
    layer: Index = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)


@dataclass
class Ledger:
    """Collects sites, ties, reasons and questions during a pass.

    Attributes:
        sites: all axes that have labels.
        questions: in the order in which the pass meets them.
        followers: numbers that follow whatever the answers are.
        attended: what takes part in attention.
        several: labels of axes that must keep two entries, zeros among them.
        statistics: over channels.
        products: of data with data, and of data with weights if the cost follows more than the axes of the weight.
        scaled: queries whose products with keys are divided by the root of the number of their channels.
    """

    sites: list[Site] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    size: int = 1
    followers: list[Follower] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    several: list[Index] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    scaled: list[Attended] = field(default_factory=list)
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

    def attend(self, labels: Tensor, axes: Sequence[int], where: str, number: int) -> Attended:
        """Queries, keys or values.

        Args:
            labels: with one entry on every axis on which they do not vary.
            axes: of which one may be that of the dimensions.
            where: for people.
            number: of the operation.
        """
        axis = next((a % labels.dim() for a in axes if labels.shape[a] > 1), None)
        found = Attended(labels.cpu().numpy(), axis, where, number)
        self.attended.append(found)
        return found

    def count(self, macs: int, axes: Iterable[Tensor | None], weights: Sequence[str] | None = None) -> None:
        """A product, see :class:`Product`."""
        labelled = tuple(a.cpu().numpy() for a in axes if a is not None and len(a) > 1 and bool(a.any()))
        self.products.append(Product(macs, labelled, None if weights is None else tuple(weights)))

    def names(self, labels: Tensor) -> set[str]:
        """Parameters and buffers whose axes have these labels."""
        known = np.unique(labels.cpu().numpy())
        at = np.searchsorted([s.first for s in self.sites], known[known > 0], "right") - 1
        return {self.sites[i].name for i in at.tolist()}

    def ask(self, question: Question | None) -> None:
        """Leave something open."""
        if question is not None:
            self.questions.append(question)

    @property
    def ties(self) -> Sequence[Index]:
        """All pairs of labels that live and die together, whatever the answers are, shape (2, m) each."""
        return self._ties

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
        return connected([*self._ties, *ties, *chosen, *self._counted_alike(choices)], self.size)

    def _counted_alike(self, choices: Sequence[int]) -> Iterator[Index]:
        """Channels of several axes whose length one number gives: as many of each go, so index by index they do."""
        first: dict[str, Follower] = {}
        for f in self.following(choices):
            known = first.setdefault(f.name, f)
            if known is not f and not f.kept and len(known.labels) == len(f.labels):
                pairs = np.stack([known.labels, f.labels])
                yield pairs[:, (pairs > 0).all(0)]

    def following(self, choices: Sequence[int] = ()) -> list[Follower]:
        """All numbers that follow."""
        chosen = (f for q in range(len(self.questions)) for f in self.option(q, choices).followers)
        return [*self.followers, *chosen]

    def scaled_queries(self, choices: Sequence[int] = ()) -> list[Attended]:
        """All queries that are divided by the root of how many dimensions they have."""
        chosen = (a for q in range(len(self.questions)) for a in self.option(q, choices).scaled)
        return [*self.scaled, *chosen]

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


def connected(pairs: Iterable[Index], size: int) -> Index:
    """Class of each of ``size`` labels."""
    a, b = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64)
