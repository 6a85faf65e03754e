"""What surgery has removed so far, written down so that it can be repeated on the network as it was.

Two formats, both of plain lists, numbers and text:

* Torch-Pruning's: ``[[layer, is_out, positions], ...]``; what is coupled with these channels has to be found anew, by
  Torch-Pruning's graph or here by the groups of the network. These must be verified, if those were that were pruned: a
  reshape that can be read in two ways is answered by the verification;
* the direct one: ``[[name, side, positions], ...]``, one entry per place that was cut, see :class:`.cuts.Cut`; it is
  repeated without looking for groups at all.

Entries hold one after the other: positions refer to what the entries before have left.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ..core.listing import listed
from .cuts import Cut, cuts_of, scalings_of
from .groups import ChannelGroup, Index, PrunableGroups, Role
from .layer_pruners import LayerPruners
from .surgery import Cutter, remove_units

__all__ = ["PruningHistory", "is_direct", "repeat", "repeat_cuts", "units_of"]

_Place = tuple[str, Any]


@dataclass(frozen=True)
class PruningHistory:
    """All surgery on a network so far, in both formats.

    Attributes:
        direct: entries of the direct format.
        host: entries of Torch-Pruning's; ``None`` if what was removed has no form there.
    """

    direct: list[Any] = field(default_factory=list)
    host: list[Any] | None = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.direct or self.host)

    @classmethod
    def of(cls, groups: PrunableGroups, removed: Mapping[str, Sequence[int]], cuts: Sequence[Cut]) -> PruningHistory:
        """The history of one surgery.

        Args:
            groups: the groups before it.
            removed: units that were removed, per group name.
            cuts: what :func:`.surgery.remove_units` has cut.
        """
        return cls(cls.entries_of(cuts), _in_host_format(groups, removed))

    @staticmethod
    def entries_of(cuts: Sequence[Cut]) -> list[Any]:
        """Cuts as entries of the direct format."""
        return [[cut.name, cut.side, list(cut.positions)] for cut in cuts]

    def then(self, later: PruningHistory) -> PruningHistory:
        """This history, and what came after it."""
        host = None if self.host is None or later.host is None else [*self.host, *later.host]
        return PruningHistory([*self.direct, *later.direct], host)

    def entries(self, *, direct: bool = False) -> list[Any]:
        """A copy of the entries.

        Args:
            direct: in the direct format, not in Torch-Pruning's.

        Raises:
            RuntimeError: if Torch-Pruning's format cannot say it.
        """
        if not direct and self.host is None:
            raise RuntimeError(
                "Torch-Pruning's format cannot say what was removed: it comes from a direct history and is not made up "
                "of whole units of the groups; use pruning_history(direct=True)"
            )
        return [[name, side, list(positions)] for name, side, positions in (self.direct if direct else self.host or ())]


def repeat(history: Sequence[Any], groups: PrunableGroups) -> PruningHistory:
    """Remove again what a history says, in place.

    Args:
        history: entries in either format.
        groups: all groups of the model, which must be as it was when the history began. For Torch-Pruning's format they
            must be verified, as :func:`~tp_importance.prunable_groups` does by default, if the groups were that the
            history is of.

    Returns:
        The same history in both formats.

    Raises:
        ValueError: if an entry is none, if the network lacks what is named, or if channels in Torch-Pruning's format
            split a unit or are in no group; nothing is changed then.
        RuntimeError: if not exactly that is gone afterwards.

    Example:
        >>> import torch
        >>> from tp_importance import prunable_groups
        >>> make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> net, twin, x = make(), make(), torch.zeros(1, 3, 8, 8)
        >>> done = repeat([["0", True, [1, 5]], ["0", True, [0]]], prunable_groups(net, x))
        >>> done.direct
        [['0', 'out', [0, 1, 5]], ['2', 'in', [0, 1, 5]]]
        >>> repeat(done.direct, prunable_groups(twin, x)).host, twin[0].out_channels
        ([['0', True, [0, 1, 5]]], 5)
    """
    entries = [_checked(entry) for entry in history]
    if not is_direct(entries):
        removed = units_of(entries, groups)
        cuts = remove_units(groups, removed)
        return PruningHistory(PruningHistory.of(groups, removed, cuts).direct, entries)
    cuts, given = _at_once(entries), groups.options.customized_pruners
    host = _explained(cuts, groups, LayerPruners(groups.trace.model, given))
    repeat_cuts(groups.trace.model, entries, given, groups)
    return PruningHistory(entries, host)


def repeat_cuts(
    model: nn.Module,
    history: Sequence[Any],
    customized_pruners: Mapping[Any, Any] | None = None,
    groups: Iterable[ChannelGroup] = (),
) -> list[Cut]:
    """Remove again what a direct history says, in place; the network is neither run nor traced.

    Args:
        model: as it was when the history began.
        history: entries in the direct format.
        customized_pruners: the user's pruning functions, as they were given then.
        groups: of the network, if the weights that it has are to stay of use: see :func:`.cuts.scalings_of`.

    Returns:
        What was cut.

    Raises:
        ValueError: if an entry is none, or the network lacks what is named; nothing is changed then.
        RuntimeError: if not exactly that is gone afterwards.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> [str(cut) for cut in repeat_cuts(net, [["0", "out", [1]], ["2", "in", [1]]])], net[2].in_channels
        (['outputs of 0', 'inputs of 2'], 7)
    """
    entries = [_checked(entry) for entry in history]
    if any(isinstance(side, bool) for _, side, _ in entries):
        raise ValueError("a direct history has no entries [module name, is_out, positions] of Torch-Pruning's")
    cuts, pruners = _at_once(entries), LayerPruners(model, customized_pruners)
    Cutter(model, pruners).make(cuts, scalings_of(groups, cuts))
    return cuts


def is_direct(history: Sequence[Any]) -> bool:
    """Whether a history says layer by layer what was cut, and is not in Torch-Pruning's format."""
    return not all(isinstance(side, bool) for _, side, _ in history)


def _checked(entry: Any) -> list[Any]:
    """An entry as name, side and positions, of builtin types."""
    try:
        name, side, positions = entry
        found = [operator.index(i) for i in positions]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{entry!r} is no entry [name, side, positions] of a history") from error
    known = (isinstance(side, int) and side >= 0) or side in ("out", "in", "attribute")
    if not isinstance(name, str) or not known or min(found, default=0) < 0 or len(set(found)) < len(found):
        raise ValueError(f"{entry!r} is no entry [name, side, positions] of a history")
    return [name, side, found]


# -- positions: which are left behind what has gone


def _left(positions: Index, gone: Sequence[int]) -> Index:
    """Positions that stay, as they are counted when ``gone`` is no longer there."""
    return positions - np.searchsorted(np.sort(np.asarray(gone, np.int64)), positions)


def _before(positions: Sequence[int], gone: Sequence[int]) -> list[int]:
    """The reverse: where positions were before ``gone`` went."""
    everything = np.arange(max(positions, default=-1) + 1 + len(gone))
    return np.delete(everything, [g for g in gone if g < len(everything)])[list(positions)].tolist()


# -- Torch-Pruning's format


def _in_host_format(groups: PrunableGroups, removed: Mapping[str, Sequence[int]]) -> list[Any] | None:
    """One entry per root; groups that a split made of one dimension share theirs, and go together."""
    parts: dict[_Place, list[tuple[ChannelGroup, Sequence[int], Index]]] = defaultdict(list)
    modules = dict(groups.trace.model.named_modules())
    for name, units in removed.items():
        if not len(units):
            continue
        group = groups[name]
        if group.root[0] in modules:
            parts[group.root].append((group, units, np.asarray(group.removed_channels(units), np.int64)))
            continue
        member = next((m for m in group.members if m.axis is None), None)
        if member is None:
            return None
        parts[member.name, member.role].append((group, units, member.positions(units)))
    entries, gone = [], defaultdict[_Place, list[int]](list)
    for (name, role), found in parts.items():
        positions = np.sort(np.concatenate([p for _, _, p in found]))
        entries.append([name, role == "out", _left(positions, gone[name, role]).tolist()])
        for group, units, _ in found:
            _note(gone, group, units)
    return entries


def _note(gone: dict[_Place, list[int]], group: ChannelGroup, units: Sequence[int]) -> None:
    """Add what goes with some units; of a tensor of its own no entry of this format speaks."""
    for member in group.members:
        gone[member.name, member.role] += member.positions(units).tolist()


def units_of(entries: Sequence[Any], groups: PrunableGroups) -> dict[str, list[int]]:
    """The units, per group name, that the channels of Torch-Pruning's entries make up.

    Args:
        entries: in Torch-Pruning's format.
        groups: of the network as it was when the history began.

    Raises:
        ValueError: if an entry is none, or if channels split a unit or are in no group.
    """
    removed: dict[str, list[int]] = defaultdict(list)
    gone = defaultdict[_Place, list[int]](list)
    checked = [_checked(entry) for entry in entries]
    if not all(isinstance(side, bool) for _, side, _ in checked):
        raise ValueError("this is a direct history: repeat_cuts(model, history) repeats it")
    for name, is_out, positions in checked:
        role: Role = "out" if is_out else "in"
        named = dict(zip(_before(positions, gone[name, role]), positions, strict=True))
        unknown, found = set(named), []
        for group in groups:
            member = group.member(name, role)
            asked = np.isin(member.channels, list(named)) if member is not None else np.zeros(0, bool)
            if member is None or not asked.any():
                continue
            units = np.unique(member.units[asked])
            split = np.intersect1d(units, member.units[~asked])
            if split.size:
                parts = [named[int(p)] for p in member.channels[asked & np.isin(member.units, split)]]
                raise ValueError(
                    f"channels {parts} ({role}) of {name} are only a part of what goes with them{_open(groups)}"
                )
            unknown -= set(member.channels[asked].tolist())
            found.append((group, units.tolist()))
        if unknown:
            raise ValueError(
                f"channels {listed(sorted(named[p] for p in unknown))} ({role}) of {name} are in no group that can be "
                "pruned; if the history is of a pruner with another forward_fn, ignored_layers or the like, the groups "
                "must be found with the same"
            )
        for group, units in found:
            removed[group.name] += units
            _note(gone, group, units)
    return removed


def _open(groups: PrunableGroups) -> str:
    """What else can explain that groups do not fit a history: they hang on answers that only verification gives."""
    if not groups.trace.labels.questions:
        return ""
    return (
        "; the code reshapes or cuts channels in a way that one pass cannot tell: if the groups were verified when the "
        "history began, these must be, too (the default of prunable_groups and pruners), or take the direct history, "
        "pruning_history(direct=True)"
    )


# -- the direct format


def _at_once(entries: Sequence[Any]) -> list[Cut]:
    """The cuts of all entries in one step."""
    gone = defaultdict[_Place, list[int]](list)
    for name, side, positions in entries:
        gone[name, side] += _before(positions, gone[name, side])
    return [Cut(name, side, tuple(sorted(found))) for (name, side), found in gone.items() if found]


def _explained(cuts: Sequence[Cut], groups: PrunableGroups, pruners: LayerPruners) -> list[Any] | None:
    """Torch-Pruning's entries for cuts; ``None`` if they are not whole units of groups."""
    wanted = {(cut.name, cut.side): cut.positions for cut in cuts}
    removed: dict[str, list[int]] = {}
    for group in groups:
        for member in group.members:
            side = member.role if member.axis is None else member.axis
            if (member.name, side) in wanted:
                asked = np.isin(member.channels, wanted[member.name, side])
                units = np.setdiff1d(member.units[asked], member.units[~asked]).tolist()
                removed.update({group.name: units} if units else {})
                break
    plan = [(groups[name], units) for name, units in removed.items()]
    found = {(cut.name, cut.side): cut.positions for cut in cuts_of(plan, groups.trace.model, pruners)}
    return _in_host_format(groups, removed) if found == wanted else None
