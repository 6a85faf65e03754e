"""Positive factors of tensors that hold relative to one another: a union-find with ratios."""

from __future__ import annotations

import math

__all__ = ["Ratios"]


class Ratios:
    r"""Unknown factors :math:`\rho_i > 0`, bound by equations :math:`\rho_i = c \rho_j` and :math:`\rho_i = 1`.

    Kept in logarithms; equations that hold to 1e-9 count as holding.

    Example:
        >>> ratios = Ratios()
        >>> a, b, c = (ratios.new() for _ in range(3))
        >>> ratios.bind(b, a, 2.0), ratios.bind(c, b, 3.0), ratios.bind(c, a, 5.0)
        (True, True, False)
        >>> ratios.pin(a), round(ratios.value(c), 9)
        (True, 6.0)
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._log: list[float] = []  # log of the factor over that of the parent
        self._known: dict[int, float] = {}  # log of the factor of a root, where it is known
        self._members: list[list[int]] = []  # of a root

    def new(self) -> int:
        """A new factor; returns its number."""
        self._parent.append(len(self._parent))
        self._log.append(0.0)
        self._members.append([len(self._members)])
        return len(self._parent) - 1

    def bind(self, i: int, j: int, ratio: float = 1.0) -> bool:
        """Demand ρ_i = ratio · ρ_j; ``False``, and nothing changes, if that contradicts what holds already."""
        (a, log_a), (b, log_b) = self._find(i), self._find(j)
        shift = math.log(ratio) + log_b - log_a  # of root a over root b
        if a == b:
            return abs(shift) < 1e-9
        if a in self._known and b in self._known:
            return abs(self._known[a] - self._known[b] - shift) < 1e-9
        if a in self._known:
            self._known[b] = self._known.pop(a) - shift
        self._parent[a], self._log[a] = b, shift
        self._members[b] += self._members[a]
        return True

    def pin(self, i: int) -> bool:
        """Demand ρ_i = 1; ``False`` if that contradicts what holds already."""
        root, log = self._find(i)
        return abs(self._known.setdefault(root, -log) + log) < 1e-9

    def is_known(self, i: int) -> bool:
        """Whether ρ_i follows from what is pinned."""
        return self._find(i)[0] in self._known

    def value(self, i: int) -> float:
        """ρ_i; where nothing pins it, the median of all that it is bound to is 1, so that most of them are."""
        root, log = self._find(i)
        if root in self._known:
            return math.exp(self._known[root] + log)
        logs = sorted(self._find(member)[1] for member in self._members[root])
        return math.exp(log - logs[(len(logs) - 1) // 2])

    def _find(self, i: int) -> tuple[int, float]:
        """Root of i, and the log of ρ_i over its factor."""
        path = []
        while self._parent[i] != i:
            path.append(i)
            i = self._parent[i]
        log = 0.0
        for member in reversed(path):  # shorten the way for the next time
            log += self._log[member]
            self._parent[member], self._log[member] = i, log
        return i, log
