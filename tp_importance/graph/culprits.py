"""Find the groups to blame in a few comparisons of all groups at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Protocol

from ..core.progress import phase
from .blame import Blame, Finding
from .oracle import Outcome

__all__ = ["Culprits"]

ROUNDS = 6
"""Comparisons after which the search gives blame up and divides what is left into halves."""


class Examine(Protocol):
    """Compares the masked network with a copy that is pruned at the groups of these names only."""

    def __call__(self, names: Sequence[str]) -> Outcome: ...


class Culprits:
    """Groups that fail, and those that may be pruned together.

    All are compared at once. Of every place that differs the likeliest group is left out, until nothing differs. A
    group is *proven* to fail if some place differed that no other refused group has a part in; all others are compared
    once more beside those that are right, as many at a time as do not meet.

    Args:
        names: the groups, in execution order.
        examine: the comparison.
        blame: knows which groups meet where.

    Attributes:
        reasons: why, per group that is refused.
    """

    def __init__(self, names: Sequence[str], examine: Examine, blame: Blame) -> None:
        self._names, self._examine, self._blame = list(names), examine, blame
        self._history: list[tuple[Finding, set[str]]] = []
        self.reasons: dict[str, str] = {}

    def find(self) -> dict[str, str]:
        """Search, and return the reasons."""
        safe = self._narrowed(self._names)
        grown = self._pardoned(safe, self._doubtful())
        if grown is not None:
            self._narrowed(grown)
        return {name: self.reasons[name] for name in self._sorted(self.reasons)}

    def _narrowed(self, names: Collection[str]) -> list[str]:
        """Leave groups out until nothing differs."""
        left = self._sorted(names)
        for _ in range(ROUNDS):
            outcome = self._examine(left) if left else Outcome([])
            if not outcome.findings:
                return left
            chosen = self._chosen(outcome, left)
            if not chosen:
                break
            left = [name for name in left if name not in chosen]
        return self._halved(left, [])

    def _chosen(self, outcome: Outcome, among: Collection[str]) -> set[str]:
        """A group for every finding, as few as will do; and the reasons."""
        suspects = [(f, self._blame.first(f, among)) for f in outcome.findings]
        self._history += [(f, self._blame.possible(f, among, outcome.sound)) for f in outcome.findings]
        chosen = {name for f, names in suspects if len(names) == 1 or f.kind == "error" for name in names}
        right = outcome.compared - {f.layer for f in outcome.findings}
        read = Counter(name for layer in right for name in self._blame.readers(layer))
        while open_ := [names for _, names in suspects if names and not chosen & {*names}]:
            counts = Counter(name for names in open_ for name in names)
            chosen.add(max(counts, key=lambda name: (counts[name], -read[name])))
        for name in chosen:
            self._refuse(name, next(f for f, names in suspects if name in names))
        return chosen

    def _doubtful(self) -> list[str]:
        """What is refused though it may be the fault of others that are refused."""
        refused = set(self.reasons)
        proven = {next(iter(shared)) for _, names in self._history if len(shared := names & refused) == 1}
        return self._sorted(refused - proven)

    def _pardoned(self, safe: Sequence[str], doubtful: Sequence[str]) -> list[str] | None:
        """Take back what does not fail beside ``safe``.

        Returns:
            All that is right, if it has not been compared together.
        """
        right, together = list(safe), True
        for _ in range(ROUNDS):
            if not doubtful:
                return None if together else right
            batch: list[str] = []
            for name in doubtful:
                if not any(name in names and names & {*batch} for _, names in self._history):
                    batch.append(name)
            doubtful = [name for name in doubtful if name not in batch]
            outcome = self._examine(self._sorted([*right, *batch]))
            wrong = self._chosen(outcome, batch)
            if outcome.findings and not wrong:  # nothing points to any of them
                doubtful = [*batch, *doubtful]
                break
            pardoned = [name for name in batch if name not in wrong]
            for name in pardoned:
                del self.reasons[name]
            right += pardoned
            together = not outcome.findings or (together and not pardoned)
        grown = self._halved(doubtful, right)
        return None if together or len(grown) > len(right) else grown

    def _halved(self, names: Sequence[str], base: Sequence[str]) -> list[str]:
        """Groups of ``names`` that may be pruned together with each other and with ``base``, by bisection."""
        with phase("bisecting", unit="test", groups=len(names)) as running:

            def problem(some: Sequence[str]) -> Finding | None:
                found = self._examine(self._sorted([*base, *some])).findings
                running.advance()
                return found[0] if found else None

            def safe(some: Sequence[str]) -> list[str]:
                found = problem(some) if some else None
                if found is None:
                    return list(some)
                if len(some) == 1:
                    self._refuse(some[0], found)
                    return []
                half = len(some) // 2
                first, second = safe(some[:half]), safe(some[half:])
                if not first or not second or problem([*first, *second]) is None:
                    return first + second
                for name in second:  # safe apart, not together: keep as many as go with the first half
                    found = problem([*first, name])
                    if found is None:
                        first.append(name)
                    else:
                        self._refuse(name, found, " together with other groups")
                return first

            kept = safe(names)
        for name in kept:
            self.reasons.pop(name, None)
        return [*base, *kept]

    def _refuse(self, name: str, finding: Finding, how: str = "") -> None:
        self.reasons[name] = f"removal{how} is not masking: {finding}"

    def _sorted(self, names: Collection[str]) -> list[str]:
        return [name for name in self._names if name in names]
