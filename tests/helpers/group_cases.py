"""What the groups of the small networks are, wrong ones, widths at random; and torchvision networks, traced once."""

import dataclasses
from functools import cache

import numpy as np

from helpers.networks import make_zoo_network
from tp_importance import prunable_groups
from tp_importance.graph.groups import PrunableGroups
from tp_importance.testing.cases import Case

# name: width, or (width, unit size, fewest units)
EXPECTED = {
    "plain": {"0.0": 8, "1.0": 12, "2.0": 16},
    "residual": {"0.0": 8, "1.body.0.0": 12, "2.body.0.0": 16, "2.body.1.0": 24},
    "concat": {"stem.0": 8, "left.0": 12, "right.0": 16, "tail.0.0": 24},
    "dense": {"0": 12, "1.conv": 8, "2.conv": 8, "3.conv": 8},
    "depthwise": {"0.0": 8, "1.body.0": 24, "2.body.0": 32, "2.body.6": 16},
    "grouped": {"0.0": 12, "1.body.0.0": (16, 4, 2), "1.body.1.0": (16, 4, 2), "2.0": 24},
    "split": {"stem.0/0": 8, "stem.0/1": 12, "left.0": 16, "right.0": 24},
    "split_swapped": {"stem.0/0": 10, "stem.0/1": 10, "left.0": 16, "right.0": 24},
    "flatten": {"0.0": 8, "1.0": 12, "3": 24},
    "se": {"0.0": 12, "1.gate.1": 6, "2.0": 16, "3.gate.1": 8},
    "shared_input": {"stem.0": 12, "a.0": 16, "c.0": 8},
    "transposed": {"encoder.0": 8, "bottom.0": 24, "up.0": 12, "tail.0.0": 16},
    "transformer_mlp": {"embed": 24, "blocks.0.mlp.1": 40, "blocks.1.mlp.1": 48},
    "padded_shortcut": {
        "features.0.0": 8,
        "features.1.body.0.0": 8,
        "features.2.body.0.0": 12,
        "features.3.body.0.0": 16,
    },
    "no_bn": {"0": 8, "2": 12, "5": 16},
    "preact": {"0": 8, "1.conv1": 12, "2.shortcut": 24, "2.conv1": 16},
}


def whole(groups):
    return {
        g.name: g.width if g.unit_size == 1 and g.min_units == 1 else (g.width, g.unit_size, g.min_units)
        for g in groups
    }


def shifted(groups):
    """The groups with every position moved by one: a surgery that is off by one, as seen from the gates."""
    twins = []
    for group in groups:
        members = [dataclasses.replace(m, channels=np.roll(m.channels, 1)) for m in group.members]
        twins.append(dataclasses.replace(group, members=tuple(members)))
    return PrunableGroups(twins, groups.excluded, groups.trace, groups.options)


def reasons(model, x, **options):
    """What is left alone, and why."""
    return {e.name: e.reason for e in prunable_groups(model, x, **options).excluded}


@cache
def zoo(name: str, verify: bool = False) -> Case:
    """No group of these is refused, which tests/graph/test_verify.py makes sure of; it takes seconds."""
    model, x = make_zoo_network(name)
    return Case(model, x[:1], prunable_groups(model, x[:1], verify=verify))


def random_units(groups: PrunableGroups, seed: int) -> dict[str, int]:
    """Admissible widths, in units."""
    rng = np.random.default_rng(seed)
    return {g.name: int(rng.integers(g.min_units, g.n_units + 1)) for g in groups}


def removal(groups: PrunableGroups, seed: int) -> dict[str, list[int]]:
    """Units to remove, at random, down to random widths."""
    rng = np.random.default_rng(seed)
    left = random_units(groups, seed)
    return {g.name: sorted(rng.permutation(g.n_units)[left[g.name] :].tolist()) for g in groups}
