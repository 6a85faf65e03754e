import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from helpers.group_cases import random_units, removal, zoo
from helpers.networks import ZOO
from tp_importance import count_ops, prunable_groups
from tp_importance.budget import Cost
from tp_importance.graph.cost import CostModel
from tp_importance.graph.surgery import remove_units
from tp_importance.testing import TOPOLOGIES, topology
from tp_importance.testing.cases import Case
from tp_importance.testing.networks import conv_bn_relu, head

# --- what count_ops counts --------------------------------------------------------------------------------------------

LAYERS = [  # layer, input of one sample, MACs by hand
    (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 6), 8 * 10 * 6 * 3 * 9),
    (nn.Conv2d(3, 8, (3, 5), stride=2), (3, 11, 9), 8 * 5 * 3 * 3 * 15),
    (nn.Conv2d(8, 12, 3, groups=4), (8, 5, 5), 12 * 9 * 2 * 9),
    (nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 5, 5), 8 * 25 * 9),
    (nn.Conv1d(4, 6, 3), (4, 10), 6 * 8 * 4 * 3),
    (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 3 * 27 * 2 * 8),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 4 * 25 * 6 * 4),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), 4 * 25 * 3 * 9),
    (nn.Linear(10, 7), (10,), 70),
    (nn.Linear(10, 7), (4, 5, 10), 20 * 70),
    (nn.BatchNorm2d(4), (4, 5, 5), 0),
    (nn.ReLU(), (4, 5, 5), 0),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("layer", "shape", "macs"), LAYERS, ids=[str(row[0]) for row in LAYERS])
def test_count_of_single_layers(layer, shape, macs, batch):
    assert count_ops(layer, torch.zeros(batch, *shape)) == (macs, sum(p.numel() for p in layer.parameters()))


def test_count_of_known_networks():
    with torch.device("meta"):  # no arithmetic
        x = torch.empty(2, 3, 224, 224)
        assert count_ops(models.resnet50(), x) == (4_089_184_256, 25_557_032)  # 4089.2 M
        assert count_ops(models.vgg16_bn(), x)[0] == 15_470_264_320
        assert count_ops(models.mobilenet_v2(), x) == (300_774_272, 3_504_872)


def test_count_leaves_the_model_alone():
    model = nn.Sequential(conv_bn_relu(3, 8), nn.Dropout(), head(8)).train()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    count_ops(model, torch.randn(4, 3, 8, 8))
    assert all(m.training for m in model.modules()) and not model[0][0].weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        count_ops(model, torch.randn(4, 5, 8, 8))
    assert not any(m._forward_hooks for m in model.modules()) and all(m.training for m in model.modules())


def test_count_of_shared_modules_and_tied_weights():
    twice = nn.Sequential(shared := nn.Linear(6, 6), nn.ReLU(), shared)
    assert count_ops(twice, torch.zeros(2, 6)) == (72, 42)
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))
    tied[2].weight = tied[0].weight
    assert count_ops(tied, torch.zeros(2, 6)) == (72, 42)


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, query, memory):
        return self.attention(query, key=memory, value=memory)[0]


def test_count_of_attention():
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True)
    layers, products = 5 * (4 * 16 * 16 + 2 * 16 * 40), 2 * 5 * 5 * 16
    assert count_ops(layer, torch.zeros(3, 5, 16))[0] == layers + products
    assert count_ops(layer, torch.zeros(3, 5, 16), attention=False)[0] == layers
    query, memory = torch.zeros(3, 5, 16), torch.zeros(3, 7, 16)
    products = 2 * 5 * 7 * 16
    assert count_ops(Attends(), (query, memory))[0] == 2 * 5 * 16 * 16 + 2 * 7 * 16 * 16 + products
    found = count_ops(Attends(kdim=8, vdim=8), (query, memory[..., :8]))[0]
    assert found == 2 * 5 * 16 * 16 + 2 * 7 * 16 * 8 + products


def test_count_refuses_inputs_whose_first_dimension_is_no_batch():
    with pytest.raises(ValueError, match="not the batch"):
        count_ops(nn.Linear(5, 3), torch.zeros(4), forward_fn=lambda m, _: m(torch.zeros(1, 5)))
    with pytest.raises(TypeError, match="example_inputs"):
        count_ops(nn.Linear(5, 3), None)


# --- the model of the cost --------------------------------------------------------------------------------------------


def assert_exact(case, seed):
    """The cost of random widths is what a network that was really pruned to them costs."""
    cost = CostModel.from_groups(case.groups)
    removed = removal(case.groups, seed)
    pruned = case.copy()
    remove_units(pruned.groups, removed)
    widths = {g.name: g.width - g.unit_size * len(removed[g.name]) for g in case.groups}
    counted = Cost(*count_ops(pruned.model, case.x))
    assert cost.cost(widths) == counted, widths
    units = np.array([random_units(case.groups, seed)[n] for n in cost.names])
    assert cost.widths(units) == widths and Cost(*cost.evaluate(units)) == counted
    return cost


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_cost_is_that_of_the_pruned_network(name, seed):
    case = topology(name)
    cost = assert_exact(case, seed)
    assert cost.dense == Cost(*count_ops(case.model, case.x)) == cost.cost({}) == cost.cost(case.groups.widths)


@pytest.mark.parametrize("name", ZOO)
def test_cost_is_that_of_the_pruned_zoo_network(name):
    cost = assert_exact(zoo(name), 0)
    assert cost.dense == Cost(*count_ops(zoo(name).model, zoo(name).x))


class Twice(nn.Module):
    """One convolution that runs twice, and one layer that reads both."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.tail = conv_bn_relu(3, 8), nn.Conv2d(8, 8, 3, padding=1), conv_bn_relu(8, 12)
        self.head = head(12)

    def forward(self, x):
        return self.head(self.tail(self.shared(torch.relu(self.shared(self.stem(x))))))


class SharedHead(nn.Module):
    """The same consumer on maps of two sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared = conv_bn_relu(3, 8), conv_bn_relu(8, 8, stride=2), conv_bn_relu(8, 10)
        self.head = head(10)

    def forward(self, x):
        x = self.a(x) + 0
        return self.head(self.shared(x)) + self.head(self.shared(self.b(x)))


class Tokens(nn.Module):
    """Attention, which is left alone, and an MLP with a tied bottleneck."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.mlp(x)).mean(1)


def tied():
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)]
    layers[4].weight = layers[2].weight
    return nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 6), *layers)


ODD = {
    "tied weights": (tied, (3, 8, 8)),
    "runs twice": (Twice, (3, 8, 8)),
    "consumer runs twice": (SharedHead, (3, 8, 8)),
    "attention": (Tokens, (6, 16)),
    "PReLU": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 3), nn.PReLU(), head(6)),
        (3, 8, 8),
    ),
    "BN without parameters": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), head(8)),
        (3, 8, 8),
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 4)
        ),
        (3, 8),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(32, 4)),
        (1, 4, 4, 4),
    ),
    "depthwise multiplier": (
        lambda: nn.Sequential(conv_bn_relu(3, 16), nn.Conv2d(16, 32, 3, groups=8), nn.ReLU(), head(32)),
        (3, 8, 8),
    ),
    "one input per group": (
        lambda: nn.Sequential(conv_bn_relu(3, 8), nn.Conv2d(8, 24, 3, groups=8), nn.ReLU(), head(24)),
        (3, 8, 8),
    ),
    "one output per group": (
        lambda: nn.Sequential(conv_bn_relu(3, 24), nn.Conv2d(24, 8, 3, groups=8), nn.ReLU(), head(8)),
        (3, 8, 8),
    ),
    "one input per group, transposed": (
        lambda: nn.Sequential(conv_bn_relu(3, 8), nn.ConvTranspose2d(8, 16, 3, groups=8), nn.ReLU(), head(16)),
        (3, 8, 8),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), conv_bn_relu(8, 6), head(6)),
        (3, 8, 8),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_cost_of_odd_networks(name):
    torch.manual_seed(0)
    build, shape = ODD[name]
    model, x = build().eval(), torch.randn(2, *shape)
    case = Case(model, x, prunable_groups(model, x))
    assert len(case.groups), [(e.name, e.reason) for e in case.groups.excluded]
    for seed in (0, 1):
        cost = assert_exact(case, seed)
    assert cost.dense == Cost(*count_ops(model, x))


@pytest.mark.parametrize("name", ["residual", "grouped", "transformer_mlp"])
def test_batch_of_the_inputs_does_not_matter(name):
    case = topology(name)
    reference = CostModel.from_groups(case.groups)
    for batch in (1, 3):
        x = case.x[:1].expand(batch, *case.x.shape[1:])
        other = CostModel.from_groups(
            prunable_groups(case.model, x, verify=False).exclude(
                {n: "" for n in prunable_groups(case.model, x, verify=False).names if n not in reference.names}
            )
        )
        for field in ("constant", "linear", "quadratic"):
            assert np.array_equal(getattr(other, field), getattr(reference, field))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_form(name):
    cost = CostModel.from_groups(topology(name).groups)
    for coefficients in (cost.constant, cost.linear, cost.quadratic):
        assert coefficients.dtype == np.int64 and (coefficients >= 0).all()
    assert np.array_equal(cost.quadratic, np.triu(cost.quadratic))
    assert_marginal(cost)


def assert_marginal(cost):
    rng = np.random.default_rng(0)
    for _ in range(20):
        u, target = (rng.integers(0, cost.full + 1) for _ in range(2))
        step = target - u  # anywhere from empty to full, down as well as up
        marginal = cost.marginal(u, step)
        for g in range(len(u)):
            moved = u.copy()
            moved[g] += step[g]
            assert np.array_equal(marginal[:, g], cost.evaluate(moved) - cost.evaluate(u))


def test_marginal_cost_of_layers_within_a_group():
    """Where a layer reads and makes the channels of one group, the cost has squares."""
    torch.manual_seed(0)
    cost = CostModel.from_groups(prunable_groups(Twice().eval(), torch.randn(2, 3, 8, 8)))
    assert np.einsum("fgg->fg", cost.quadratic).any()
    assert_marginal(cost)
    rng = np.random.default_rng(1)
    linear, quadratic = rng.integers(0, 9, (2, 4)), np.triu(rng.integers(0, 9, (2, 4, 4)))
    ones, full = np.ones(4, np.int64), np.array([3, 9, 1, 5])
    assert_marginal(CostModel(tuple("abcd"), ones, full, np.array([7, 0]), linear, quadratic))


@pytest.mark.parametrize("name", ["residual", "dense", "se", "split", "grouped"])
def test_supermodular(name):
    cost = CostModel.from_groups(topology(name).groups)
    rng = np.random.default_rng(1)
    for _ in range(100):
        u, v = rng.integers(0, cost.full + 1), rng.integers(0, cost.full + 1)
        together = cost.evaluate(np.maximum(u, v)) + cost.evaluate(np.minimum(u, v))
        assert (together >= cost.evaluate(u) + cost.evaluate(v)).all()
        low, high = np.minimum(u, v), np.maximum(u, v)
        one = np.ones_like(u)
        assert (cost.marginal(low, one) <= cost.marginal(high, one)).all()  # steps never become cheaper


def test_shares():
    cost = CostModel.from_groups(topology("plain").groups)
    lost = cost.cost({}).macs - cost.cost({"1.0": 0}).macs
    assert cost.shares()["1.0"] == pytest.approx(lost / cost.dense.macs)
    assert cost.shares("params")["1.0"] == pytest.approx(
        (cost.dense.params - cost.cost({"1.0": 0}).params) / cost.dense.params
    )
    assert sum(cost.shares().values()) > 1  # products count for both


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"nope": 4}, "no group is called 'nope'"),
        ({"1.body.0.0": 6}, "multiple of 4"),
        ({"1.body.0.0": 20}, r"0\.\.16"),
        ({"0.0": -1}, "-1"),
        ({"0.0": 13}, "13"),
    ],
)
def test_widths_that_are_not_admissible(widths, message):
    cost = CostModel.from_groups(topology("grouped").groups)
    with pytest.raises(ValueError, match=message):
        cost.cost(widths)


def test_no_quadratic_form():
    """Groups that claim more channels than a layer has are an error, not a wrong number."""
    groups = copy.copy(topology("plain").groups)
    groups.groups = [*groups.groups, groups.groups[0]]
    with pytest.raises(ValueError, match="claim more"):
        CostModel.from_groups(groups)
