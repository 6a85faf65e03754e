"""CATRO's NNI pruner of small networks, for tests."""

import copy

import pytest

nni = pytest.importorskip("nni")

from nni_plugins import CATROPruner  # noqa: E402
from nni_plugins.testing import case, removed_filters  # noqa: E402

CONVS = {"op_types": ["Conv2d"], "sparse_ratio": 0.5}


def catro(name="plain", config_list=(CONVS,), **options):
    this = case(name)
    return CATROPruner(copy.deepcopy(this.model), list(config_list), **{"loader": this.loader, **options})


def widths(name="plain", config_list=(CONVS,), **options):
    """Widths after masking, read off the masks and off the plan."""
    pruner = catro(name, config_list, **options)
    _, masks = pruner.compress()
    for group in case(name).groups:
        if group.name in masks and group.name in pruner.plan.widths:
            assert group.width - removed_filters(masks, group.name) == pruner.plan.widths[group.name]
    return pruner.plan.widths
