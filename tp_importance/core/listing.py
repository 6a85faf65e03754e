"""Long lists in messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["listed"]

MOST = 8
"""How many numbers a message lists."""


def listed(numbers: Sequence[int] | Any) -> str:
    """The first numbers, and how many more there are.

    Args:
        numbers: a list or array of whole numbers.

    Example:
        >>> listed([3, 5]), listed(range(10))
        ('[3, 5]', '[0, 1, 2, 3, 4, 5, 6, 7] and 2 more')
    """
    more = f" and {len(numbers) - MOST} more" if len(numbers) > MOST else ""
    return f"{[int(n) for n in numbers[:MOST]]}{more}"
