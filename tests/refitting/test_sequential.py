"""The sequential refit: one sweep, one pass per consumer, residual sums, downstream layers."""

import copy

import pytest
import torch
from torch import nn

from helpers.logs import fresh_logging  # noqa: F401 - a fixture
from helpers.refit_cases import MODES, duplicated, images, inputs_of, refitted
from helpers.states import same_state, state
from tp_importance import Refit, prunable_groups
from tp_importance.graph.masking import masked_units as gates
from tp_importance.graph.patches import consumer_weight, set_consumer_weight
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.tape import NotReplayable
from tp_importance.graph.verify import sample_units
from tp_importance.refitting import sequential
from tp_importance.refitting.layers import refittable
from tp_importance.refitting.refit import refit_consumers
from tp_importance.testing import make_network


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


def not_replayable(*_):
    raise NotReplayable("it is to run as a whole")


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "depthwise", "concat", "transposed"])
@pytest.mark.parametrize(("recalibrate", "downstream"), [(False, False), (True, False), (False, True)])
def test_one_sweep_equals_one_pass_per_consumer(name, recalibrate, downstream, monkeypatch):
    dense, x = make_network(name)
    dense, x = dense.double(), x.double()
    data = torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wide = prunable_groups(dense, x, verify=False)
    removed = sample_units(wide)
    models, reports = [], []
    for limit, replayed in ((4 << 30, True), (0, True), (4 << 30, False)):
        model = copy.deepcopy(dense)
        groups = prunable_groups(model, x, verify=False)
        if not replayed:
            monkeypatch.setattr(sequential, "ReplayedPasses", not_replayable)
        how = Refit("sequential", 0.0, None, downstream, residual=False, memory_limit=limit, recalibrate=recalibrate)
        loader = data.split(6)
        reports.append(refit_consumers(model, x, loader, removed, how, groups=groups))
        models.append(model)
    naive = copy.deepcopy(dense)
    naive_sequence(dense, naive, prunable_groups(naive, x, verify=False), removed, data, recalibrate, downstream)
    assert reports[0].passes == 2 < reports[1].passes == reports[2].passes
    for other in reports[1:]:
        for a, b in zip(reports[0].rows, other.rows, strict=True):
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


@pytest.mark.usefixtures("fresh_logging")
@pytest.mark.parametrize("limit", [4 << 30, 0])
def test_the_log_says_at_how_many_layers_memory_is_too_small(limit, caplog):
    with caplog.at_level("INFO", "tp_importance"):
        refitted("plain", Refit("sequential", memory_limit=limit))
    assert any("memory_limit=0.0 GiB" in message for message in caplog.messages) == (limit == 0)


def test_sweep_and_passes_draw_the_same_positions():
    weights = []
    for limit in (4 << 30, 0):
        model = refitted("plain", Refit("sequential", positions=2, memory_limit=limit))[1]
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
