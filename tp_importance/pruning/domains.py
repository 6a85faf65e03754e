"""Domains of hyper-parameters: what a method says of its options, for searches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import SearchSpaceError

__all__ = ["Choice", "Domain", "Float", "Int", "check_names"]


@dataclass(frozen=True)
class Float:
    """Real numbers in [low, high], uniform or, with ``log``, log-uniform."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self, (int, float))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and self.low <= float(value) <= self.high


@dataclass(frozen=True)
class Int:
    """Integers low, ..., high, both included."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self, int)

    def __contains__(self, value: object) -> bool:
        whole = isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer()
        return whole and self.low <= float(value) <= self.high  # type: ignore[arg-type]


@dataclass(frozen=True)
class Choice:
    """One of some plain values (text, numbers, bools or None)."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        plain = all(v is None or isinstance(v, (str, int, float, bool)) for v in self.values)
        if not self.values or not plain or len(set(map(repr, self.values))) < len(self.values):
            raise SearchSpaceError(
                f"Choice({self.values!r}) must be distinct text, numbers, bools or None, at least one"
            )

    def __contains__(self, value: object) -> bool:
        return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values)


Domain = Float | Int | Choice


def check_names(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Refuse names that are not among the known ones.

    Raises:
        SearchSpaceError: naming both.
    """
    for name in names:
        if name not in known:
            raise SearchSpaceError(f"no {what} is called {name!r}; there are {list(known)}")


def _check_range(domain: Float | Int, kind: Any) -> None:
    for value in (domain.low, domain.high):
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            raise SearchSpaceError(f"{domain} needs finite bounds of type {type(domain).__name__.lower()}")
    if domain.low > domain.high or (domain.log and domain.low <= 0):
        raise SearchSpaceError(f"{domain} needs low <= high" + (" and, with log, low > 0" if domain.log else ""))
