"""Latencies of plans and reports have names and one unit."""

import json
import math
import re
from dataclasses import replace

import pytest

from tp_importance.budget import Cost
from tp_importance.latency.times import LatencyTimes
from tp_importance.methods.resconv import LayerReport
from tp_importance.pruning.plan import Plan
from tp_importance.pruning.report import PruningReport

FULL = LatencyTimes(dense=4.0, dense_iqr=0.1, limit=2.0, predicted=1.9, measured=2.1, measured_iqr=0.2)
PLANNED = replace(FULL, measured=None, measured_iqr=None)
COST = Cost(macs=100, params=10)


def plan(times):
    return Plan({"a": 4}, COST, COST, {}, {"a": []}, latency_ms=times)


def pruning_report(times):
    return PruningReport([], COST, COST, COST, {}, 4.0, [], latency_ms=times)


def layer_report(times):
    return LayerReport([], COST, COST, {}, 4.0, latency_ms=times)


def test_text_names_what_is_known_in_order():
    assert str(FULL) == (
        "dense 4.000, dense_iqr 0.100, limit 2.000, predicted 1.900, measured 2.100, measured_iqr 0.200"
    )
    assert str(PLANNED) == "dense 4.000, dense_iqr 0.100, limit 2.000, predicted 1.900"
    assert str(LatencyTimes()) == "" and not LatencyTimes().is_limited and PLANNED.is_limited


@pytest.mark.parametrize("times", [FULL, PLANNED, LatencyTimes(), LatencyTimes(dense=0.0)])
@pytest.mark.parametrize("make", [plan, pruning_report, layer_report])
def test_plans_and_reports_keep_them(make, times):
    made = make(times)
    again = type(made).from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made and again.latency_ms == times
    assert LatencyTimes.from_dict(times.to_dict()) == times


@pytest.mark.parametrize("make", [pruning_report, layer_report])
def test_reports_show_them_only_if_a_latency_was_limited(make):
    assert f"latency, ms: {FULL}" in str(make(FULL)).splitlines()
    assert "latency" not in str(make(LatencyTimes()))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], TypeError, "from a dict of milliseconds, not from list"),
        ({"dense_ms": 1.0}, ValueError, "unknown latency 'dense_ms'; known are dense, dense_iqr"),
        ({"dense": "1.0"}, ValueError, "latency dense='1.0' must be a finite number"),
        ({"dense": True}, ValueError, "latency dense=True"),
        ({"limit": math.nan}, ValueError, "latency limit=nan"),
        ({"limit": math.inf}, ValueError, "latency limit=inf"),
    ],
)
def test_from_dict_refuses_what_to_dict_does_not_write(data, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LatencyTimes.from_dict(data)


def test_a_plan_names_its_field():
    data = {**plan(FULL).to_dict(), "latency_ms": {"dense": "fast"}}
    with pytest.raises(ValueError, match="plan field 'latency_ms' does not hold what to_dict"):
        Plan.from_dict(data)
