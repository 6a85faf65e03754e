import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from tp_importance.budget import Budget, Cost

DENSE = Cost(macs=40_551_808, params=272_474)


@pytest.mark.parametrize(
    ("macs", "limit"),
    [
        (0.5, 20_275_904),
        (0.3, 12_165_542),  # 12165542.4
        (0.7, 28_386_265),  # 28386265.6
        (1.0, 40_551_808),
        (1, 1),
        (12_345, 12_345),
        (10**9, 10**9),
        (np.float32(0.5), 20_275_904),
        (np.float64(0.5), 20_275_904),
        (np.int64(12_345), 12_345),
    ],
)
def test_limit(macs, limit):
    budget = Budget(macs=macs)
    assert budget.limits(DENSE) == {"macs": limit}
    assert type(budget.limits(DENSE)["macs"]) is int
    assert type(budget.macs) in (int, float)


def test_both_fields():
    budget = Budget(params=0.25, macs=7)
    assert budget.fields == ("macs", "params")
    assert budget.limits(DENSE) == {"macs": 7, "params": 68_118}


@pytest.mark.parametrize("name", ["macs", "params"])
@pytest.mark.parametrize(
    "value", [0, 0.0, -1, -0.5, 1.0001, 50.0, 1e6, math.nan, math.inf, -math.inf, True, False, np.True_, np.float32(2)]
)
def test_refused_values(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.*fraction in \(0, 1\].*{name}=0\.5"):
        Budget(**{name: value})


@pytest.mark.parametrize(("value", "suggestion"), [(50.0, "0.5"), (1.5, "0.015"), (100.0, "1.0"), (40e6, "40000000")])
def test_suggestion(value, suggestion):
    with pytest.raises(ValueError, match=f"did you mean {suggestion}\\?"):
        Budget(macs=value)


@pytest.mark.parametrize("value", ["0.5", [0.5], 1j, torch.tensor(0.5), np.array([0.5])])
def test_refused_types(value):
    with pytest.raises(TypeError, match="macs="):
        Budget(macs=value)


def test_empty():
    with pytest.raises(ValueError, match="macs, params"):
        Budget()


@pytest.mark.parametrize(
    ("budget", "noop"),
    [
        (Budget(macs=1.0), True),
        (Budget(macs=0.999), False),
        (Budget(macs=DENSE.macs), True),
        (Budget(macs=DENSE.macs - 1), False),
        (Budget(macs=1.0, params=1), False),
        (Budget(macs=10**12, params=10**12), True),
    ],
)
def test_noop(budget, noop):
    assert budget.is_noop(DENSE) is noop


@pytest.mark.parametrize("budget", [Budget(macs=0.5), Budget(params=3), Budget(macs=1.0, params=1), Budget(macs=1 / 3)])
def test_json_round_trip(budget):
    again = Budget.from_dict(json.loads(json.dumps(budget.to_dict())))
    assert again == budget
    assert [type(getattr(again, n)) for n in again.fields] == [type(getattr(budget, n)) for n in budget.fields]


def test_json_of_numpy_scalars():
    assert json.loads(json.dumps(Budget(macs=np.float32(0.5), params=np.int32(3)).to_dict())) == {
        "macs": 0.5,
        "params": 3,
    }


def test_from_dict_refuses():
    with pytest.raises(ValueError, match=r"'flops'=0\.5; known: macs, params"):
        Budget.from_dict({"flops": 0.5})
    with pytest.raises(TypeError, match="list"):
        Budget.from_dict([0.5])
    with pytest.raises(ValueError, match="empty"):
        Budget.from_dict({"macs": None})


def test_frozen_and_hashable():
    assert len({Budget(macs=0.5), Budget(macs=np.float64(0.5))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(macs=0.5).macs = 0.6


def test_limits_needs_a_cost():
    with pytest.raises(TypeError, match="Cost"):
        Budget(macs=0.5).limits({"macs": 1})


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (DENSE, "40.55 M MACs, 0.27 M params"),
        (Cost(4_089_184_256, 25_557_032), "4.09 G MACs, 25.56 M params"),
        (Cost(12_345, 0), "12.35 k MACs, 0 params"),
        (Cost(999, 99_999), "999 MACs, 100.00 k params"),
    ],
)
def test_cost_text(cost, text):
    assert str(cost) == text


def test_cost():
    assert Cost(np.int64(5), 6).as_dict() == {"macs": 5, "params": 6}
    assert type(Cost(np.int64(5), 6).macs) is int
    with pytest.raises(TypeError, match=r"macs=1\.5"):
        Cost(1.5, 2)
    with pytest.raises(ValueError, match="params=-1"):
        Cost(1, -1)


def test_latency():
    budget = Budget(latency=0.5, macs=0.25)
    assert budget.is_measured and budget.fields == ("macs", "latency")
    assert budget.latency_limit(8.0) == 4.0 and budget.limits(DENSE) == {"macs": DENSE.macs // 4}
    absolute = Budget(latency_ms=np.float32(2.5))
    assert absolute.is_measured and absolute.latency_limit(8.0) == 2.5 and absolute.limits(DENSE) == {}
    assert type(absolute.latency_ms) is float and type(Budget(latency_ms=3).latency_ms) is float
    assert not Budget(macs=0.5).is_measured and Budget(macs=0.5).latency_limit(8.0) is None
    for each in (budget, absolute):
        assert Budget.from_dict(json.loads(json.dumps(each.to_dict()))) == each


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"latency": 1}, "latency=1 is an int.*latency_ms="),
        ({"latency": 1.5}, "did you mean 0.015"),
        ({"latency": True}, "bool"),
        ({"latency": 0.5, "latency_ms": 2.0}, "not both"),
        ({"latency_ms": 0}, "give milliseconds above 0"),
        ({"latency_ms": -1.0}, "latency_ms=-1.0"),
        ({"latency_ms": math.inf}, "latency_ms=inf"),
        ({"latency_ms": math.nan}, "latency_ms=nan"),
        ({"latency_ms": True}, "latency_ms=True"),
        ({"latency_ms": "2"}, "latency_ms='2'"),
        ({"latency_ms": torch.tensor(2.0)}, "latency_ms=tensor"),
    ],
)
def test_refused_latencies(values, why):
    with pytest.raises((ValueError, TypeError), match=why):
        Budget(**values)


def test_a_latency_is_never_met_unmeasured():
    assert not Budget(latency=0.5).is_noop(DENSE) and not Budget(latency_ms=1e9, macs=1.0).is_noop(DENSE)
