"""Which widths every group may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.types import Floats, Ints
from ..graph.groups import ChannelGroup

__all__ = ["WidthSpace", "round_down"]

_OPTIONS = ("max_pruning_ratio", "round_to", "min_widths")
"""What may keep a group from becoming as narrow as the graph allows."""


@dataclass(frozen=True)
class WidthSpace:
    """Admissible widths of every group.

    Attributes:
        levels: per group the admissible numbers of units, ascending.
        binding: options that keep a group from becoming as narrow as the graph allows.
    """

    levels: tuple[Ints, ...]
    binding: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def of(
        cls,
        groups: Sequence[ChannelGroup],
        *,
        round_to: int | None = None,
        max_pruning_ratio: float | Mapping[str, float] = 1.0,
        initial_widths: Mapping[str, int] | None = None,
        min_widths: Mapping[str, int] | None = None,
        max_widths: Mapping[str, int] | None = None,
    ) -> WidthSpace:
        """Widths that the graph, ``round_to``, ``max_pruning_ratio``, floors and ceilings allow.

        Args:
            groups: the groups.
            round_to: widths are multiples of it (in channels), or the present width.
            max_pruning_ratio: fraction of the initial channels of any group that may go, or one per group name
                (groups not named: 1).
            initial_widths: widths before the first step, for ``max_pruning_ratio``; default: present.
            min_widths: fewest channels per group name.
            max_widths: most channels per group name; without one, the present width is always admissible.

        Raises:
            ValueError: for a ``round_to`` below 1, a ratio outside [0, 1], or a group that is left no width.
        """
        if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
            raise ValueError(f"round_to={round_to!r} must be a positive integer, e.g. 8")
        levels, binding = [], set[str]()
        for g in groups:
            ratio = max_pruning_ratio.get(g.name, 1.0) if isinstance(max_pruning_ratio, Mapping) else max_pruning_ratio
            if isinstance(ratio, bool) or not 0.0 <= ratio <= 1.0:
                raise ValueError(f"max_pruning_ratio={ratio!r} must be a fraction in [0, 1]")
            units = np.arange(g.min_units, g.n_units + 1, dtype=np.int64)
            initial = (initial_widths or {}).get(g.name, g.width)
            enough = units * g.unit_size >= np.ceil(initial * (1.0 - ratio) - 1e-9)
            rounded = (units * g.unit_size) % (round_to or 1) == 0
            least, most = (min_widths or {}).get(g.name, 0), (max_widths or {}).get(g.name, g.width)
            inside = (units * g.unit_size >= least) & (units * g.unit_size <= most)
            levels.append(units[((enough & rounded) | (units == g.n_units)) & inside])
            full = units == g.n_units
            options = zip(_OPTIONS, (enough, rounded, units * g.unit_size >= least), strict=True)
            binding |= {name for name, allowed in options if not (allowed | full)[0]}
            if not len(levels[-1]):
                raise ValueError(
                    f"group {g.name} of {g.width} channels has no admissible width: min_widths {least}, max_widths "
                    f"{most}, max_pruning_ratio {ratio}, round_to {round_to}, units of {g.unit_size}, at least "
                    f"{g.min_units * g.unit_size}"
                )
        return cls(tuple(levels), tuple(name for name in _OPTIONS if name in binding))

    @property
    def floor(self) -> Ints:
        """Least admissible units, shape (G,)."""
        return np.array([lv[0] for lv in self.levels], np.int64)

    @property
    def full(self) -> Ints:
        """Largest admissible units, shape (G,): the present ones, or the ceiling."""
        return np.array([lv[-1] for lv in self.levels], np.int64)


def round_down(space: WidthSpace, units: Floats) -> Ints:
    """Admissible units at or below ``units``, or the floor; shape (G,)."""
    pairs = zip(space.levels, units, strict=True)
    return np.array([lv[max(int(np.searchsorted(lv, u + 1e-9, "right")) - 1, 0)] for lv, u in pairs], np.int64)
