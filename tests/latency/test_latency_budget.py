"""Latency budgets for widths, by a clock that reads the shapes: everything here is exact, nothing is timed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from helpers.allocation_cases import random_curves
from helpers.latency_cases import HALF, L2, Clock, timed
from tp_importance import (
    Budget,
    BudgetError,
    BudgetPruner,
    CATROPruner,
    ITPruner,
    LatencyTable,
    PSAPPruner,
    prunable_groups,
)
from tp_importance.allocation.allocate import allocate
from tp_importance.allocation.greedy import greedy
from tp_importance.allocation.program import ProgramAllocator
from tp_importance.allocation.proportional import proportional, uniform
from tp_importance.allocation.space import WidthSpace, round_down
from tp_importance.graph.cost import CostModel
from tp_importance.graph.surgery import remove_units
from tp_importance.latency.model import LatencyModel
from tp_importance.pruning.plan import Plan
from tp_importance.pruning.report import PruningReport
from tp_importance.testing import make_network, topology


def cost_of(name, step=1):
    return replace(CostModel.from_groups(topology(name).groups), latency=timed(name, step))


# -- allocators


def user_allocator(curves, cost, space, limits):
    """Knows MACs only, and asks for no more than they."""
    assert set(limits) <= {"macs", "params"}
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = cost.within(round_down(space, middle * space.full), limits)
        low, high = (middle, high) if fits else (low, middle)
    return round_down(space, low * space.full)


ALL = {
    "greedy": greedy,
    "uniform": uniform,
    "program": ProgramAllocator(),
    "linear": ProgramAllocator(objective="linear"),
    "proportional": lambda *args: proportional(*args, np.arange(1, 1 + len(args[2].levels))),
    "user": user_allocator,
}


@pytest.mark.parametrize(("kind", "step"), [("latency", 1), ("latency", 4), ("macs too", 4), ("params too", 4)])
@pytest.mark.parametrize("allocator", ALL)
@pytest.mark.parametrize("name", ["residual", "depthwise", "grouped"])
def test_every_allocator_keeps_all_limits_and_uses_them(name, allocator, step, kind):
    groups = topology(name).groups
    cost, space, curves = cost_of(name, step), WidthSpace.of(groups.groups), random_curves(groups)
    low, high = (cost.timed.predict(u) for u in (space.floor, space.full))
    for fraction in (0.0, 0.5, 1.0):
        limits = {"latency_ms": low + (high - low) * fraction + 1e-6}
        if kind != "latency":
            field = kind.split()[0]
            least, most = (cost.spent(u, [field])[field] for u in (space.floor, space.full))
            limits[field] = int(least + 0.5 * (most - least))
        units = allocate(ALL[allocator], curves, cost, space, limits)
        spent = cost.spent(units, limits)
        assert all(spent[f] <= limit for f, limit in limits.items())
        for g, levels in enumerate(space.levels):
            for higher in levels[levels > units[g]][:1]:
                more = units.copy()
                more[g] = higher
                assert not cost.within(more, limits), f"{cost.names[g]} could grow to {higher}"


def test_greedy_takes_whole_stairs():
    """What costs nothing is never left out, and no first channel of a stair is bought for its own sake."""
    groups = topology("plain").groups
    cost, space, curves = cost_of("plain", 4), WidthSpace.of(groups.groups), random_curves(groups)
    flat = replace(cost, latency=Outputs(4, len(space.levels)))
    high = flat.timed.predict(space.full)
    for limit in np.linspace(3.001, high, 12):
        units = greedy(curves, flat, space, {"latency_ms": float(limit)})
        assert all(u % 4 == 0 or u == lv[-1] for u, lv in zip(units, space.levels, strict=True)), units


class Outputs:
    """Latency of outputs only, in stairs."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def predict(self, units):
        return float(np.ceil(np.asarray(units) / self.step).sum())

    def marginal(self, units, step):
        u = np.asarray(units)
        return np.ceil((u + step) / self.step) - np.ceil(u / self.step)


def test_a_limit_of_latency_needs_a_model():
    groups = topology("plain").groups
    with pytest.raises(ValueError, match=r"predicts none.*LatencyModel\.measure"):
        greedy(random_curves(groups), CostModel.from_groups(groups), WidthSpace.of(groups.groups), {"latency_ms": 1.0})


# -- pruners


def pruner(name="residual", budget=HALF, clock=None, **options):
    model, x = make_network(name)
    table = LatencyTable(measure=clock or Clock())
    return BudgetPruner(model, x, importance=L2(), budget=budget, latency_table=table, **options)


def test_report_shows_dense_predicted_and_measured():
    this = pruner()
    plan = this.plan()
    dense = Clock()(*make_network("residual")).median_ms
    assert plan.latency_ms.dense == dense and plan.latency_ms.limit == dense / 2
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    report = this.step()
    times = report.latency_ms
    assert list(times.to_dict()) == ["dense", "dense_iqr", "limit", "predicted", "measured", "measured_iqr"]
    assert times.predicted <= times.limit and times.measured == pytest.approx(times.predicted, rel=1e-6)
    assert times.measured == Clock()(this.model, this.example_inputs).median_ms
    assert "latency, ms: dense " in str(report) and times.measured_iqr == 0.125
    assert PruningReport.from_dict(json.loads(report.to_json())) == report


def test_milliseconds_and_fractions_agree():
    dense = pruner().measure_latency().dense.median_ms
    assert pruner(budget=Budget(latency_ms=0.5 * dense)).plan().widths == pruner().plan().widths


@pytest.mark.parametrize("allocator", ["greedy", "uniform", ProgramAllocator(), user_allocator])
def test_combined_budget(allocator):
    this = pruner(budget=Budget(latency=0.7, params=0.4), allocator=allocator)
    report = this.step()
    assert report.cost.params <= 0.4 * report.dense.params and report.limits == this.budget.limits(this.dense)
    assert report.latency_ms.measured <= report.latency_ms.limit


def test_repeated_steps_refer_to_the_dense_network():
    clock = Clock()
    this = pruner(clock=clock)
    first = this.step(Budget(latency=0.7))
    asked = clock.calls
    second = this.step(Budget(latency=0.4))
    assert clock.calls - asked == 3  # nothing is measured again but the result
    assert second.latency_ms.limit == 0.4 * first.latency_ms.dense
    assert second.latency_ms.measured == pytest.approx(second.latency_ms.predicted, rel=1e-6)
    assert second.latency_ms.predicted <= second.latency_ms.limit
    late = pruner()
    late.step(Budget(macs=0.5))
    with pytest.raises(RuntimeError, match="before its latency was measured"):
        late.plan(Budget(latency=0.5))


class EveryLayer(Clock):
    """Activations take time as well."""

    def layer(self, module, x, out):
        return super().layer(module, x, out) or 1e-6 * out.numel()


def test_the_calls_of_a_shared_module_keep_their_own_widths():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), relu, nn.Conv2d(8, 16, 3), relu, nn.Conv2d(16, 12, 3), relu)
    net.append(nn.Conv2d(12, 2, 3))
    x, clock = torch.randn(1, 3, 16, 16), EveryLayer()
    groups = prunable_groups(net, x)
    model = LatencyModel.measure(groups, x, LatencyTable(measure=clock))
    expected = model.predict([4, 8, 6])
    remove_units(groups, {"0": range(4), "2": range(8), "4": range(6)})
    again = model.of(prunable_groups(net, x))
    assert again.predict([4, 8, 6]) == expected == pytest.approx(clock(net, x).median_ms, rel=1e-6)
    assert again.predict([2, 8, 6]) == pytest.approx(model.predict([2, 8, 6]), rel=1e-9)


def test_what_is_not_limited_is_not_measured():
    clock = Clock()
    report = pruner(budget=Budget(macs=0.5), clock=clock).step()
    assert clock.calls == 0 and not report.latency_ms.is_limited and "latency" not in str(report)


def test_unreachable_latency_names_the_least():
    this = pruner(budget=Budget(latency_ms=0.3), max_pruning_ratio=0.5)
    with pytest.raises(BudgetError, match=r"0\.3 latency_ms cannot be reached.*floor [\d.]+ latency_ms are") as caught:
        this.plan()
    least = float(str(caught.value).split("Give at least ")[1].split(",")[0])
    assert this.plan(Budget(latency_ms=least * 1.001)).latency_ms.predicted == pytest.approx(least, rel=1e-3)


def test_budget_above_the_dense_latency_removes_nothing():
    this = pruner(budget=Budget(latency=1.0))
    with pytest.warns(UserWarning, match="already meets"):
        report = this.step()
    assert report.cost == report.dense and report.latency_ms.measured == report.latency_ms.dense


def test_a_busy_machine_is_noticed(monkeypatch):
    this = pruner(budget=Budget(latency=0.9))
    timed = this.measure_latency()
    limit = 0.9 * timed.dense.median_ms
    monkeypatch.setattr(timed, "dense", replace(timed.dense, median_ms=10 * timed.dense.median_ms))
    with pytest.raises(BudgetError, match=r"above the limit.*predicts.*busy"):  # by the table nothing has to go
        this.plan()
    with pytest.warns(UserWarning, match="the machine was busy"):
        this.plan(Budget(latency_ms=limit))


@pytest.mark.parametrize("kind", [CATROPruner, ITPruner])
def test_methods_get_it_from_the_budget_pruner(kind):
    model, x = make_network("residual")
    loader = [(torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)]
    report = kind(model, x, loader, budget=Budget(latency=0.5), latency_table=LatencyTable(measure=Clock())).step()
    assert report.latency_ms.measured <= report.latency_ms.limit * (1 + 1e-6)


def test_psap_says_that_it_counts():
    with pytest.raises(ValueError, match="PSAP's schedule works with counted costs only"):
        PSAPPruner(*make_network("residual"), budget=Budget(latency=0.5))


def test_by_the_clock(tmp_path):
    """A real table of a tiny network: times are there, and nothing else is promised."""
    model, x = make_network("plain")
    table = LatencyTable(tmp_path / "t.json", min_run_time=1e-4)
    budget = Budget(macs=0.5, latency_ms=1e6)  # a limit by the clock might be out of reach on a busy machine
    report = BudgetPruner(model, x, importance=L2(), budget=budget, latency_table=table).step()
    assert all(v >= 0 for v in report.latency_ms.to_dict().values()) and (tmp_path / "t.json").exists()
