"""The latencies that a plan or a report of a pruner speaks of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["LatencyTimes"]


@dataclass(frozen=True)
class LatencyTimes:
    """Latencies of a network before and after pruning, in milliseconds for the example inputs as they are.

    All are ``None`` if no latency was limited.

    Attributes:
        dense: of the network as given, measured: a median.
        dense_iqr: interquartile range of it.
        limit: of the budget.
        predicted: of the pruned network.
        measured: of the pruned network: a median; ``None`` in the plan of a pruner that measures after surgery.
        measured_iqr: interquartile range of it.

    Example:
        >>> times = LatencyTimes(dense=4.0, limit=2.0, predicted=1.9)
        >>> print(times)
        dense 4.000, limit 2.000, predicted 1.900
        >>> times.is_limited, times.measured, LatencyTimes().is_limited
        (True, None, False)
    """

    dense: float | None = None
    dense_iqr: float | None = None
    limit: float | None = None
    predicted: float | None = None
    measured: float | None = None
    measured_iqr: float | None = None

    @property
    def is_limited(self) -> bool:
        """Whether the budget has a limit of latency."""
        return self.limit is not None

    def to_dict(self) -> dict[str, float]:
        """The times that are known, by name; ready for JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTimes:
        """Rebuild the times from :meth:`to_dict`; ``None`` stands for a time that is not known, too.

        Raises:
            TypeError: if ``data`` is not a mapping.
            ValueError: for an unknown name, or a time that is not a finite number.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"latencies are read from a dict of milliseconds, not from {type(data).__name__}")
        names = [f.name for f in fields(cls)]
        for name, value in data.items():
            if name not in names:
                raise ValueError(f"unknown latency {name!r}; known are {', '.join(names)}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number and value is not None:
                raise ValueError(f"latency {name}={value!r} must be a finite number of milliseconds")
        return cls(**data)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self.to_dict().items())
