"""Groups after a removal are those that a new search finds."""

import numpy as np
import pytest

from helpers.group_cases import removal
from tp_importance import prunable_groups
from tp_importance.core.copies import copied
from tp_importance.graph.groups import ChannelGroup, Member, PrunableGroups
from tp_importance.graph.narrowing import narrowed
from tp_importance.graph.surgery import remove_units
from tp_importance.testing.networks import TOPOLOGIES, make_network


def said(groups, large):
    """Everything about groups of more than their least width."""
    return {
        g.name: (
            g.width,
            g.unit_size,
            g.root_channels.tolist(),
            g.root_units.tolist(),
            {(m.name, m.role): (m.kind, m.width, sorted(zip(m.channels, m.units, strict=True))) for m in g.members},
        )
        for g in groups
        if g.name in large
    }


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_as_found_anew(name):
    model, x = make_network(name)
    groups = prunable_groups(model, x)
    removed = removal(groups, seed=1)
    assert sum(map(len, removed.values()))
    left = narrowed(groups, removed)
    pruned = copied(model)
    remove_units(groups, removed, model=pruned)
    anew = prunable_groups(pruned, x, verify=lambda *_: {e.name: e.reason for e in groups.excluded})
    large = set(anew.names)
    assert large and said(left, large) == said(anew, large)


def test_attributes_and_axes_follow():
    unit = np.arange(4)
    tensor = Member("scale", "out", "passthrough", unit + 2, unit, 6, axis=0)
    other_axis = Member("scale", "out", "passthrough", unit, unit, 4, axis=1)
    number = Member("block.sizes.1", "out", "passthrough", unit, unit, 4)
    rest = Member("scale", "out", "passthrough", np.arange(2), np.arange(2), 6, axis=0)
    groups = PrunableGroups(
        [
            ChannelGroup("a", 4, 1, (tensor, other_axis), ("scale", "out"), unit + 2, unit, attributes=(number,)),
            ChannelGroup("b", 2, 1, (rest,), ("scale", "out"), np.arange(2), np.arange(2)),
        ],
        [],
        trace=None,
    )
    left = narrowed(narrowed(groups, {"b": [0]}), {"a": [0, 2]})
    assert [(m.channels.tolist(), m.units.tolist(), m.width) for m in left["a"].members] == [
        ([1, 2], [0, 1], 3),
        ([0, 1], [0, 1], 2),
    ]
    assert left["a"].root_channels.tolist() == [1, 2] and left["a"].attributes[0].width == 2
    assert left["b"].members[0].channels.tolist() == [0] and left["b"].members[0].width == 3


def test_unknown_units_are_refused():
    model, x = make_network("plain")
    groups = prunable_groups(model, x, verify=False)
    with pytest.raises(ValueError, match=r"units 0\.\.7, not \[8\]"):
        narrowed(groups, {"0.0": [8]})
