"""Which groups may be the reason that a pruned copy differs at some place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .groups import Index, PrunableGroups
from .layer_kinds import is_depthwise

__all__ = ["Blame", "Finding", "Namer"]


@dataclass(frozen=True, eq=False)
class Finding:
    """One place where the pruned copy is not the masked network.

    Attributes:
        where: the place, for people: ``"input of layer1.0.conv2"``, ``"output of the network"``, ``"pruning a copy
            fails at view in layer1.0"``.
        problem: how it differs.
        kind: ``value`` (right shape, wrong numbers), ``shape``, ``error`` (an operation raised), ``surgery`` (no copy
            could be pruned), ``calls`` (other layers are called) or ``cost`` (all is equal, but costs something else).
        layer: whose input it is; of an ``error``, the innermost module that was running.
        positions: of wrong channels in that input, as they are in the dense network; ``None``: any.
        sources: layers, parameters and buffers that this is made of, back to the inputs of the last layers before.
    """

    where: str
    problem: str
    kind: Literal["value", "shape", "error", "surgery", "calls", "cost"]
    layer: str | None = None
    positions: Index | None = None
    sources: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" if self.where else self.problem


Namer = Callable[[Finding], Iterable[str]]
"""Names the groups that meet at the place of a finding; nothing if it does not know."""


class Blame:
    """Knows which groups meet where.

    An input of a layer depends on nothing but the groups it reads, those that the layers and parameters before it make,
    and those that these layers read in turn, because the inputs of *these* are set right (see :mod:`.pruned_pass`).

    Args:
        groups: the groups.
        namer: asked where nothing is known.
    """

    def __init__(self, groups: PrunableGroups, namer: Namer | None = None) -> None:
        self._namer = namer
        self._order = {name: i for i, name in enumerate(groups.names)}
        self._reads: dict[str, list[tuple[str, Index]]] = defaultdict(list)
        self._makes: dict[str, set[str]] = defaultdict(set)
        self._follows: dict[str, set[str]] = defaultdict(set)
        modules = dict(groups.trace.model.named_modules())
        for group in groups:
            for m in group.members:
                if m.role == "out":
                    self._makes[m.name].add(group.name)
                if m.role == "in" or (m.name in modules and is_depthwise(modules[m.name])):
                    self._reads[m.name].append((group.name, m.channels))
            for a in group.attributes:
                name = a.name.rpartition(".")[0] if a.name.rpartition(".")[2].isdigit() else a.name
                self._follows[name.rpartition(".")[0]].add(group.name)

    def readers(self, layer: str | None, positions: Index | None = None) -> set[str]:
        """Groups whose channels a layer reads, at any of ``positions``."""
        read = self._reads.get(layer or "", [])
        return {name for name, channels in read if positions is None or np.isin(positions, channels).any()}

    def first(self, finding: Finding, among: Collection[str]) -> list[str]:
        """The groups to suspect first, in execution order; empty if nothing is known.

        Args:
            finding: what was found.
            among: groups that lose units.
        """
        return sorted(next(filter(None, self._tiers(finding, set(among))), ()), key=self._order.__getitem__)

    def possible(self, finding: Finding, among: Collection[str], sound: Collection[str] = ()) -> set[str]:
        """All groups of ``among`` that can have a part in it.

        Args:
            finding: what was found.
            among: groups that lose units.
            sound: layers whose weights are what is to be left of them.
        """
        return set[str]().union(*self._tiers(finding, set(among), sound))

    def meeting(self, finding: Finding, among: Collection[str]) -> set[str]:
        """The groups of ``among`` that are made or read there, without those that the layers before read."""
        return (self.readers(finding.layer) | self._made(finding)) & set(among)

    def _made(self, finding: Finding) -> set[str]:
        return {g for name in _owners(finding.sources) for g in self._makes.get(name, ())}

    def _at(self, module: str) -> set[str]:
        """The groups that cut a module, or a number that it holds."""
        return self.readers(module) | self._makes.get(module, set()) | self._follows.get(module, set())

    def _tiers(self, finding: Finding, among: set[str], sound: Collection[str] = ()) -> Iterator[set[str]]:
        """Suspects, the likeliest first."""
        makers, made = _owners(finding.sources), self._made(finding)
        if finding.kind == "error":
            module = finding.layer or ""
            yield (made | self._at(module)) & among
        else:
            wrong = self.readers(finding.layer, finding.positions)
            made -= self.readers(finding.layer) - wrong  # arrives there as it should
            yield wrong & made & among
            yield wrong & among
            yield made & among
            if wrong and finding.positions is not None:
                makers = {name for name in makers if self._makes.get(name, set()) & wrong}
        yield {g for name in makers if name not in sound for g in self.readers(name)} & among
        if finding.kind == "error":
            known = (*self._makes, *self._reads, *self._follows)
            yield {g for m in known if module and m.startswith(f"{module}.") for g in self._at(m)} & among
        if self._namer is not None:
            yield {*self._namer(finding)} & among


def _owners(names: Iterable[str]) -> set[str]:
    """All prefixes: of the weight of a layer, the layer."""
    found = set()
    for name in names:
        while name:
            found.add(name)
            name = name.rpartition(".")[0]
    return found
