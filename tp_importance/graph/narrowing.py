"""Groups after a removal, without looking at the network again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from .groups import ChannelGroup, Dimension, Index, Member, Normalised, PrunableGroups, Queries

__all__ = ["narrowed"]


def narrowed(groups: PrunableGroups, removed: Mapping[str, Iterable[int]]) -> PrunableGroups:
    """The groups of a network from which units were removed: their positions move up, their units are renumbered.

    A position moves by as many as went below it in its dimension, whichever group they were of. Groups keep their
    names, also those of which a single unit is left. The trace is the old one.

    Args:
        groups: the groups before.
        removed: units that went, per group name; unit u of a group becomes u minus the number of those below it.

    Raises:
        ValueError: for a name or a unit that is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tp_importance import prunable_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> left = narrowed(prunable_groups(net, torch.randn(1, 3, 8, 8)), {"0": [0, 5]})
        >>> left["0"].width, left["0"].member("2", "in").width
        (6, 6)
    """
    gone: dict[str, Index] = {}
    lost: dict[Dimension, list[Index]] = defaultdict(list)
    for name, units in removed.items():
        group = groups[name]
        gone[name] = np.unique(np.fromiter(units, np.int64))
        if len(gone[name]) and not 0 <= gone[name][0] <= gone[name][-1] < group.n_units:
            raise ValueError(f"group {name} has units 0..{group.n_units - 1}, not {gone[name].tolist()}")
        for member in group.dimensions:
            lost[member.dimension].append(member.positions(gone[name]))
    below = {dimension: np.unique(np.concatenate(positions)) for dimension, positions in lost.items()}
    none = np.zeros(0, np.int64)
    left = [_narrowed(group, gone.get(group.name, none), below) for group in groups]
    return PrunableGroups(left, list(groups.excluded), groups.trace, groups.options)


def _narrowed(group: ChannelGroup, gone: Index, lost: Mapping[Dimension, Index]) -> ChannelGroup:
    attending = (m.dimension for queries in group.queries for m in queries.filters)
    dimensions = (group.root_dimension, *(m.dimension for m in group.dimensions), *attending)
    if not len(gone) and not any(map(lost.__contains__, dimensions)):
        return group
    stays = np.ones(group.n_units, bool)
    stays[gone] = False
    number = np.cumsum(stays) - 1

    def shifted(channels: Index, dimension: Dimension) -> Index:
        return channels - np.searchsorted(lost.get(dimension, gone[:0]), channels)

    def cut(member: Member) -> Member:
        own, here = member.units >= 0, ~np.isin(member.channels, lost.get(member.dimension, gone[:0]))
        return replace(
            member,
            channels=shifted(member.channels[here], member.dimension),
            units=np.where(own, number[member.units], -1)[here],
            width=member.width - len(lost.get(member.dimension, ())),
        )

    def normalised(statistic: Normalised) -> Normalised:
        member = statistic.member
        kept = np.delete(np.arange(member.width), lost.get(member.dimension, gone[:0]))
        left = len(np.unique(kept // (member.width // statistic.groups)))
        return replace(statistic, groups=left, member=cut(member))

    of_root = stays[group.root_units]
    return replace(
        group,
        width=int(stays.sum()) * group.unit_size,
        members=tuple(map(cut, group.members)),
        attributes=tuple(map(cut, group.attributes)),
        statistics=tuple(map(normalised, group.statistics)),
        products=tuple((number, cut(axis)) for number, axis in group.products),
        queries=tuple(Queries(tuple(map(cut, queries.filters))) for queries in group.queries),
        root_channels=shifted(group.root_channels[of_root], group.root_dimension),
        root_units=number[group.root_units[of_root]],
    )
