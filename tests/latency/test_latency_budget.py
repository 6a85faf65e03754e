"""Latency budgets for widths, by a clock that reads the shapes: everything here is exact, nothing is timed."""

import copy
import json
import math
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.allocation_cases import random_curves
from helpers.group_cases import random_units
from tp_importance import (
    Budget,
    BudgetError,
    BudgetPruner,
    CATROPruner,
    CostModel,
    ITPruner,
    Latency,
    LatencyModel,
    LatencyTable,
    Plan,
    ProgramAllocator,
    PruningReport,
    PSAPPruner,
    WidthSpace,
    greedy,
    prunable_groups,
    uniform,
)
from tp_importance.allocation.greedy import allocate, proportional, round_down, within
from tp_importance.core.guards import preserved
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.tracing import Call
from tp_importance.graph.verify import same_groups
from tp_importance.latency.table import conditions_of, timed_layer
from tp_importance.maths.latency import Grid, Surfaces, calibrate, knots, monotone, stair
from tp_importance.testing import TOPOLOGIES, Snapshot, make_network, topology

L2 = partial(tp.importance.MagnitudeImportance, p=2)
HALF = Budget(latency=0.5)


class Clock:
    """Milliseconds from shapes: layers with weights have stairs of `step` outputs; a network has overhead."""

    def __init__(self, step=1, overhead=0.25, scale=1.5):
        self.step, self.overhead, self.scale, self.calls = step, overhead, scale, 0

    def __call__(self, model, x, *, forward_fn=None, min_run_time=0.5):
        self.calls += 1
        total, handles = [], []
        leaves = [m for m in model.modules() if not list(m.children())]
        for module in leaves:
            handles.append(module.register_forward_hook(lambda m, args, out: total.append(self.layer(m, args[0], out))))
        with preserved(model), torch.no_grad():
            model.eval()
            (forward_fn or (lambda m, v: m(*v) if isinstance(v, tuple) else m(v)))(model, x)
        for handle in handles:
            handle.remove()
        alone = len(leaves) == 1 and leaves[0] is model
        ms = sum(total) if alone else self.overhead + self.scale * sum(total)
        return Latency(ms, 0.125, 1, 1, "fake", 1)

    def layer(self, module, x, out):
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            weight = module.weight
            transposed = getattr(module, "transposed", False)
            outputs = weight.shape[1] if transposed else weight.shape[0]
            inputs = weight.numel() // outputs
            places = 1 if isinstance(module, nn.Linear) else out.shape[-1]
            return 1e-5 * inputs * math.ceil(outputs / self.step) * self.step * places
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return 1e-6 * out.numel()
        return 0.0


@cache
def timed(name, step=1):
    case = topology(name)
    table = LatencyTable(measure=Clock(step))
    return LatencyModel.measure(case.groups, case.x, table)


def cost_of(name, step=1):
    return replace(CostModel.from_groups(topology(name).groups), latency=timed(name, step))


def vector(groups, units):
    return np.array([units[g.name] for g in groups])


# -- mathematics


def test_knots_are_ends_of_stairs():
    assert knots(256, 16) == [16, 64, 128, 192, 256]
    assert knots(100, 16) == [16, 32, 64, 80, 100]
    assert knots(12, 1, 4) == [4, 8, 12] and knots(1) == [1] and knots(3, 16) == [3]


@pytest.mark.parametrize("step", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("width", [64, 100, 256])
def test_stairs_are_found(step, width):
    rng = np.random.default_rng(step)
    assert stair(lambda c: (5 + math.ceil(c / step)) * (1 + 0.002 * rng.standard_normal()), width) == step


def test_flat_layers_have_no_stairs():
    assert stair(lambda c: 1.0, 256) == 1 and stair(lambda c: 1.0, 3) == 1


def test_monotone():
    times = np.array([[1.0, 3.0, 2.0], [2.0, 4.0, 5.0]])
    assert monotone(times).tolist() == [[1.0, 2.5, 2.5], [2.0, 4.0, 5.0]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = monotone(rng.random((4, 5)))
        assert (np.diff(found, axis=0) >= 0).all() and (np.diff(found, axis=1) >= 0).all()
        assert monotone(found).tolist() == found.tolist()


def test_surfaces_are_exact_at_the_grid_and_monotone_between():
    rng = np.random.default_rng(1)
    grids = []
    for inputs, outputs, steps in (([1], [4, 8, 30], (1, 4)), ([16, 32, 60], [1, 5], (16, 1)), ([3], [2], (1, 1))):
        grids.append(Grid(inputs, outputs, monotone(rng.random((len(inputs), len(outputs)))).tolist(), steps))
    surfaces = Surfaces(grids)
    for n, g in enumerate(grids):
        for i, o in np.ndindex(len(g.inputs), len(g.outputs)):
            assert surfaces(np.array([n]), [g.inputs[i]], [g.outputs[o]]) == pytest.approx(g.ms[i][o], rel=1e-12)
        wide = np.arange(0, g.outputs[-1] + 1)
        for i in range(1, g.inputs[-1] + 1):
            layer, row = np.full(len(wide), n), surfaces(np.full(len(wide), n), np.full(len(wide), i), wide)
            assert (np.diff(row) >= 0).all() and row[0] == 0
            assert (surfaces(layer, np.full(len(wide), i + 1), wide) >= row - 1e-15).all()


def test_calibration():
    assert calibrate([1.0, 2.0, 3.0], [2.5, 4.0, 5.5]) == pytest.approx((1.0, 1.5))
    overhead, scale = calibrate([1.0, 4.0], [1.0, 5.0])  # an overhead below 0 would be needed
    assert overhead == 0 and 1 < scale < 1.25
    with pytest.raises(ValueError, match="cannot calibrate"):
        calibrate([1.0], [0.0])


# -- the table


def test_table_survives_in_its_file(tmp_path):
    case, path, clock = topology("residual"), tmp_path / "sub" / "table.json", Clock()
    first = LatencyModel.measure(case.groups, case.x, LatencyTable(path, measure=clock))
    layers = clock.calls
    again = LatencyTable(path, measure=clock)
    second = LatencyModel.measure(case.groups, case.x, again)
    assert clock.calls - layers == 3 * (1 + 3) and len(again) > 20  # only networks: three times the dense and 3 copies
    u = np.array([g.min_units for g in case.groups])
    assert first.predict(u) == second.predict(u)
    again.save()
    assert json.loads(path.read_text())["conditions"]["threads"] == torch.get_num_threads()


def test_layers_of_one_shape_are_timed_once():
    x, clock = torch.zeros(1, 4, 5, 5), Clock()
    table = LatencyTable(measure=clock).use(conditions_of(nn.Conv2d(4, 4, 3), x))
    for _ in range(2):
        layer = timed_layer(nn.Conv2d(4, 4, 3), Call("a", (1, 4, 5, 5), (1, 4, 3, 3), 1))
        grid = table.grid(layer)
    assert len(table) == clock.calls and grid.inputs == grid.outputs == [1, 2, 3, 4]
    other = timed_layer(nn.Conv2d(4, 4, 3, stride=2), Call("b", (1, 4, 5, 5), (1, 4, 2, 2), 1))
    assert other.key != layer.key


@pytest.mark.parametrize("what", ["device", "threads", "torch", "dtype", "memory_format"])
def test_foreign_tables_are_refused_or_replaced(tmp_path, what):
    path = tmp_path / "table.json"
    table = LatencyTable(path, measure=Clock()).use(conditions_of(nn.Linear(2, 2), torch.zeros(1, 2)))
    layer = timed_layer(nn.Linear(2, 2), Call("fc", (1, 2), (1, 2), 4))
    table.grid(layer)
    table.save()
    content = json.loads(path.read_text())
    content["conditions"][what] = "another"
    path.write_text(json.dumps(content))
    here = conditions_of(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=rf"other conditions \({what}: 'another', here .*remeasure=True"):
        LatencyTable(path).use(here)
    fresh = LatencyTable(path, remeasure=True, measure=Clock()).use(here)
    assert len(fresh) == 0 and fresh.conditions == here


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "tp_importance.latency.table", "version": 0}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no latency table"):
        LatencyTable(path)
    with pytest.raises(ValueError, match="min_run_time"):
        LatencyTable(min_run_time=0)


def test_conditions_know_the_memory_format():
    net, x = nn.Conv2d(4, 4, 3), torch.zeros(2, 4, 5, 5)
    assert conditions_of(net, x)["memory_format"] == "contiguous"
    last = x.contiguous(memory_format=torch.channels_last)
    assert conditions_of(net, last)["memory_format"] == "channels_last"
    seen = []

    def measure(module, inputs, **_):
        seen.append(inputs.is_contiguous(memory_format=torch.channels_last))
        return Latency(1.0, 0.0, 1, 1, "", 1)

    table = LatencyTable(measure=measure).use(conditions_of(net, last))
    table.time(timed_layer(net, Call("a", (2, 4, 5, 5), (2, 4, 3, 3), 1)), 3, 2)
    assert seen == [True]


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
        remove_units(same_groups(twin, case.x, case.groups), removed)
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


# -- allocators


def user_allocator(curves, cost, space, limits):
    """Knows MACs only, and asks for no more than they."""
    assert set(limits) <= {"macs", "params"}
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = within(cost, round_down(space, middle * space.full), limits)
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
                assert not within(cost, more, limits), f"{cost.names[g]} could grow to {higher}"


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
    assert plan.latency_ms["dense"] == dense and plan.latency_ms["limit"] == dense / 2
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    report = this.step()
    times = report.latency_ms
    assert list(times) == ["dense", "dense_iqr", "limit", "predicted", "measured", "measured_iqr"]
    assert times["predicted"] <= times["limit"] and times["measured"] == pytest.approx(times["predicted"], rel=1e-6)
    assert times["measured"] == Clock()(this.model, this.example_inputs).median_ms
    assert "latency, ms: dense " in str(report) and times["measured_iqr"] == 0.125
    assert PruningReport.from_dict(json.loads(report.to_json())) == report


def test_milliseconds_and_fractions_agree():
    dense = pruner().measure_latency().dense.median_ms
    assert pruner(budget=Budget(latency_ms=0.5 * dense)).plan().widths == pruner().plan().widths


@pytest.mark.parametrize("allocator", ["greedy", "uniform", ProgramAllocator(), user_allocator])
def test_combined_budget(allocator):
    this = pruner(budget=Budget(latency=0.7, params=0.4), allocator=allocator)
    report = this.step()
    assert report.cost.params <= 0.4 * report.dense.params and report.limits == this.budget.limits(this.dense)
    assert report.latency_ms["measured"] <= report.latency_ms["limit"]


def test_repeated_steps_refer_to_the_dense_network():
    clock = Clock()
    this = pruner(clock=clock)
    first = this.step(Budget(latency=0.7))
    asked = clock.calls
    second = this.step(Budget(latency=0.4))
    assert clock.calls - asked == 3  # nothing is measured again but the result
    assert second.latency_ms["limit"] == 0.4 * first.latency_ms["dense"]
    assert second.latency_ms["measured"] == pytest.approx(second.latency_ms["predicted"], rel=1e-6)
    assert second.latency_ms["predicted"] <= second.latency_ms["limit"]
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
    assert clock.calls == 0 and report.latency_ms == {} and "latency" not in str(report)


def test_unreachable_latency_names_the_least():
    this = pruner(budget=Budget(latency_ms=0.3), max_pruning_ratio=0.5)
    with pytest.raises(BudgetError, match=r"0\.3 latency_ms cannot be reached.*floor [\d.]+ latency_ms are") as caught:
        this.plan()
    least = float(str(caught.value).split("Give at least ")[1].split(",")[0])
    assert this.plan(Budget(latency_ms=least * 1.001)).latency_ms["predicted"] == pytest.approx(least, rel=1e-3)


def test_budget_above_the_dense_latency_removes_nothing():
    this = pruner(budget=Budget(latency=1.0))
    with pytest.warns(UserWarning, match="already meets"):
        report = this.step()
    assert report.cost == report.dense and report.latency_ms["measured"] == report.latency_ms["dense"]


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
    assert report.latency_ms["measured"] <= report.latency_ms["limit"] * (1 + 1e-6)


def test_psap_says_that_it_counts():
    with pytest.raises(ValueError, match="PSAP's schedule works with counted costs only"):
        PSAPPruner(*make_network("residual"), budget=Budget(latency=0.5))


def test_by_the_clock(tmp_path):
    """A real table of a tiny network: times are there, and nothing else is promised."""
    model, x = make_network("plain")
    table = LatencyTable(tmp_path / "t.json", min_run_time=1e-4)
    budget = Budget(macs=0.5, latency_ms=1e6)  # a limit by the clock might be out of reach on a busy machine
    report = BudgetPruner(model, x, importance=L2(), budget=budget, latency_table=table).step()
    assert all(v >= 0 for v in report.latency_ms.values()) and (tmp_path / "t.json").exists()
