"""Whether a group of Torch-Pruning couples the channels that labels couple: else it would cut wrongly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from .groups import PrunableGroups
from .labels.reasons import Index
from .layer_kinds import CONV, is_depthwise

__all__ = ["UnitsAt", "agrees", "units_at"]

UnitsAt = dict[tuple[str, str], Index]
"""Number of the unit, over all groups, per position of every side of a layer; -1 where channels stay."""


def units_at(groups: PrunableGroups) -> UnitsAt:
    """Units by side of a layer and position.

    Args:
        groups: the groups.
    """
    found: UnitsAt = {}
    first = 0
    for group in groups:
        for m in group.members:
            found.setdefault((m.name, m.role), np.full(m.width, -1, np.int64))[m.channels] = m.units + first
        first += group.n_units
    return found


def agrees(host_group: Any, groups: PrunableGroups, at: UnitsAt) -> bool:
    """Whether removal of channels by Torch-Pruning's own group is the removal of units.

    Every layer of the host's group must lose, with a root channel, positions of that channel's unit; every layer of a
    unit must be in it; and a unit of several root channels must come from grouped convolutions, which the host's
    pruners respect.

    Args:
        host_group: a ``tp.Group`` from a ``tp.DependencyGraph``.
        groups: of the same network.
        at: see :func:`units_at`.
    """
    graph = host_group._DG
    root, seen, blocks = None, set(), 1
    touched: set[int] = set()
    for item in host_group:
        module = item.dep.target.module
        role = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        name = graph._module2name.get(module, "")
        units = at.get((name, role))
        if units is None or item.root_idxs is None or any(i is None for i in item.root_idxs):
            if root is None or isinstance(module, (*CONV, nn.Linear)):
                return False
            continue
        root = units if root is None else root
        own, wanted = units[np.asarray(item.idxs, np.int64)], root[np.asarray(item.root_idxs, np.int64)]
        if not np.array_equal(own, wanted):
            return False
        seen.add((name, role))
        touched |= set(own.tolist())
        if isinstance(module, CONV) and not is_depthwise(module):
            blocks = math.lcm(blocks, module.groups)
    first = 0
    for group in groups:
        if touched & set(range(first, first + group.n_units)):
            missing = {(m.name, m.role) for m in group.members if m.axis is None} - seen
            if missing or (group.unit_size > 1 and not _in_blocks(root, blocks)):
                return False
        first += group.n_units
    return True


def _in_blocks(units: Any, blocks: int) -> bool:
    """Whether units are the j-th positions of equal blocks."""
    rows = units.reshape(blocks, -1) if len(units) % blocks == 0 else units[None]
    return bool((rows == rows[:1]).all()) and len(np.unique(rows[0])) == rows.shape[1]
