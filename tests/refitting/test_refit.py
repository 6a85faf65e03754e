"""The refit of consumers: least squares on the stored activations, what is left alone, settings."""

import copy

import pytest
import torch
from torch import nn

from helpers.refit_cases import EXACT, L1, MODES, duplicated, images, inputs_of, refitted
from helpers.states import same_state, state
from tp_importance import Budget, BudgetPruner, Refit, prunable_groups
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.patches import consumer_weight
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import sample_units
from tp_importance.refitting.layers import refittable
from tp_importance.refitting.refit import refit_consumers
from tp_importance.testing import class_loader, make_network


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "dense", "depthwise", "grouped", "flatten", "se",
                                  "shared_input", "transposed", "no_bn", "preact", "split"])  # fmt: skip
def test_the_refit_is_least_squares_on_the_stored_activations(name):
    dense, _model, groups, removed, data, report = refitted(name)
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
    dense, model, groups, removed, data, _ = refitted(name, Refit("parallel", positions=None))
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
    _dense, model, _groups, _removed, _data, report = refitted("plain", Refit(mode), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(r.after <= r.before for r in report.rows) and any(r.after < r.before for r in report.rows)


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_decides(mode):
    def weights(seed):
        model = refitted("plain", Refit(mode, positions=2, seed=seed))[1]
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


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
