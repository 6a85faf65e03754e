"""Channels under layer, group and RMS norms: masked means that statistics run over what is kept."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tp_importance import prunable_groups
from tp_importance.graph.cost import CostModel
from tp_importance.graph.kept_statistics import Kept, KeptStatistics, StatisticCall
from tp_importance.graph.masking import kept_of, masked_units
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed, sample_units

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, width, norm, out=4):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, out, 1)
        self.n = norm if isinstance(norm, nn.Module) else None
        self.function = None if self.n is norm else norm

    def forward(self, x):
        x = self.a(x)
        return self.c(F.gelu(self.function(x) if self.n is None else self.n(x)))


class ResponseNorm(nn.Module):
    """Of ConvNeXtV2."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        relative = size / (size.mean(dim=1, keepdim=True) + 1e-6)
        return x + self.bias.view(1, -1, 1, 1) + self.weight.view(1, -1, 1, 1) * x * relative


class Standard(nn.Module):
    def forward(self, x):
        return standardised(x)


class LastNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def standardised(x):
    var, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt()


NORMS = {
    "layer norm": lambda: LastNorm(12),
    "layer norm without weights": lambda: LastNorm(12, elementwise_affine=False),
    "layer norm of maps": lambda: nn.LayerNorm([12, 6, 6]),
    "rms norm": lambda: nn.Sequential(nn.Flatten(2), Swapped(nn.RMSNorm(12)), nn.Unflatten(2, (6, 6))),
    "response norm": lambda: ResponseNorm(12),
    "written out": lambda: standardised,
    "unit length": lambda: lambda x: F.normalize(x, dim=1) * 3,
    "gate of the mean": lambda: lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "one norm group": lambda: nn.GroupNorm(1, 12),
    "four norm groups": lambda: nn.GroupNorm(4, 12),
    "six norm groups": lambda: nn.GroupNorm(6, 12),
    "norm groups without weights": lambda: nn.GroupNorm(4, 12, affine=False),
    "norm groups of a function": lambda: lambda x: F.group_norm(x, 4),
}


class Swapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    return Net(12, NORMS[name]()).eval().to(dtype)


UNITS = {"four norm groups": 4, "six norm groups": 6, "norm groups without weights": 4, "norm groups of a function": 3}


@pytest.mark.parametrize("name", NORMS)
def test_channels_under_norms_go(name):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        net = made(name, dtype)
        groups = prunable_groups(net, X.to(dtype))
        assert {g.name: (g.width, g.n_units) for g in groups} == {"a": (12, UNITS.get(name, 12))}
        for seed in range(3):
            assert masked_equals_removed(groups, X.to(dtype), sample_units(groups, seed), tolerance=tolerance) is None


@pytest.mark.parametrize("name", ["four norm groups", "norm groups without weights"])
def test_whole_norm_groups_go(name):
    net = made(name)
    remove_units(prunable_groups(net, X), {"a": [1, 3]})
    assert (net.n.num_groups, net.n.num_channels, net.a.out_channels) == (2, 6, 6)
    assert net(X).shape == (2, 4, 6, 6)


def test_or_one_channel_of_each_where_that_leaves_more():
    torch.manual_seed(0)
    net = Net(32, nn.GroupNorm(4, 32)).eval()
    groups = prunable_groups(net, X)
    assert groups["a"].n_units == 8 and groups["a"].unit_size == 4
    dense = copy.deepcopy(net)
    remove_units(groups, {"a": [0, 5]})
    assert (net.n.num_groups, net.n.num_channels) == (4, 24)
    kept = [8 * g + i for g in range(4) for i in range(8) if i not in (0, 5)]
    assert torch.equal(net.a.weight, dense.a.weight[kept])


def test_norm_groups_of_parts_and_of_their_concatenation():
    """12 channels of a and 24 of b under 12 and 12 norm groups, 36 together under 12: three of a are one of both."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 24, 1)
            self.na, self.nb, self.n = nn.GroupNorm(12, 12), nn.GroupNorm(12, 24), nn.GroupNorm(12, 36)
            self.out = nn.Conv2d(36, 3, 1)

        def forward(self, x):
            return self.out(self.n(torch.cat([self.na(self.a(x)), self.nb(self.b(x))], 1)))

    torch.manual_seed(0)
    net = Both().eval()
    groups = prunable_groups(net, X)
    assert {g.name: (g.width, g.n_units) for g in groups} == {"a": (12, 4), "b": (24, 4)}
    remove_units(groups, {"a": [0], "b": [1, 3]})
    assert (net.na.num_groups, net.nb.num_groups, net.n.num_groups) == (9, 6, 7)
    assert net(X).shape == (2, 3, 6, 6)


@pytest.mark.parametrize("widths", [(32, 64, 64), (32, 64, 96)])
def test_the_least_of_a_network_with_skips_is_that_of_its_ties(widths):
    """Whole norm groups go, down to one of every norm and what it is tied to."""

    class Level(nn.Module):
        def __init__(self, before, width):
            super().__init__()
            self.n, self.c = nn.GroupNorm(16, before), nn.Conv2d(before, width, 3, padding=1)

        def forward(self, x):
            return self.c(F.silu(self.n(x)))

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            a, b, c = widths
            self.stem, self.down, self.up = nn.Conv2d(3, a, 1), Level(a, b), Level(a + b, c)
            self.n, self.head = nn.GroupNorm(16, c), nn.Conv2d(c, 3, 1)

        def forward(self, x):
            x = self.stem(x)
            x = torch.cat([x, self.down(x)], 1)
            return self.head(F.silu(self.n(self.up(x))))

    torch.manual_seed(0)
    net = Skips().eval()
    groups = prunable_groups(net, X)
    model = CostModel.from_groups(groups)
    least = model.cost({g.name: g.min_units * g.unit_size for g in groups})
    assert least.macs < 0.1 * model.dense.macs
    small = copy.deepcopy(net)
    remove_units(groups, {g.name: list(range(g.min_units, g.n_units)) for g in groups}, model=small)
    assert small(X).shape == (2, 3, 6, 6)


def test_masked_is_the_definition():
    """Mean and variance of the kept channels, computed by hand."""
    net = made("layer norm", torch.float64)
    x, seen = X.double(), []
    net.c.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad(), masked_units(net, prunable_groups(net, x), {"a": [0, 4, 11]}):
        net(x)
    kept = [i for i in range(12) if i not in (0, 4, 11)]
    y = net.a(x)[:, kept]
    mean, var = y.mean(1, keepdim=True), y.var(1, keepdim=True, correction=0)
    y = (y - mean) / (var + net.n.eps).sqrt() * net.n.weight[kept].view(-1, 1, 1) + net.n.bias[kept].view(-1, 1, 1)
    torch.testing.assert_close(seen[-1][:, kept], F.gelu(y), rtol=1e-12, atol=1e-12)
    assert not seen[-1][:, [0, 4, 11]].any()


def test_statistics_of_weights_are_not_the_business_of_channels():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w, self.bias)

    net = nn.Sequential(nn.Conv2d(3, 8, 1), Standardised(8, 8, 1), nn.Conv2d(8, 2, 1)).eval()
    kinds = {e.name: e.kind for e in prunable_groups(net, X).excluded}
    assert kinds["0"] == "mixed"


def test_a_norm_that_is_called_on_different_channels_keeps_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 1) for i, o in ((3, 8), (3, 8), (8, 2), (8, 2)))
            self.n = Standard()

        def forward(self, x):
            return self.c(self.n(self.a(x))) * self.d(self.n(self.b(x)))

    groups = prunable_groups(Twice().eval(), X)
    assert not len(groups) and any("over other channels each time" in e.reason for e in groups.excluded)


def test_the_mode_finds_calls_again_and_leaves_nothing_behind():
    net, x = made("layer norm"), torch.randn(2, 3, 6, 6)
    before = net(x)
    kept = {StatisticCall("n", "layer_norm", 0): Kept(-1, torch.arange(0, 12, 2), 12)}
    with KeptStatistics(kept).running(net):
        assert not torch.allclose(net(x), before, atol=1e-3)
    torch.testing.assert_close(net(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with (
        pytest.raises(RuntimeError, match=r"layer_norm is given \(2, 6, 6, 12\) where .* 11 channels"),
        KeptStatistics({StatisticCall("n", "layer_norm", 0): Kept(-1, torch.arange(3), 11)}).running(net),
    ):
        net(x)
    torch.testing.assert_close(net(x), before)


def test_gradients_flow_through_kept_statistics():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double(), torch.randn(3, 4).double()
    kept = {StatisticCall("1", "layer_norm", 0): Kept(-1, torch.tensor([0, 2, 3]), 6)}
    x.requires_grad_()
    with KeptStatistics(kept).running(net):
        assert torch.autograd.gradcheck(net, (x,))


class Beside(nn.Module):
    """Channels and the input, under one group norm."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.n, self.c = nn.Conv2d(3, 9, 1), norm, nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.c(self.n(torch.cat([self.a(x), x], 1)))


@pytest.mark.parametrize("affine", [True, False])
def test_norm_groups_beside_the_input_stay_of_one_size(affine):
    net = Beside(nn.GroupNorm(2, 12, affine=affine)).eval()  # the first six; the other three and the input
    groups = prunable_groups(net, X, verify=False)
    assert not any(g.n_units > 3 for g in groups)
    for group in groups:
        assert masked_equals_removed(groups, X, {group.name: [0]}) is None


def test_masks_that_leave_norm_groups_of_two_sizes_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Conv2d(12, 2, 1)).eval()
    groups = prunable_groups(net, X)
    (statistic,) = groups["0"].statistics
    single = replace(statistic.member, units=statistic.member.channels)  # as if every channel could go alone
    wrong = replace(groups, groups=[replace(groups["0"], statistics=(replace(statistic, member=single),))])
    with pytest.raises(ValueError, match=r"would keep \[.*\] channels of its norm groups"):
        kept_of(wrong, {"0": [0]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_small_values_under_a_norm_without_eps_are_normalised_alike(dtype):
    """Whether others are zero or normalised, too: torch adds the eps of float32 to halves."""
    kept, x = (
        Kept(-1, torch.tensor([0, 2, 3, 5]), 6),
        1e-3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    )
    net, made = nn.Sequential(nn.RMSNorm(6)).to(dtype), []
    for others in ("zero", "norm"):
        with KeptStatistics({StatisticCall("0", "rms_norm", 0): kept}, others=others).running(net):
            made.append(net(x.to(dtype))[:, kept.channels])
    torch.testing.assert_close(*made)


def test_a_norm_outside_of_all_modules_keeps_its_channels():
    """Nothing says where a pass begins, so that its calls could not be told apart from those of the pass before."""

    def forward(net, x):
        return net[1](F.layer_norm(net[0](x), (net[0].out_features,)))

    net, x = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.randn(4, 3)
    groups = prunable_groups(net, x, forward_fn=forward)
    assert {e.name: e.kind for e in groups.excluded}["0"] == "mixed"
    inside = nn.Sequential(net[0], nn.LayerNorm(8), net[1])
    assert len(prunable_groups(inside, x, forward_fn=lambda net, x: net[2](net[1](net[0](x))))) == 1


@pytest.mark.parametrize(("correction", "least"), [(1, 2), (0, 1)])
def test_a_variance_that_divides_by_one_less_keeps_two_channels(correction, least):
    def norm(x):
        return x / (x.std(1, correction=correction, keepdim=True) + 1e-3)

    groups = prunable_groups(Net(6, norm).eval(), X)
    assert groups["a"].min_units == least
    assert masked_equals_removed(groups, X, {"a": list(range(least, 6))}) is None
