"""Predicted latencies against measured ones, by a clock that reads the shapes."""

import copy

import numpy as np
import pytest

from helpers.group_cases import random_units
from helpers.latency_cases import HALF, L2, Clock, timed
from tp_importance import (
    BudgetPruner,
    LatencyTable,
)
from tp_importance.graph.surgery import remove_units
from tp_importance.testing import TOPOLOGIES, Snapshot, make_network, topology


def vector(groups, units):
    return np.array([units[g.name] for g in groups])


# -- the model


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_predicted_is_measured_at_any_widths(name):
    """The clock is bilinear in the widths, so interpolation and calibration must find it exactly."""
    case, model = topology(name), timed(name)
    if len(model.calibration) > 1:
        assert (model.overhead_ms, model.scale) == pytest.approx((0.25, 1.5), rel=1e-6)
    for seed in range(3):
        units = random_units(case.groups, seed)
        twin = copy.deepcopy(case.model)
        removed = {g.name: range(units[g.name], g.n_units) for g in case.groups}
        remove_units(case.groups, removed, model=twin)
        assert model.predict(vector(case.groups, units)) == pytest.approx(Clock()(twin, case.x).median_ms, rel=1e-6)


@pytest.mark.parametrize("name", ["residual", "concat", "grouped", "depthwise", "split"])
def test_marginals_are_differences(name):
    case, model = topology(name), timed(name, 4)
    u = np.array([g.min_units for g in case.groups])
    step = np.array([min(3, g.n_units - g.min_units) for g in case.groups])
    for g, change in enumerate(model.marginal(u, step)):
        more = u.copy()
        more[g] += step[g]
        assert change == pytest.approx(model.predict(more) - model.predict(u), abs=1e-12)


def test_stairs_of_the_machine_show():
    case, model = topology("plain"), timed("plain", 4)
    full = np.array([g.n_units for g in case.groups])
    steps = np.diff([model.predict([u, *full[1:]]) for u in range(1, 9)])
    within_stair, next_stair = np.delete(steps, 3), steps[3]  # the consumer has no stairs on its input side
    assert within_stair == pytest.approx(within_stair[0]) and next_stair > 1.5 * within_stair[0] > 0


def test_measuring_leaves_the_network_alone():
    model, x = make_network("residual")
    model.train()
    model[0][0].weight.requires_grad_(False)
    snapshot = Snapshot(model)
    options = {"importance": L2(), "budget": HALF}
    BudgetPruner(model, x, latency_table=LatencyTable(measure=Clock()), **options).plan()
    snapshot.check()

    def broken(*_, **__):
        raise RuntimeError("no clock")

    with pytest.raises(RuntimeError, match="no clock"):
        BudgetPruner(model, x, latency_table=LatencyTable(measure=broken), **options).plan()
    snapshot.check()
