import copy
import json

import pytest
import torch
import torch_pruning as tp
from torch import nn

from helpers.states import same_state, state
from tp_importance import (
    Budget,
    BudgetError,
    BudgetPruner,
    CATROImportance,
    PruningReport,
    Refit,
    prunable_groups,
    refit_consumers,
)
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.patches import consumer_weight, set_consumer_weight, unfolded_input
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import gates, sample_units
from tp_importance.refitting.layers import refittable
from tp_importance.testing import class_loader, make_network

L1 = tp.importance.MagnitudeImportance(p=1, normalizer=None)
EXACT = Refit("parallel", ridge=0.0, positions=None, recalibrate=False)
MODES = ["parallel", "sequential"]


def images(n=16, size=10, seed=0, dtype=torch.float32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_of(model, name, x):
    """What a layer receives, unfolded at all positions, and what it gives."""
    module, seen = model.get_submodule(name), []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out.detach())))
    with torch.no_grad():
        model(x)
    handle.remove()
    rows = [unfolded_input(module, a, b, None, torch.Generator()).flatten(0, 1) for a, b in seen]
    return torch.cat(rows)


def compensated(name, how=EXACT, dtype=torch.float64):
    """A topology before and after, its groups, what was removed, data and the report."""
    model, x = make_network(name)
    model, x = model.to(dtype), x.to(dtype)
    groups = prunable_groups(model, x, verify=False)  # none of those below is refused; it takes seconds
    removed = sample_units(groups)
    shape = x.shape[1:]
    data = torch.randn(16, *shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    dense = copy.deepcopy(model)
    report = refit_consumers(model, x, data.split(6), removed, how, groups=groups)
    return dense, model, groups, removed, data, report


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "dense", "depthwise", "grouped", "flatten", "se",
                                  "shared_input", "transposed", "no_bn", "preact", "split"])  # fmt: skip
def test_the_refit_is_least_squares_on_the_stored_activations(name):
    dense, _model, groups, removed, data, report = compensated(name)
    refits, skipped = refittable(groups, removed)
    assert refits and not skipped
    for r in refits:
        u = inputs_of(dense, r.name, data)
        old, new = consumer_weight(dense.get_submodule(r.name)), r.weight
        free = r.module.bias is not None or r.batch_norm is not None
        for g in range(len(old)):
            y = u[:, g] @ old[g].T
            left = u[:, g, r.kept[g]]
            if free:
                left, y = left - left.mean(0), y - y.mean(0)
            got = left @ new[g][:, r.kept[g]].T  # outputs, not weights: the inputs may be collinear
            assert not new[g][:, ~r.kept[g]].any()
            direct = left @ torch.linalg.lstsq(left, y, driver="gelsd").solution
            torch.testing.assert_close(got, direct, rtol=1e-6, atol=1e-6 * float(y.abs().max()))
    for row in report.rows:
        assert 0 <= row.after < row.before and row.removed > 0


@pytest.mark.parametrize("name", ["plain", "flatten", "no_bn", "transposed", "concat"])
def test_the_mean_output_of_every_consumer_is_kept(name):
    dense, model, groups, removed, data, _ = compensated(name, Refit("parallel", positions=None))
    for r in refittable(groups, removed)[0]:
        u = inputs_of(dense, r.name, data).mean(0)
        old, new = dense.get_submodule(r.name), r.module
        shift = ((r.weight - consumer_weight(old)) @ u.unsqueeze(2)).flatten()
        if new.bias is not None:
            torch.testing.assert_close(new.bias - old.bias, -shift)
        elif r.batch_norm is not None:
            names = {m: n for n, m in model.named_modules()}
            mean = dense.get_submodule(names[r.batch_norm]).running_mean
            torch.testing.assert_close(r.batch_norm.running_mean - mean, shift)


def test_neither_bias_nor_batch_norm_takes_the_uncentred_moments():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 2, 3))
    net, x = net.double().eval(), images(dtype=torch.float64)
    dense = copy.deepcopy(net)
    refit_consumers(net, x[:2], [x], {"0": [0, 3, 5]}, EXACT)
    u = inputs_of(dense, "2", x)[:, 0]
    kept = ~torch.isin(torch.arange(72) // 9, torch.tensor([0, 3, 5]))
    direct = torch.linalg.lstsq(u[:, kept], u @ dense[2].weight.flatten(1).T).solution
    torch.testing.assert_close(net[2].weight.flatten(1)[:, kept], direct.T)


def duplicated(name):
    """A network of which one group's second half of channels is twice its first half; and that group."""
    model, x = make_network(name)
    model, x = model.double(), x.double()
    groups = prunable_groups(model, x)
    group = next(g for g in groups if len(g.producers) == 1 and g.unit_size == 1)
    half = group.n_units // 2
    with torch.no_grad():
        for m in group.members:
            if m.role != "out" and m.kind != "passthrough":
                continue
            module = model.get_submodule(m.name)
            if m.kind == "consumer":
                continue
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.dim():
                    tensor[half : 2 * half] = tensor[:half]
    return model, x, groups, group.name, list(range(half, 2 * half))


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "depthwise", "flatten", "no_bn"])
@pytest.mark.parametrize("mode", MODES)
def test_duplicate_channels_go_without_a_trace(name, mode):
    model, x, groups, group, units = duplicated(name)
    data = torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = model(data)
    refit_consumers(model, x, [data], {group: units}, Refit(mode, 0.0, None, recalibrate=False), groups=groups)
    remove_units(groups, {group: units})
    torch.testing.assert_close(model(data), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max().detach()))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_removed_nothing_changed(mode):
    model, x = make_network("plain")
    before = state(model)
    report = refit_consumers(model, x, [images(size=16)], {}, mode)
    assert not report.rows and same_state(model, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, mode):
    _dense, model, _groups, _removed, _data, report = compensated("plain", Refit(mode), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(r.after <= r.before for r in report.rows) and any(r.after < r.before for r in report.rows)


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_decides(mode):
    def weights(seed):
        model = compensated("plain", Refit(mode, positions=2, seed=seed))[1]
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def naive_sequence(dense, model, groups, removed, data, recalibrate, downstream):
    """Consumer by consumer from full passes and stored activations: what both ways of the sequential mode must give."""
    refits = {r.name: r for r in refittable(groups, removed, downstream=downstream)[0]}
    own = [r.batch_norm for r in refits.values()]
    order = groups.trace.first_call()
    first = min(order[name] for name in refits)
    with torch.no_grad(), gates(model, groups, removed):
        for name in sorted(order, key=order.get):
            module = model.get_submodule(name)
            if name in refits:
                r = refits[name]
                u, v = inputs_of(dense, name, data), inputs_of(model, name, data)
                target = torch.einsum("ngd,god->ngo", u, consumer_weight(dense.get_submodule(name)))
                new = torch.zeros_like(r.weight)
                for g in range(len(new)):
                    left, y = v[:, g, r.kept[g]], target[:, g]
                    left, y = left - left.mean(0), y - y.mean(0)
                    start = r.weight[g][:, r.kept[g]].T
                    new[g][:, r.kept[g]] = (start + torch.linalg.pinv(left) @ (y - left @ start)).T
                shift = target.mean(0) - (new @ v.mean(0).unsqueeze(2)).squeeze(2)
                set_consumer_weight(module, new)
                if module.bias is not None:
                    module.bias.add_(shift.flatten())
                elif r.batch_norm is not None:
                    r.batch_norm.running_mean.sub_(shift.flatten())
            elif recalibrate and isinstance(module, nn.BatchNorm2d) and order[name] > first and module not in own:
                seen = []
                for net in (dense, model):
                    layer = net.get_submodule(name)
                    handle = layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
                    net(data)
                    handle.remove()
                (var_d, mean_d), (var_p, mean_p) = (torch.var_mean(x, (0, 2, 3)) for x in seen)
                module.running_mean.copy_(mean_p + (var_p / var_d).sqrt() * (module.running_mean - mean_d))
                module.running_var.mul_(var_p / var_d)


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "depthwise", "concat", "transposed"])
@pytest.mark.parametrize(("recalibrate", "downstream"), [(False, False), (True, False), (False, True)])
def test_one_sweep_equals_one_pass_per_consumer(name, recalibrate, downstream):
    dense, x = make_network(name)
    dense, x = dense.double(), x.double()
    data = torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wide = prunable_groups(dense, x, verify=False)
    removed = sample_units(wide)
    models, reports = [], []
    for limit in (4 << 30, 0):
        model = copy.deepcopy(dense)
        groups = prunable_groups(model, x, verify=False)
        how = Refit("sequential", 0.0, None, downstream, residual=False, memory_limit=limit, recalibrate=recalibrate)
        loader = data.split(6)
        reports.append(refit_consumers(model, x, loader, removed, how, groups=groups))
        models.append(model)
    naive = copy.deepcopy(dense)
    naive_sequence(dense, naive, prunable_groups(naive, x, verify=False), removed, data, recalibrate, downstream)
    assert reports[0].passes == 2 < reports[1].passes
    for a, b in zip(reports[0].rows, reports[1].rows, strict=True):
        assert a.name == b.name and a.after == pytest.approx(b.after, abs=1e-9)
        assert a.after < a.before or not a.removed
    remove = [prunable_groups(m, x, verify=False) for m in (*models, naive)]
    for groups in remove:
        remove_units(groups, removed)
    outputs = [m(data).detach() for m in (*models, naive)]
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0], other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


class Sums(nn.Module):
    """Two residual sums; what is removed in the first block is felt in the stream of the second."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.first(x)
        x = x[..., 2:-2, 2:-2].relu()  # made by a function: no module gives the summand
        x = self.second(nn.functional.pad(x, (2, 2, 2, 2))) + x
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("limit", [4 << 30, 0])
@pytest.mark.parametrize("positions", [None, 7])
def test_a_sum_is_refitted_as_a_whole(limit, positions):
    """At the last summand: dense sum - pruned sum, over the gain, is orthogonal to the features that are kept."""
    torch.manual_seed(0)
    dense = Sums().double().eval()
    dense.second[3].running_var.uniform_(0.5, 2.0)
    data = torch.randn(100, 3, 8, 8, dtype=torch.float64)
    sums = {}
    for residual in (True, False):
        model = copy.deepcopy(dense)
        groups = prunable_groups(model, data[:2], verify=False)
        removed = {"first.0": [0, 3, 5, 7], "second.0": [1, 2, 8]}
        how = Refit("sequential", 0.0, positions, residual=residual, memory_limit=limit)
        report = refit_consumers(model, data[:2], data.split(40), removed, how, groups=groups)
        assert [r.name for r in report.rows] == ["first.2", "second.0", "second.2", "head"]
        seen = []
        with gates(model, groups, removed):
            u = inputs_of(model, "second.2", data)[:, 0]
            for net in (dense, model):
                handle = net.second.register_forward_pre_hook(
                    lambda m, args, seen=seen: seen.append(args[0][..., 2:-2, 2:-2])
                )
                net(data)
                handle.remove()
                seen[-1] = (seen[-1] + net.second(nn.functional.pad(seen[-1], (2, 2, 2, 2)))).detach()
        error = (seen[0] - seen[1]).transpose(0, 1).flatten(1)
        sums[residual] = float(error.square().mean())
        if positions is None and residual:
            kept = u[:, u.abs().sum(0) > 0]
            assert kept.shape[1] == 81
            correlation = error @ (kept - kept.mean(0)) / (error.norm() * kept.norm())
            assert float(correlation.abs().max()) < 1e-9 and float(error.mean(1).abs().max()) < 1e-9
    assert sums[True] < sums[False]


def test_control_flow_that_depends_on_the_data_is_named():
    class Moody(Sums):
        def forward(self, x):
            return super().forward(x if len(x) == 2 else x.abs())

    model = Moody().double().eval()
    before = state(model)
    data = torch.randn(12, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="residual=False"):
        refit_consumers(model, data[:2], [data], {"first.0": [0, 3]}, Refit("sequential", recalibrate=False))
    assert same_state(model, before) and not model._forward_hooks and not model._forward_pre_hooks
    refit_consumers(
        model, data[:2], [data], {"first.0": [0, 3]}, Refit("sequential", residual=False, recalibrate=False)
    )


@pytest.mark.parametrize("limit", [4 << 30, 0])
def test_sampled_positions_are_the_same_in_both_networks(limit):
    """A network of which nothing changes: the targets are met exactly, which other positions would not do."""
    model, x, groups, group, units = duplicated("plain")
    how = Refit("sequential", 0.0, 3, downstream=False, memory_limit=limit)
    data = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    report = refit_consumers(model, x, data.split(20), {group: units}, how, groups=groups)
    assert all(r.after < 1e-9 and (r.before > 1e-9) == (r.removed > 0) for r in report.rows)
    assert any(r.removed for r in report.rows)


def test_sweep_and_passes_draw_the_same_positions():
    weights = []
    for limit in (4 << 30, 0):
        model = compensated("plain", Refit("sequential", positions=2, memory_limit=limit))[1]
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["residual", "depthwise", "se"])
def test_layers_downstream_are_refitted_to_their_changed_inputs(name):
    results = []
    for limit, downstream in ((4 << 30, True), (0, True), (4 << 30, False)):
        model, x = make_network(name)
        model, x = model.double(), x.double()
        data = torch.randn(32, *x.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        dense, wanted = state(model), model(data).detach()
        groups = prunable_groups(model, x, verify=False)
        removed = {g.name: list(range(0, g.n_units, 4)) for g in groups if g.name != "0.0"}
        how = Refit("sequential", 1e-6, None, downstream, residual=False, memory_limit=limit)
        report = refit_consumers(model, x, data.split(10), removed, how, groups=groups)
        remove_units(groups, removed)
        results.append((model, report, (model(data).detach() - wanted).square().mean()))
        assert torch.equal(model.get_submodule("0.0").weight, dense["0.0.weight"])  # nothing in front of it changes
    (sweep, report, error), (passes, other, _), (_, fewer, plain_error) = results
    extra = {r.name: r for r in report.rows if not r.removed}
    assert extra and all(r.after < r.before for r in extra.values()) and len(fewer.rows) < len(report.rows)
    assert error < plain_error or name == "depthwise"  # every layer has its own target: no promise for the last one
    assert name != "depthwise" or any("3" == n.split(".")[-1] for n in extra)  # depthwise layers as well
    for a, b in zip(report.rows, other.rows, strict=True):
        assert a.name == b.name and a.after == pytest.approx(b.after, rel=1e-4, abs=1e-9)
    torch.testing.assert_close(sweep(data), passes(data), rtol=1e-4, atol=1e-5)


class Loop(nn.Module):
    """The second convolution runs three times."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 3)

    def forward(self, x):
        x = self.a(x).relu()
        for _ in range(3):
            x = self.b(x).relu()
        return self.c(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_runs_several_times_pools_its_calls(mode):
    torch.manual_seed(0)
    model, x = Loop().double().eval(), images(dtype=torch.float64)
    dense = copy.deepcopy(model)
    groups = prunable_groups(model, x[:2])
    report = refit_consumers(
        model, x[:2], x.split(6), sample_units(groups), Refit(mode, 0.0, None, recalibrate=False), groups=groups
    )
    row = next(r for r in report.rows if r.name == "b")
    assert row.after < row.before and report.passes == {"parallel": 1, "sequential": 4}[mode]
    r = next(r for r in refittable(groups, sample_units(groups))[0] if r.name == "b")
    if mode == "parallel":
        u = inputs_of(dense, "b", x)[:, 0]
        y, left = u @ dense.b.weight.flatten(1).T, u[:, r.kept[0]]
        left, y = left - left.mean(0), y - y.mean(0)
        torch.testing.assert_close(r.weight[0][:, r.kept[0]].T, torch.linalg.lstsq(left, y).solution)


def test_batches_that_do_not_join_take_a_pass_per_consumer():
    model, x = make_network("plain")
    loader = [torch.randn(4, 3, size, size) for size in (16, 12)]
    report = refit_consumers(
        model, x, loader, sample_units(prunable_groups(model, x)), Refit("sequential", recalibrate=False)
    )
    assert report.passes == 2 * len(report.rows) > 2


class Broken(list):
    def __iter__(self):
        yield from super().__iter__()
        raise OSError("disk")


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_unchanged_after_an_exception(mode):
    model, x = make_network("plain")
    model.train()
    pruner = BudgetPruner(model, x, Broken(class_loader()), importance=L1, budget=Budget(macs=0.6))
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(OSError, match="disk"):
        pruner.step(refit=mode)
    pruner.loader = class_loader()
    with pytest.raises(BudgetError):
        pruner.step(Budget(macs=1), refit=mode)
    pruner.loader = [(x * float("nan"), y[:2]) for x, y in [(x, torch.arange(2))]]
    with pytest.raises(ValueError, match="not finite"):
        pruner.step(refit=mode)
    assert same_state(model, before) and modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    pruner.loader = class_loader()
    assert pruner.step(refit=mode).refit.rows  # and still works


def test_a_failed_surgery_takes_the_refit_back(monkeypatch):
    model, x = make_network("plain")
    before = state(model)
    pruner = BudgetPruner(model, x, class_loader(), importance=L1, budget=Budget(macs=0.6))
    monkeypatch.setattr("tp_importance.pruning.pruner.count_ops", lambda *a, **k: (1, 1))
    with pytest.raises(RuntimeError, match="planned were"):
        pruner.step(refit=Refit("parallel", recalibrate=False))
    assert same_state(model, before)


@pytest.mark.parametrize("mode", MODES)
def test_budget_pruner_prunes_what_was_refitted(mode):
    model, x = make_network("concat")
    twin = copy.deepcopy(model)
    pruner = BudgetPruner(model, x, class_loader(), importance=L1, budget=Budget(macs=0.6))
    plan = pruner.plan()
    settings = Refit(mode, recalibrate=False)
    report = pruner.step(refit=settings)
    by_hand = refit_consumers(twin, x, class_loader(), plan.removed, settings)
    groups = prunable_groups(twin, x)
    masked = twin(x)
    remove_units(groups, plan.removed)
    assert same_state(model, state(twin)) and report.refit == by_hand
    assert report.cost == plan.cost
    torch.testing.assert_close(twin(x), masked)  # a channel nobody weighs is gone
    again = PruningReport.from_dict(json.loads(report.to_json()))
    assert again == report and "output error" in str(report)


class Counting(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_statistics_of_the_importance_are_used_again():
    models, passes = [], []
    for positions in (8, None):
        model, x = make_network("plain")
        loader = Counting(class_loader())
        pruner = BudgetPruner(model, x, loader, importance=CATROImportance(), budget=Budget(macs=0.5))
        pruner.step(refit=Refit("parallel", positions=positions, recalibrate=False))
        models.append(state(model))
        passes.append(loader.passes)
    assert passes == [1, 2]  # all positions are more than were collected
    assert not all(torch.equal(a, b) for a, b in zip(*(m.values() for m in models), strict=True))


def test_only_the_chosen_classes_count():
    loader = class_loader()
    some = [(x[y < 2], y[y < 2]) for x, y in loader]
    states = []
    for data, classes in ((loader, [0, 1]), (some, None)):
        model, x = make_network("flatten")  # the linear layers have one position each
        groups = prunable_groups(model, x)
        all_positions = Refit("parallel", positions=None)
        refit_consumers(model, x, data, sample_units(groups), all_positions, groups=groups, classes=classes)
        states.append(state(model))
    for a, b in zip(*(s.values() for s in states), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["parallel", "sequential", Refit("sequential", memory_limit=0)])
def test_classes_that_do_not_occur_are_refused(how):
    model, x = make_network("flatten")
    groups, before = prunable_groups(model, x), state(model)
    with pytest.raises(ValueError, match=r"classes \[7, 9\] do not occur in the loader; of the chosen .* \[1\]"):
        refit_consumers(model, x, class_loader(32), sample_units(groups), how, groups=groups, classes=[7, 1, 9])
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


def test_what_cannot_be_refitted_is_reported(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4)).eval()
    monkeypatch.setattr("tp_importance.refitting.layers.MAX_FEATURES", 500)
    before = state(net)
    report = refit_consumers(net, images()[:2], [images()], {"0": [1]}, refit="parallel")
    assert "512 features are too many" in report.rows[0].skipped and "not refitted: 3" in str(report)
    assert report.rows[0].removed == 64 and same_state(net, before)


def test_weights_that_are_shared_or_computed_are_left_alone():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4)), nn.Conv2d(8, 2, 3)).eval()
    net[2].weight = net[1].weight
    nn.utils.parametrize.register_parametrization(net[4], "weight", nn.Identity())
    groups = prunable_groups(net, images()[:2], verify=False)
    removed = {g.name: [0] for g in groups}
    _, skipped = refittable(groups, removed)
    reasons = {r.name: r.skipped for r in skipped}
    assert "shares its parameters" in reasons["1"] and "no plain parameter" in reasons["4"]


def test_a_batch_norm_of_two_layers_keeps_its_mean():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.a, self.b = nn.Conv2d(8, 4, 3, bias=False), nn.Conv2d(8, 4, 3, bias=False)
            self.bn, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(self.bn(self.a(x)) + self.bn(self.b(x)))

    torch.manual_seed(0)
    net = Twins().eval()
    groups = prunable_groups(net, images()[:2])
    refits, _ = refittable(groups, {"stem": [0, 1]})
    assert [r.name for r in refits] == ["a", "b"] and not any(r.centred for r in refits)
    mean = net.bn.running_mean.clone()
    refit_consumers(net, images()[:2], [images()], {"stem": [0, 1]}, groups=groups, refit="parallel")
    assert torch.equal(net.bn.running_mean, mean)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (dict(mode="serial"), ValueError, "mode='serial'"),
        (dict(ridge=-1), ValueError, "ridge=-1"),
        (dict(ridge="much"), ValueError, "ridge='much'"),
        (dict(positions=0), ValueError, "positions=0"),
    ],
)
def test_bad_settings(value, error, message):
    with pytest.raises(error, match=message):
        Refit(**value)


def test_bad_arguments():
    model, x = make_network("plain")
    pruner = BudgetPruner(model, x, importance=L1, budget=Budget(macs=0.5))
    with pytest.raises(ValueError, match="refit='parallel' needs data"):
        pruner.step(refit=Refit("parallel", recalibrate=False))
    with pytest.raises(TypeError, match="refit=3"):
        pruner.step(refit=3)
    with pytest.raises(ValueError, match="no prunable group is called 'x'"):
        refit_consumers(model, x, class_loader(), {"x": [1]}, refit="parallel")
    with pytest.raises(ValueError, match="cannot be removed"):
        refit_consumers(model, x, class_loader(), {pruner.groups.names[0]: [99]}, refit="parallel")
    with pytest.raises(ValueError, match="groups are of another"):
        refit_consumers(make_network("plain")[0], x, class_loader(), {}, groups=pruner.groups, refit="parallel")
    with pytest.raises(TypeError, match="refits nothing"):
        refit_consumers(model, x, class_loader(), {}, None)
    with pytest.raises(ValueError, match="gives no layer new weights"):
        refit_consumers(model, x, class_loader(), {}, "batchnorm")
    with pytest.raises(ValueError, match="does nothing; give refit=None"):
        Refit("batchnorm", recalibrate=False)
    assert isinstance(pruner.groups, PrunableGroups)


class Scaled(nn.Module):
    """A layer fed by a constant, behind the first removed channel."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.embed = nn.Linear(2, 4)
        self.register_buffer("table", torch.ones(1, 2))

    def forward(self, x):
        return self.body(x) * self.embed(self.table).view(1, 4, 1, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", [torch.rand(16), torch.zeros(16, 10, 10).long(), torch.full((16,), -1), None])
def test_targets_of_any_task_are_not_looked_at(mode, labels):
    model, x = Scaled(), images()
    batch = x if labels is None else (x, labels)
    report = refit_consumers(model, x[:2], [batch], {"body.0": [1, 5]}, mode)
    assert report.rows[0].name == "body.2"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("around", ["forward", "call"])
def test_autocast_does_not_spoil_the_statistics(mode, around):
    """Under autocast the statistics stay float32, and no pass goes on with a cached old weight."""
    errors = []
    for autocast in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
        x = images(64) + 1.0
        with torch.no_grad():
            wanted = model(x)

        def forward(model, x, on=autocast and around == "forward"):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                return model(x)

        groups = prunable_groups(model, x[:2])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and around == "call"):
            refit_consumers(model, x[:2], [x], {"0": [1, 5, 7], "2": [0, 3]}, mode, groups=groups, forward_fn=forward)
        with torch.no_grad():
            errors.append(float((model(x) - wanted).square().mean()))
    assert errors[1] < 1.1 * errors[0] + 1e-4


def test_an_unchanged_layer_stays_bit_for_bit():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(3, 4, 5)

        def forward(self, x):
            y = self.b(self.a(x).relu())
            return torch.cat([y, self.c(x)], 1)  # c runs behind the removal, on inputs that do not change

    model, x = Twins(), images()
    old = model.c.weight.detach().clone()
    report = refit_consumers(model, x[:2], [x], {"a": [0, 2]}, Refit("sequential", recalibrate=False))
    assert torch.equal(model.c.weight, old) and {r.name: r.before for r in report.rows}["c"] == 0.0
