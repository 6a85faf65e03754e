"""Remove layers one by one, those first without which the network's output changes least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from itertools import accumulate

from ...core.progress import phase, track
from .passes import Passes

__all__ = ["eliminated"]

FEW = 0.25
"""Part of the samples that layers are first looked at with."""
MARGIN = 0.5
"""By what part of its size the change that one layer makes may be smaller on all samples than on the first few."""
MOST = 1e6
"""Largest loss; the network is no good long before."""


def eliminated(passes: Passes, names: Sequence[str]) -> dict[str, float]:
    """Loss of every layer in a greedy elimination of all, see :func:`.output_losses`.

    Args:
        passes: the network; all layers are removed from it.
        names: the layers.

    Raises:
        ValueError: if the output changes by what is not finite, or there is no batch.
    """
    if not passes.sizes:
        raise ValueError("the loader gave no batch; a re-iterable of batches is needed (a generator runs only once)")
    race = _Race(passes)
    for name in track(names, "leaving out single layers", unit="layer"):
        race.look(name)
        error = race.first[name] if math.isfinite(sum(passes.sizes)) else math.nan
        if not math.isfinite(error):
            raise ValueError(
                f"the output changes by {error} without layer {name}; look for NaN in the weights and the batches"
            )
    found: dict[str, float] = {}
    worst = 0.0
    with phase("ordering layers", len(names), unit="layer") as running:
        while race.first:
            chosen = race.winner() if worst <= 1.0 else min(race.first, key=race.estimate)
            worst = max(worst, min(race.estimate(chosen), MOST))
            found[chosen] = worst
            race.remove(chosen)
            block = chosen.rpartition(".")[0]
            for name in list(race.first) if worst <= 1.0 and block else ():
                if name.rpartition(".")[0] == block:
                    race.look(name)
            running.advance()
    return {name: found[name] for name in names}


class _Race:
    """What is known of e(R with one layer more), R the layers that are gone.

    Attributes:
        first: per layer that is left e on the first batches, for R as it was when it was last asked.
    """

    def __init__(self, passes: Passes) -> None:
        self.first: dict[str, float] = {}
        self._passes = passes
        self._seen: dict[str, list[float]] = {}  # changes per batch of those asked since R is as it is
        self._base: list[float] = []  # the same for R itself
        samples = list(accumulate(passes.samples))
        self._few = max(sum(n <= FEW * samples[-1] for n in samples), 1)

    def estimate(self, name: str) -> float:
        """What e is on all batches, if the others are to those that were asked as they are for R alone."""
        seen = self._seen.get(name)
        error = self.first[name] if seen is None else self._error(seen)
        asked = self._few if seen is None else len(seen)
        usual = self._error(self._base[:asked]) if self._base else 0.0
        error *= self._error(self._base) / usual if 0 < usual < math.inf else 1.0
        return math.inf if math.isnan(error) else error

    def look(self, name: str) -> None:
        """Ask a layer on the first batches."""
        self._ask(name, -math.inf)

    def winner(self) -> str:
        """The layer of least e: the one that may be it is asked on the next batch, until it has been asked on all."""
        while True:
            chosen = min(self.first, key=self._least)
            if len(self._seen.get(chosen, ())) == len(self._passes.sizes):
                return chosen
            self._ask(chosen, min((self._least(name) for name in self.first if name != chosen), default=math.inf))

    def _least(self, name: str) -> float:
        """What e may be at least."""
        error, asked = self.estimate(name), len(self._seen.get(name, ()))
        if len(self._passes.sizes) in (asked, self._few) or error == math.inf:
            return error
        usual = self._error(self._base) if self._base else 0.0
        return error - MARGIN * math.sqrt(self._few / max(asked, self._few)) * abs(error - usual)

    def remove(self, name: str) -> None:
        """Add a layer to R."""
        self._passes.remove(name)
        seen = self._seen.get(name, [])
        self._base = seen if len(seen) == len(self._passes.sizes) else []
        self._seen = {}
        del self.first[name]

    def _ask(self, name: str, rival: float) -> None:
        """Ask on the first batches, or on one more; and on others as long as the layer looks better than a rival."""
        seen = self._seen.setdefault(name, [])
        with closing(self._passes.changes(name, len(seen))) as changes:
            for change in changes:
                seen.append(change)
                if len(seen) == self._few:
                    self.first[name] = self._error(seen)
                if len(seen) >= self._few and self._least(name) > rival:
                    return

    def _error(self, changes: list[float]) -> float:
        return sum(changes) / max(sum(self._passes.sizes[: len(changes)]), 1e-300)
