"""What "within the limits" means: counts exactly, predictions up to the rounding of sums of floats."""

from dataclasses import replace

import numpy as np
import pytest

from tp_importance import prunable_groups
from tp_importance.graph.cost import COST_FIELDS, PREDICTED_TOLERANCE, CostModel, exceeded, headroom
from tp_importance.testing import make_network


class PerUnit:
    """A tenth of a millisecond for every unit."""

    def predict(self, units):
        return 0.1 * float(np.sum(units))

    def marginal(self, units, step):
        return 0.1 * np.asarray(step, float)


@pytest.fixture(scope="module")
def cost():
    return replace(CostModel.from_groups(prunable_groups(*make_network("residual"))), latency=PerUnit())


@pytest.mark.parametrize("field", COST_FIELDS)
def test_counts_are_exact(cost, field):
    rng = np.random.default_rng(0)
    for _ in range(20):
        units = rng.integers(1, cost.full + 1)
        spent = int(cost.evaluate(units)[COST_FIELDS.index(field)])
        assert cost.within(units, {field: spent}) and not cost.exceeded(units, {field: spent})
        assert not cost.within(units, {field: spent - 1})
        assert cost.exceeded(units, {field: spent - 1}) == {field: spent}


def test_all_limits_hold_and_those_exceeded_are_named(cost):
    macs, params = (int(v) for v in cost.evaluate(cost.full))
    limits = {"macs": macs, "params": params - 1, "latency_ms": 1e9}
    assert not cost.within(cost.full, limits)
    assert cost.exceeded(cost.full, limits) == {"params": params}
    assert cost.within(cost.full, {}) and cost.within(cost.full, {**limits, "params": params})


def test_a_prediction_stays_below_its_limit_by_the_tolerance(cost):
    spent = cost.spent(cost.full, ["latency_ms"])["latency_ms"]
    assert not cost.within(cost.full, {"latency_ms": spent})
    assert not cost.within(cost.full, {"latency_ms": spent * (1 + PREDICTED_TOLERANCE / 2)})
    assert cost.within(cost.full, {"latency_ms": spent * (1 + 2 * PREDICTED_TOLERANCE)})
    with pytest.raises(ValueError, match="the cost model predicts none"):
        replace(cost, latency=None).within(cost.full, {"latency_ms": 1.0})


def test_headroom_of_many_steps_is_that_of_each(cost):
    rng, half = np.random.default_rng(1), (cost.full + 1) // 2
    limits = {"macs": int(0.3 * cost.dense.macs), "params": int(0.4 * cost.dense.params), "latency_ms": 4.0}
    step = rng.integers(0, cost.full - half + 1)
    marginal = {**dict(zip(COST_FIELDS, cost.marginal(half, step), strict=True))}
    marginal["latency_ms"] = cost.timed.marginal(half, step)
    room = headroom(cost.spent(half, limits), limits)
    for g, s in enumerate(step):
        more = half.copy()
        more[g] += s
        assert cost.within(more, limits) == all(marginal[f][g] <= room[f] for f in limits)


def test_of_costs_by_name():
    assert exceeded({"macs": 5, "params": 7}, {"macs": 5}) == {}
    assert exceeded({"macs": 6, "params": 7}, {"macs": 5, "params": 6}) == {"macs": 6, "params": 7}
