"""From masks of parameters to units of coupled groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tp_importance.core.listing import listed
from tp_importance.graph.groups import ChannelGroup, Member, PrunableGroups, Role
from tp_importance.graph.layer_kinds import CONV, is_passthrough
from tp_importance.graph.layer_pruners import loses_whole_groups
from tp_importance.graph.reparametrised import weight_axis

from .masks import kept_positions

__all__ = ["MaskedAxes", "MaskedAxis", "dead_units", "made_in_part", "masked_axes", "units_to_remove"]

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MaskedAxis:
    """Channels that a mask takes from one axis of a parameter.

    Attributes:
        tensor: qualified name of the parameter.
        axis: the axis.
        module: name of its module, the first one where there are several.
        role: side of the module that loses the channels; ``None`` if only the tensor itself has them.
        weight: whether the parameter is a weight, so that a masked row makes a channel zero.
        masked: one flag per channel of that side, shape (C,); for the inputs of a grouped convolution, of all its
            groups.
    """

    tensor: str
    axis: int
    module: str
    role: Role | None
    weight: bool
    masked: Flags

    def of(self, member: Member) -> bool:
        """Whether a member of a group is this axis."""
        if member.name == self.tensor:
            return member.axis in (self.axis, None)
        return member.axis is None and (member.name, member.role, member.width) == (
            self.module,
            self.role,
            len(self.masked),
        )


class MaskedAxes:
    """What the masks of a network take.

    Args:
        axes: one by one.
    """

    def __init__(self, axes: Iterable[MaskedAxis]) -> None:
        self._all = list(axes)
        self._named: dict[str, set[MaskedAxis]] = defaultdict(set)
        for axis in self._all:
            self._named[axis.tensor].add(axis)
            self._named[axis.module].add(axis)

    def __iter__(self) -> Iterator[MaskedAxis]:
        return iter(self._all)

    def of(self, member: Member) -> list[MaskedAxis]:
        """Those that are a member of a group."""
        return [axis for axis in self._named.get(member.name, ()) if axis.of(member)]


def masked_axes(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> MaskedAxes:
    """What the masks take, by axis.

    Args:
        model: the network.
        masks: of :func:`.masks.checked_masks`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {module: name for name, module in reversed(modules.items())}
    return MaskedAxes(
        axis
        for name, targets in masks.items()
        for target, mask in targets.items()
        for axis in _axes(first[modules[name]], modules[name], target, mask)
    )


def _axes(name: str, module: nn.Module, target: str, mask: Tensor) -> Iterator[MaskedAxis]:
    weight = target == "weight"
    tensor = f"{name}.{target}" if name else target
    for axis, kept in enumerate(kept_positions(mask)):
        masked = ~kept.cpu().numpy()
        if not masked.any():
            continue
        role: Role | None = "out" if mask.dim() == 1 else None
        if weight and isinstance(module, nn.Embedding):
            role = "out" if axis == 1 else None
        elif weight and is_passthrough(module):
            whole = getattr(module, "transposed", False) and loses_whole_groups(module)
            role = None if axis else "in" if whole else "out"
        elif weight and isinstance(module, (*CONV, nn.Linear)):
            role = "out" if axis == weight_axis(module, "out") else "in"
            # axis 1 holds the channels of one convolution group
            masked = np.tile(masked, getattr(module, "groups", 1) if axis == 1 else 1)
        yield MaskedAxis(tensor, axis, name, role, weight, masked)


def dead_units(group: ChannelGroup, axes: MaskedAxes) -> set[int]:
    """Units that all layers that make them mask, or all layers that read them: the network does without them.

    Args:
        group: the group.
        axes: of :func:`masked_axes`.
    """
    dead: set[int] = set()
    for members in (group.producers, group.consumers):
        if members:
            dead |= set.intersection(*(_masked_whole(m, axes) for m in members))
    return dead


def made_in_part(group: ChannelGroup, axes: MaskedAxes) -> set[int]:
    """Units of which at least one layer that makes them masks at least one channel.

    Args:
        group: the group.
        axes: of :func:`masked_axes`.
    """
    return {int(u) for m in group.producers for u in m.units[_masked(m, axes)[m.channels]]}


def _masked(member: Member, axes: MaskedAxes) -> Flags:
    """Channels of a producer or consumer that the mask of its weight takes, over its whole width."""
    masked = np.zeros(member.width, bool)
    for axis in axes.of(member):
        if axis.weight:
            masked |= axis.masked
    return masked


def _masked_whole(member: Member, axes: MaskedAxes) -> set[int]:
    alive = ~_masked(member, axes)[member.channels]
    return set(member.units.tolist()) - set(member.units[alive].tolist())


def units_to_remove(groups: PrunableGroups, axes: MaskedAxes) -> dict[str, list[int]]:
    """The units that go by the masks, per group, with exactly the masked channels in every tensor that has a mask.

    Args:
        groups: the groups of the network.
        axes: of :func:`masked_axes`.

    Returns:
        Units per group name, ascending; groups that lose none are left out.

    Raises:
        ValueError: if masks of coupled layers contradict each other, or masked channels cannot go; names the layers.
    """
    removed = {g.name: sorted(dead) for g in groups if (dead := dead_units(g, axes))}
    going = {axis: np.zeros(len(axis.masked), bool) for axis in axes}
    for name, units in removed.items():
        for m in groups[name].members:
            for axis in axes.of(m):
                going[axis][m.positions(units)] = True
    for axis, gone in going.items():
        if (extra := np.flatnonzero(axis.masked & ~gone)).size:
            raise ValueError(_why_it_stays(groups, axes, axis, extra))
        if (missing := np.flatnonzero(gone & ~axis.masked)).size:
            raise ValueError(
                f"the mask of {axis.tensor!r} keeps channels {listed(missing)}, which the layers it shares them with "
                "mask; align the masks (align and dependency_group_id in config_list)"
            )
    return removed


def _why_it_stays(groups: PrunableGroups, axes: MaskedAxes, axis: MaskedAxis, channels: NDArray[np.int64]) -> str:
    """Why masked channels cannot be removed."""
    what = f"the mask of {axis.tensor!r} takes channels {listed(channels)}"
    for group in groups:
        for m in filter(axis.of, group.members):
            wanted = set(m.units[np.isin(m.channels, channels)].tolist())
            if not wanted:
                continue
            makers = {p.name for p in group.producers if wanted - _masked_whole(p, axes)}
            readers = {c.name for c in group.consumers if wanted - _masked_whole(c, axes)}
            keep = sorted(makers | (readers if axis.role == "in" else set()))
            each = f" ({group.unit_size} channels of it go at a time)" if group.unit_size > 1 else ""
            return (
                f"{what}, but {', '.join(map(repr, keep))} shares them and keeps them{each}; masks of layers that "
                "share channels must agree (align and dependency_group_id in config_list)"
            )
    own = [e for e in groups.excluded if axis.module in e.layers]
    why = "; ".join(f"{e.name}: {e.reason}" for e in own) or "they belong to no group that can be pruned"
    return f"{what}, which cannot be removed: {why}"
