"""When PSAP prunes, and how long it watches afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np

__all__ = ["PSAPSchedule"]


@dataclass(frozen=True)
class PSAPSchedule:
    """When to prune, and how long to watch.

    Attributes:
        prune_steps: number of prune steps T; the fraction of the cost that is gone rises with 1 − (1 − t/T)³.
        begin: first prune step, as a fraction of all optimizer steps.
        end: last prune step, as a fraction; training goes on with the final masks after its pulse.
        pulse: optimizer steps during which the gates are watched after each prune step; 0 watches never.

    Raises:
        ValueError: for values that are out of range.

    Source: ours; the paper's own schedule is not at hand.
    """

    prune_steps: int = 10
    begin: float = 0.1
    end: float = 0.6
    pulse: int = 20

    def __post_init__(self) -> None:
        for name, least in (("prune_steps", 1), ("pulse", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if not 0.0 <= self.begin <= self.end <= 1.0:
            raise ValueError(f"begin={self.begin} and end={self.end} must be fractions with 0 <= begin <= end <= 1")

    def fit(self, total_steps: int) -> tuple[list[int], int]:
        """Iterations of the prune steps, and the length of the pulse that fits between and after them.

        Args:
            total_steps: optimizer steps in all; if they are few, there are fewer prune steps and shorter pulses.

        Returns:
            ``(iterations, pulse)``: prune after so many optimizer steps, strictly rising, all ≤ ``total_steps``.

        Example:
            >>> PSAPSchedule(prune_steps=4, begin=0.1, end=0.7, pulse=5).fit(100)
            ([10, 30, 50, 70], 5)
            >>> PSAPSchedule().fit(1)
            ([1], 0)
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, Integral) or total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r} must be the number of optimizer steps to come, at least 1")
        room = 1 if self.pulse and total_steps > 1 else 0
        first = min(max(1, round(self.begin * total_steps)), total_steps - room)
        last = max(first, min(round(self.end * total_steps), total_steps - room))
        count = min(self.prune_steps, last - first + 1)
        iterations = [round(k) for k in np.linspace(first, last, count)] if count > 1 else [last]
        gaps = np.diff([*iterations, max(total_steps, iterations[-1] + room)])
        return iterations, min(self.pulse, int(gaps.min()))
