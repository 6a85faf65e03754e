"""What a consumer sees at sampled positions, and what errors of its output disturb."""

import copy

import pytest
import torch
from torch import nn

from helpers.consumer_cases import generator
from tp_importance import prunable_groups
from tp_importance.maths.moments import Moments, elimination_loss
from tp_importance.statistics import consumers
from tp_importance.statistics.consumers import ConsumerStatistics
from tp_importance.statistics.observe import observe
from tp_importance.testing import class_loader, make_network

# group, and for every consumer the layer at whose output the change is measured: the BN behind, if any
CONSUMERS = {
    "conv": ("plain", "0.0", {"1.0": "1.1"}),
    "concat": ("concat", "left.0", {"tail.0.0": "tail.0.1"}),
    "grouped": ("grouped", "1.body.0.0", {"1.body.1.0": "1.body.1.1"}),
    "flatten": ("flatten", "1.0", {"3": "3"}),
    "transposed": ("transposed", "bottom.0", {"up.0": "up.1"}),
    "strided and concat": ("transposed", "encoder.0", {"bottom.0": "bottom.1", "tail.0.0": "tail.0.1"}),
    "three consumers": (
        "residual",
        "0.0",
        {"1.body.0.0": "1.body.0.1", "2.body.0.0": "2.body.0.1", "2.shortcut.0": "2.shortcut.1"},
    ),
    "dense block": ("dense", "0", {"1.conv": "1.conv", "2.conv": "2.conv", "3.conv": "3.conv", "6.2": "6.2"}),
    "behind a depthwise layer": ("depthwise", "1.body.0", {"1.body.6": "1.body.7"}),
    "with a gate": ("se", "0.0", {"1.gate.1": "1.gate.1", "2.0": "2.1"}),
    "half of a split": ("split", "stem.0/1", {"right.0": "right.1"}),
    "tokens": ("transformer_mlp", "blocks.0.mlp.1", {"blocks.0.mlp.3": "blocks.0.mlp.3"}),
}


def setup(topology):
    model, x = make_network(topology)
    loader = [(x.double(), y) for x, y in class_loader(n=24, shape=x.shape[1:], batch_size=7)]
    return model.double(), x.double(), loader


def outputs(model, loader, measured, mask=None):
    """What `measured` puts out over the whole loader, rows × channels, with `mask` at the input of a consumer."""
    seen, handles = [], []
    if mask is not None:
        consumer, channels, dim = mask
        zero = lambda _, args: (args[0].index_fill(dim, channels, 0.0),)  # noqa: E731
        handles.append(model.get_submodule(consumer).register_forward_pre_hook(zero))
    module = model.get_submodule(measured)
    dim = -1 if isinstance(module, nn.Linear) else 1
    handles.append(module.register_forward_hook(lambda _m, _a, out: seen.append(out.movedim(dim, -1).flatten(0, -2))))
    with torch.no_grad():
        for x, _ in loader:
            model(x)
    for handle in handles:
        handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("case", CONSUMERS)
def test_consumer_loss_is_the_change_of_the_consumers_output(case):
    topology, name, measured = CONSUMERS[case]
    model, x, loader = setup(topology)
    groups = prunable_groups(model, x, verify=False)
    group = groups[name]
    assert {r.name for r in group.consumers} == set(measured)
    statistics = ConsumerStatistics(groups, positions=None)
    observe(model, loader, statistics.watches())
    scatter = statistics.scatter(group, Moments.total)

    def change(member, units):
        dim = -1 if isinstance(model.get_submodule(member.name), nn.Linear) else 1
        mask = (member.name, torch.as_tensor(member.positions(units)), dim)
        probe = measured[member.name]
        difference = outputs(model, loader, probe) - outputs(model, loader, probe, mask)
        return (difference - difference.mean(0)).square().sum(1).mean()

    rng = generator(4)
    for count in {1, group.n_units // 2, group.n_units}:
        units = torch.randperm(group.n_units, generator=rng)[:count]
        everything = range(group.n_units)
        expected = sum(
            change(m, units.tolist()) / change(m, everything) ** consumers.ENERGY_EXPONENT for m in group.consumers
        )
        torch.testing.assert_close(elimination_loss(scatter, units), expected, rtol=1e-8, atol=1e-10)


def test_moments_of_all_positions_do_not_depend_on_the_batches():
    model, x, loader = setup("plain")
    groups = prunable_groups(model, x, verify=False)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    found = []
    for batches in (loader, [(images, labels)], [(images.flip(0), labels.flip(0))]):
        statistics = ConsumerStatistics(groups, positions=None)
        observe(model, batches, statistics.watches())
        found.append([statistics.scatter(g, m) for g in groups for m in (Moments.total, Moments.between)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_sampled_positions_estimate_all_positions():
    model, x, loader = setup("plain")
    groups = prunable_groups(model, x, verify=False)
    exact, sampled = ConsumerStatistics(groups, positions=None), ConsumerStatistics(groups, positions=32)
    observe(model, loader, [*exact.watches(), *sampled.watches()])
    for g in groups:
        a, b = exact.scatter(g, Moments.total), sampled.scatter(g, Moments.total)
        assert (a - b).norm() < 0.2 * a.norm(), g.name


@pytest.mark.parametrize("topology", ["plain", "flatten", "transposed", "concat"])
def test_wide_consumers_are_watched_exactly_through_few_outputs(topology, monkeypatch):
    model, x, loader = setup(topology)
    groups = prunable_groups(model, x, verify=False)

    def scatters():
        statistics = ConsumerStatistics(groups, positions=4)
        observe(model, loader, statistics.watches())
        return [statistics.scatter(g, m) for g in groups for m in (Moments.total, Moments.between)]

    exact = scatters()
    monkeypatch.setattr(consumers, "MAX_FEATURES", 1)
    for a, b in zip(exact, scatters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_wide_consumers_with_many_outputs_are_estimated(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 500), nn.ReLU())
    model.append(nn.Linear(500, 4)).double()
    loader = [(x.double(), y) for x, y in class_loader(n=40, shape=(3, 8, 8))]
    groups = prunable_groups(model, loader[0][0], verify=False)

    def scatter():
        statistics = ConsumerStatistics(groups)
        observe(model, loader, statistics.watches())
        return statistics.scatter(groups["0"], Moments.total)

    exact = scatter()
    monkeypatch.setattr(consumers, "MAX_FEATURES", 100)
    estimate = scatter()
    assert 1e-6 < (exact - estimate).norm() / exact.norm() < 0.3


def test_a_consumer_that_did_not_run_or_saw_nan_is_named():
    model, x, loader = setup("plain")
    groups = prunable_groups(model, x, verify=False)
    statistics = ConsumerStatistics(groups)
    with pytest.raises(ValueError, match=r"1\.0 did not run"):
        statistics.scatter(groups["0.0"], Moments.total)
    bad = [(batch * float("nan"), y) for batch, y in loader]
    observe(model, bad, statistics.watches())
    with pytest.raises(ValueError, match=r"1\.0 is not finite"):
        statistics.scatter(groups["0.0"], Moments.total)


# --- what errors of a consumer disturb ----------------------------------------------------------------------------


class Sums(nn.Module):
    """Consumers whose output goes into a sum, behind a batch norm or not, and others."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6))
        self.norm = nn.BatchNorm2d(6)
        self.hidden, self.linear, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.norm(self.second(self.first(x).relu()))
        x = x.relu().flatten(2).mT  # tokens
        x = x + self.linear(self.hidden(x).relu())
        return self.last(x.mean(1))

    def sums(self, x):
        x = self.stem(x).relu()
        a = x + self.norm(self.second(self.first(x).relu()))
        x = a.relu().flatten(2).mT
        return {
            "second": a.movedim(1, -1).flatten(0, 2),
            "linear": (x + self.linear(self.hidden(x).relu())).flatten(0, 1),
        }


def sums_of(model, loader, x, labels=None, forward_fn=None):
    statistics = ConsumerStatistics(prunable_groups(model, x, verify=False), positions=None)

    def begin(y):
        statistics.labels = y if labels is None else torch.where(torch.isin(y, torch.tensor(labels)), y, -1)

    with statistics.sums(x, forward_fn):
        observe(model, loader, statistics.watches(), before_batch=begin, forward_fn=forward_fn)
    return statistics


def trained_norm(model, loader):
    with torch.no_grad():
        model.train()
        for x, _ in loader:
            model(x)
    return model.eval()


@pytest.mark.parametrize("labels", [None, [1, 2]])
def test_energies_are_those_of_the_sums(labels):
    torch.manual_seed(0)
    loader = [(x.double(), y) for x, y in class_loader(n=24, shape=(3, 6, 6), batch_size=7)]
    model = trained_norm(Sums().double(), loader)
    statistics = sums_of(model, loader, loader[0][0][:2], labels)
    images, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    if labels is not None:
        images = images[torch.isin(y, torch.tensor(labels))]
    with torch.no_grad():
        expected = {n: float(v.var(0, unbiased=False).sum()) for n, v in model.sums(images).items()}
    for name, energy in expected.items():
        assert statistics.energy(name) == pytest.approx(energy, rel=1e-6)
        assert statistics.relative(name) == pytest.approx(1 / energy, rel=1e-6)


def test_without_a_sum_the_energy_is_that_of_the_output():
    torch.manual_seed(0)
    loader = [(x.double(), y) for x, y in class_loader(n=24, shape=(3, 6, 6), batch_size=7)]
    model = trained_norm(Sums().double(), loader)
    split = lambda m, batch: m.forward(batch[0] if isinstance(batch, (tuple, list)) else batch)  # noqa: E731
    for forward_fn in (None, split):  # the second calls no module, so no operation can be told apart
        statistics = sums_of(model, loader, loader[0][0][:2], forward_fn=forward_fn)
        for name in ("first", "last", *(() if forward_fn is None else ("linear",))):
            rows = outputs(model, loader, name)
            assert statistics.energy(name) == pytest.approx(float(rows.var(0, unbiased=False).sum()), rel=1e-6)


def test_other_operations_on_the_data_are_said_and_sums_not_used():
    class Moody(Sums):
        def forward(self, x):
            return super().forward(x if len(x) < 5 else x.tanh())

    torch.manual_seed(0)
    loader = [(x.double(), y) for x, y in class_loader(n=24, shape=(3, 6, 6), batch_size=7)]
    model = trained_norm(Moody().double(), loader)
    with pytest.warns(UserWarning, match="tanh now; losses are taken relative to single layers"):
        statistics = sums_of(model, loader, loader[0][0][:2])
    rows = outputs(model, loader, "linear")
    assert statistics.energy("linear") == pytest.approx(float(rows.var(0, unbiased=False).sum()), rel=1e-6)


def test_a_parameter_that_is_broadcast_later_is_no_sum():
    class Positions(Sums):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(10 * torch.randn(1, 36, 6))

        def forward(self, x):
            x = self.linear(self.stem(x).relu().flatten(2).mT) + self.position
            return self.last(x.mean(1))

    torch.manual_seed(0)
    loader = [(x.double(), y) for x, y in class_loader(n=24, shape=(3, 6, 6), batch_size=7)]
    model = Positions().double().eval()
    energies = [sums_of(model, loader, loader[0][0][:n]).energy("linear") for n in (1, 4)]
    assert energies[0] == energies[1]  # whatever the batch of the example inputs
    assert energies[0] == pytest.approx(float(outputs(model, loader, "linear").var(0, unbiased=False).sum()), rel=1e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_what_hardly_varies_about_its_mean_does_not_count_as_much(norm):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
    with torch.no_grad():
        first.bias.fill_(50.0)  # sigmoids of it do not vary
    behind = [nn.BatchNorm2d(4)] if norm else []
    model = nn.Sequential(first, nn.Sigmoid(), second, *behind, nn.ReLU(), nn.Conv2d(4, 2, 1))
    loader = [(x.double(), y) for x, y in class_loader(n=24, shape=(3, 6, 6), batch_size=7)]
    model = model.double().eval()
    statistics = sums_of(model, loader, loader[0][0][:2])
    rows = outputs(model, loader, "3" if norm else "2")
    assert rows.var(0).sum() < 1e-20 < statistics.energy("2")
    assert statistics.energy("2") == pytest.approx(1e-4 * float(rows.mean(0).square().sum()), rel=1e-6)


def test_a_sum_that_is_not_finite_is_an_error():
    class Burst(Sums):
        def forward(self, x):
            x = self.stem(x).relu()
            return self.last((x / 0.0 + self.norm(self.second(self.first(x).relu()))).tanh().mean((2, 3)))

    torch.manual_seed(0)
    loader = class_loader(n=24, shape=(3, 6, 6), batch_size=7)
    statistics = sums_of(Burst().eval(), loader, loader[0][0][:2])
    with pytest.raises(ValueError, match="what layer second gives is not finite"):
        statistics.relative("second")


def test_statistics_can_be_copied():
    torch.manual_seed(0)
    model, x = make_network("residual")
    loader = class_loader(n=24, shape=x.shape[1:], batch_size=7)
    statistics = sums_of(model, loader, x)
    name = "1.body.1.0"
    assert copy.deepcopy(statistics).energy(name) == statistics.energy(name)
