"""Coupled channel groups: what a network is to a pruner.

A *group* is a set of channels, spread over many layers, that can only be removed together. Its atoms are *units*: the
smallest sets of root channels that can go alone. Usually a unit is one channel; a grouped convolution or an
attention head count makes it several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from .kept_statistics import StatisticCall
from .labels.reasons import ExclusionKind, Index
from .trace_options import TraceOptions
from .tracing import Trace

__all__ = [
    "ChannelGroup",
    "Excluded",
    "ExclusionKind",
    "Member",
    "Normalised",
    "PrunableGroups",
    "Queries",
    "Verifier",
]

Role = Literal["in", "out"]
Kind = Literal["producer", "consumer", "passthrough"]
Dimension = tuple[str, Role, int | None]
"""Name of a module, parameter or buffer, role, and the axis if it is a tensor."""


@dataclass(frozen=True, eq=False)
class Member:
    """One channel dimension that takes part in a group.

    Attributes:
        name: qualified name of the module, or of the parameter or buffer where no layer is known that it belongs to.
        role: ``"out"`` if the output channels of the module go, ``"in"`` if its input channels.
        kind: ``producer`` (conv or linear, out), ``consumer`` (conv or linear, in) or ``passthrough`` (the rest).
        channels: positions in that dimension, int64, shape (m,).
        units: unit of the group each position belongs to, int64, shape (m,).
        width: size of the whole dimension when the group was built.
        axis: of a parameter or buffer, the axis; ``None`` for a module.
    """

    name: str
    role: Role
    kind: Kind
    channels: Index
    units: Index
    width: int
    axis: int | None = None

    @property
    def dimension(self) -> Dimension:
        """Which dimension it is; members of several groups may share one."""
        return self.name, self.role, self.axis

    def positions(self, units: Iterable[int]) -> Index:
        """Positions in this dimension that belong to ``units``."""
        return self.channels[np.isin(self.units, np.fromiter(units, np.int64))]


@dataclass(frozen=True, eq=False)
class Normalised:
    """A mean, variance or norm that runs over channels of a group; of a masked network, over those that are kept.

    Attributes:
        call: which call of which function.
        groups: norm groups that the axis is divided into.
        member: the axis, counted from the end, and the channels.
    """

    call: StatisticCall
    groups: int
    member: Member


@dataclass(frozen=True, eq=False)
class Queries:
    """All filters that make the queries of one attention whose scale follows the number of their dimensions.

    Attributes:
        filters: per layer; ``units`` is -1 for filters that no unit of the group takes.
    """

    filters: tuple[Member, ...]

    @property
    def own(self) -> tuple[Member, ...]:
        """The layers of which units of the group take filters."""
        return tuple(m for m in self.filters if (m.units >= 0).any())


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that must live or die together.

    Attributes:
        name: the first producer in execution order. Where its channels belong to several groups (behind a split, say),
            ``/0``, ``/1``, ... tell them apart, by position, or where they interleave, in the order of the layers they
            reach. No two groups of a network bear one name, and pruning does not change the names.
        width: number of root channels C_g.
        unit_size: root channels per unit; admissible widths are multiples of it.
        members: everything that changes shape, in execution order.
        root: ``(module name, role)`` Torch-Pruning's surgery starts from.
        root_channels: positions of the channels in the root's dimension, shape (width,).
        root_units: unit of each of them, shape (width,).
        min_units: fewest units the graph allows.
        attributes: whole numbers that modules hold (``name`` is ``"<module>.<attribute>"``, or
            ``"<module>.<attribute>.<index>"`` inside of a list) and that must follow: they fall by one per position.
        statistics: means, variances and norms over the channels.
        products: axes of products whose cost the channels have a part in: the number of the product
            among those of the trace, and the axis.
        queries: filters whose outputs are divided by the root of how many of them a head has: what is left is
            multiplied by a number when some go, of this group or another.
    """

    name: str
    width: int
    unit_size: int
    members: tuple[Member, ...]
    root: tuple[str, Role]
    root_channels: Index
    root_units: Index
    min_units: int = 1
    attributes: tuple[Member, ...] = ()
    statistics: tuple[Normalised, ...] = ()
    products: tuple[tuple[int, Member], ...] = ()
    queries: tuple[Queries, ...] = ()

    @property
    def n_units(self) -> int:
        """Number of units."""
        return self.width // self.unit_size

    @property
    def root_dimension(self) -> Dimension:
        """The dimension of the root."""
        member = self.member(*self.root)
        return *self.root, None if member is None else member.axis

    @cached_property
    def producers(self) -> tuple[Member, ...]:
        """Members whose filters make the channels."""
        return tuple(m for m in self.members if m.kind == "producer")

    @cached_property
    def consumers(self) -> tuple[Member, ...]:
        """Members whose weights consume the channels."""
        return tuple(m for m in self.members if m.kind == "consumer")

    @cached_property
    def dimensions(self) -> tuple[Member, ...]:
        """Everything that becomes shorter when units go: members, numbers, and what is computed over the channels."""
        computed = (*(s.member for s in self.statistics), *(axis for _, axis in self.products))
        return *self.members, *self.attributes, *computed

    def member(self, name: str, role: Role) -> Member | None:
        """The member of that module and role, if any."""
        return next((m for m in self.members if m.name == name and m.role == role), None)

    def removed_channels(self, removed_units: Iterable[int]) -> list[int]:
        """Positions of ``removed_units`` in the root's dimension, ascending, as Torch-Pruning wants them."""
        gone = np.isin(self.root_units, np.fromiter(removed_units, np.int64))
        return np.sort(self.root_channels[gone]).tolist()


@dataclass(frozen=True)
class Excluded:
    """A group that is left alone, and why.

    Attributes:
        name: of the group.
        width: its channels.
        reason: why, as text for people.
        kind: why, as one word of :data:`ExclusionKind` for code.
        layers: that make the channels; where none does, as behind an input, the layer that surgery would start from.

    Raises:
        ValueError: for an unknown kind.
    """

    name: str
    width: int
    reason: str
    kind: ExclusionKind
    layers: Sequence[str] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(ExclusionKind):
            raise ValueError(f"{self.name}: kind={self.kind!r} must be one of {', '.join(get_args(ExclusionKind))}")

    @classmethod
    def of(cls, group: ChannelGroup, reason: str, kind: ExclusionKind) -> Excluded:
        """The same for a group."""
        return cls(group.name, group.width, reason, kind, [m.name for m in group.producers] or [group.root[0]])


@dataclass
class PrunableGroups:
    """The groups of one network, in execution order, and what was left out.

    Iterates over :class:`ChannelGroup`; ``groups["layer1.0.conv1"]`` looks one up by name.

    Attributes:
        groups: the groups that may be pruned.
        excluded: the groups that may not, with the reason.
        trace: the trace they come from.
        options: how they were found.
        remedy: what to do if none is left.

    Raises:
        ValueError: if two groups, left out or not, bear one name.
    """

    groups: list[ChannelGroup]
    excluded: list[Excluded]
    trace: Trace = field(repr=False)
    options: TraceOptions = field(default_factory=TraceOptions, repr=False)
    remedy: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        twice = [n for n, c in Counter([*self.names, *(e.name for e in self.excluded)]).items() if c > 1]
        if twice:
            raise ValueError(f"several groups are called {', '.join(twice)}: names of groups must differ")

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups, {len(self.excluded)} left out"]
        for g in self.groups:
            unit = f" in units of {g.unit_size}" if g.unit_size > 1 else ""
            lines.append(
                f"{g.name}: {g.width} channels{unit}, in {', '.join(dict.fromkeys(m.name for m in g.members))}"
            )
        lines += [f"left out: {e.name} ({e.width}): {e.reason}" for e in self.excluded]
        return "\n".join(lines)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise ValueError(f"no prunable group is called {name!r}; there are {[g.name for g in self.groups]}")

    @property
    def names(self) -> list[str]:
        """Names of the groups."""
        return [g.name for g in self.groups]

    @property
    def widths(self) -> dict[str, int]:
        """Width of every group, in channels."""
        return {g.name: g.width for g in self.groups}

    @property
    def padded(self) -> list[str]:
        """Groups of residual stages that padded shortcuts widen: all channels of one layer, some of another.

        The others of that layer meet the padding and stay (``pinned``).

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from tp_importance import prunable_groups
            >>> class Net(nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)
            ...     def forward(self, x):
            ...         y = self.a(x)
            ...         return self.c(nn.functional.pad(y, (0, 0, 0, 0, 1, 1)) + self.b(y))
            >>> groups = prunable_groups(Net(), torch.randn(1, 3, 8, 8))
            >>> groups.widths, groups.padded
            ({'a': 4}, ['a'])
        """
        pinned = {layer for e in self.excluded if e.kind == "pinned" for layer in e.layers}

        def widened(group: ChannelGroup) -> bool:
            whole = [len(m.channels) == m.width for m in group.producers]
            return any(whole) and any(not w and m.name in pinned for w, m in zip(whole, group.producers, strict=True))

        return [g.name for g in self.groups if widened(g)]

    def require_some(self) -> None:
        """Refuse a network without a prunable group.

        Raises:
            ValueError: naming what was left out, and why.
        """
        if not self.groups:
            raise ValueError(self.nothing_left())

    def nothing_left(self) -> str:
        """What to say of a network without a prunable group: what was left out, and why."""
        reasons = "; ".join(f"{e.name}: {e.reason}" for e in self.excluded) or (
            "no convolution or linear layer with a weight of real floating-point numbers ran; complex and quantized "
            "weights are not followed"
        )
        hint = f"; {self.remedy}" if self.remedy and self.remedy not in reasons else ""
        return f"{type(self.trace.model).__name__} has no group that can be pruned ({reasons}){hint}"

    def exclude(self, reasons: Mapping[str, str], kind: ExclusionKind = "unverified") -> PrunableGroups:
        """A copy in which some groups are left out.

        Args:
            reasons: why, by group name; other names are passed over.
            kind: of all these reasons; default: they are a verifier's.
        """
        return self._without([Excluded.of(g, reasons[g.name], kind) for g in self.groups if g.name in reasons])

    def exclude_again(self, excluded: Iterable[Excluded]) -> PrunableGroups:
        """A copy without what was left out of the same network before, a trace ago, for the same reasons.

        Args:
            excluded: the groups; those that are not prunable here anyhow are passed over.
        """
        known = {e.name: e for e in excluded}
        found = [(g, known[g.name]) for g in self.groups if g.name in known]
        return self._without([Excluded.of(g, e.reason, e.kind) for g, e in found])

    def _without(self, gone: Sequence[Excluded]) -> PrunableGroups:
        names = {e.name for e in gone}
        keep = [g for g in self.groups if g.name not in names]
        return PrunableGroups(keep, [*self.excluded, *gone], self.trace, self.options, self.remedy)


Verifier = Callable[[PrunableGroups, Any], Mapping[str, str]]
"""``verify(groups, example_inputs)`` gives a reason per group that must not be pruned; their kind is ``unverified``."""
