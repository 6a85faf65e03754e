import numpy as np
import pytest

from tp_importance.methods.itpruner.hsic import relevance
from tp_importance.methods.itpruner.official import (
    PUBLISHED,
    official_channels,
    official_flops,
    official_fractions,
    official_importances,
)
from tp_importance.methods.itpruner.official_networks import NETWORKS, resnet_cifar

GOLDEN = {
    "vgg16-100m": [44, 35, 71, 71, 145, 104, 145, 290, 205, 325, 432, 429, 469],
    "resnet20-20m": [11, 11, 11, 22, 21, 22, 45, 43, 48],
    "resnet56-60m": [
        *(10, 10, 10, 10, 10, 10, 10, 10, 11, 22, 21, 21, 21, 21, 21, 21, 21, 22),
        *(44, 42, 42, 42, 42, 42, 42, 64, 64),
    ],
    "mobilenet_v1-50m": [18, 31, 30, 38, 71, 76, 173, 52, 78, 78, 51, 178, 250, 522],
    "mobilenet_v1-150m": [23, 42, 63, 67, 132, 134, 275, 194, 202, 202, 194, 277, 522, 687],
    "mobilenet_v1-285m": [28, 52, 88, 90, 179, 182, 362, 311, 314, 314, 312, 367, 734, 1024],
    "mobilenet_v2-150m": [29, 12, 16, 24, 43, 50, 98, 273],
    "mobilenet_v2-220m": [31, 14, 20, 28, 54, 74, 130, 298],
    "resnet50-1800m": [
        *(48, 52, 52, 110, 52, 52, 52, 52, 98, 105, 142, 105, 105, 105, 105, 105, 105, 197, 211, 48),
        *(211, 211, 211, 211, 211, 211, 211, 211, 211, 211, 397, 420, 1264, 419, 419, 419, 418),
    ],
    "resnet50-2000m": [
        *(50, 53, 54, 125, 54, 54, 54, 54, 101, 108, 179, 107, 107, 107, 107, 107, 107, 203, 216, 148),
        *(215, 215, 215, 215, 215, 215, 215, 215, 215, 215, 407, 429, 1341, 429, 429, 429, 428),
    ],
    "resnet50-2300m": [
        *(52, 55, 55, 146, 55, 55, 55, 55, 105, 111, 232, 111, 111, 111, 111, 111, 111, 211, 222, 290),
        *(222, 222, 222, 222, 222, 222, 222, 222, 222, 222, 423, 442, 1453, 442, 442, 442, 442),
    ],
}
UNEQUAL = {"resnet56-60m", "mobilenet_v1-285m"}
DENSE = {
    "vgg16": 315_168_256,
    "resnet20": 41_059_584,
    "resnet56": 127_370_496,
    "mobilenet_v1": 569_764_352,
    "mobilenet_v2": 299_494_272,
    "resnet50": 4_187_083_240,
}


def test_published_is_complete():
    assert {name: list(p.channels) for name, p in PUBLISHED.items()} == GOLDEN
    assert {name for name, p in PUBLISHED.items() if not p.equal_importances} == UNEQUAL
    assert {name for name, p in PUBLISHED.items() if p.relevance is not None} == UNEQUAL
    assert {p.network for p in PUBLISHED.values()} == set(NETWORKS)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_list(name):
    published = PUBLISHED[name]
    assert sum(published.relevance or [1.0]) == pytest.approx(1.0)
    assert published.reproduce() == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_equal_importances_give(name):
    published, network = PUBLISHED[name], NETWORKS[PUBLISHED[name].network]()
    size = len(network.widths)
    for alpha in (official_importances([1 / size] * size, published.beta), np.zeros(size)):
        assert (official_channels(network, alpha, published.budget) == GOLDEN[name]) == published.equal_importances


@pytest.mark.parametrize("name", GOLDEN)
def test_tiny_importances_do_not_matter(name):
    published, network, rng = PUBLISHED[name], NETWORKS[PUBLISHED[name].network](), np.random.default_rng(0)
    equal = official_channels(network, np.zeros(len(network.widths)), published.budget)
    for _ in range(3):
        alpha = 10 ** rng.uniform(-20, -8, len(network.widths))
        assert official_channels(network, alpha, published.budget) == equal


def test_importances_of_order_one_do_matter():
    network = NETWORKS["resnet20"]()
    x = official_fractions(network, np.ones(9), 20e6)
    assert x.sum() > official_fractions(network, np.zeros(9), 20e6).sum() + 0.05
    assert official_flops(network, x * network.widths) == pytest.approx(20e6, rel=1e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_fractions_lie_on_the_surface_and_rounding_may_exceed_it(name):
    published, network = PUBLISHED[name], NETWORKS[PUBLISHED[name].network]()
    x = official_fractions(network, published.importances(), published.budget)
    assert x.min() > 0
    assert x.max() <= 1
    assert official_flops(network, x * network.widths) == pytest.approx(published.budget, rel=1e-9)


def test_vgg_ends_above_its_budget():
    assert official_flops(NETWORKS["vgg16"](), GOLDEN["vgg16-100m"]) == 100_552_887


@pytest.mark.parametrize("name", DENSE)
def test_dense_flops_and_names(name):
    network = NETWORKS[name]()
    assert network.name == name
    assert official_flops(network, network.widths) == DENSE[name]
    assert len(network.groups) == len(set(network.groups)) == len(network.features) == len(network.widths)
    linear, quadratic = network.form()
    assert (linear >= 0).all()
    assert (quadratic >= 0).all()
    assert np.array_equal(quadratic, np.triu(quadratic))


def count_vgg16(c):
    side, total = 32, 0
    for g, (c_in, c_out) in enumerate(zip([3, *c], c, strict=False)):
        total += (9 * c_in + 5) * c_out * side**2
        if g in (1, 3, 6, 9):
            side //= 2
            total += 2 * c_out * side**2
    return total + (3 + 2 * 512 + 4) * c[-1]


def count_resnet20(c):
    total = 2 * c[-1] * 10
    for g, (c_in, c_out) in enumerate(zip([16, *c], c, strict=False)):
        shortcut = c_in if g in (3, 6) else 0
        total += (9 * c_in + 9 * c_out + 8 + shortcut) * c_out * (32, 16, 8)[g // 3] ** 2
    return total


def count_mobilenet_v1(c):
    sides = [112, 56, 56, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7]
    blocks = sum((9 + b) * a * s**2 for a, b, s in zip(c, c[1:], sides, strict=False))
    return 27 * c[0] * 112**2 + blocks + 2000 * c[-1]


def count_mobilenet_v2(c):
    total, source, side = 27 * c[0] * 112**2 + c[-1] * 1280 * 49, c[0], 112
    for g, (expand, blocks) in enumerate([(1, 1), (6, 2), (6, 3), (6, 4), (6, 3), (6, 3), (6, 1)], start=1):
        for block in range(blocks):
            total += expand * source * source * side**2 if expand > 1 else 0
            side = side // 2 if block == 0 and g in (2, 3, 4, 6) else side
            total += expand * source * (9 + c[g]) * side**2
            source = c[g]
    return total


def count_resnet50(c):
    c = list(c)
    source = c.pop(0)
    total = (147 + 5) * source * 112**2 + 9 * source * 56**2
    for blocks, side in zip((3, 4, 6, 3), (56, 28, 14, 7), strict=True):
        out = c[2]
        total += (source + 5) * out * side**2
        for block in range(blocks):
            a, b = c.pop(0), c.pop(0)
            if block == 0:
                c.pop(0)
            total += (source + 5) * a * (side * (1 if block else 2)) ** 2
            total += (9 * a + 5) * b * side**2 + (b + 5) * out * side**2
            source = out
    return total + (2000 + 1000 / 512) * b  # the bias in proportion


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vgg16", count_vgg16),
        ("resnet20", count_resnet20),
        ("mobilenet_v1", count_mobilenet_v1),
        ("mobilenet_v2", count_mobilenet_v2),
        ("resnet50", count_resnet50),
    ],
)
def test_flops_against_a_direct_count(name, count):
    network, rng = NETWORKS[name](), np.random.default_rng(0)
    for _ in range(5):
        c = [int(rng.integers(1, w + 1)) for w in network.widths]
        assert official_flops(network, c) == pytest.approx(count(c), rel=1e-12)


def test_importances_follow_the_published_formula():
    nhsic = np.array([[1.0, 0.9, 0.3], [0.9, 1.0, 0.5], [0.3, 0.5, 1.0]])
    t = np.array([1.2, 1.4, 0.8]) / 3.4
    np.testing.assert_allclose(official_importances(relevance(nhsic), 231), np.exp(-231 * t), rtol=1e-12)


def test_a_budget_above_the_dense_cost_keeps_everything():
    for name in NETWORKS:
        network = NETWORKS[name]()
        zeros = np.zeros(len(network.widths))
        assert official_channels(network, zeros, DENSE[name] + 1) == list(network.widths)


def test_features_of_the_mobilenets_are_one_layer_further():
    v1, v2 = NETWORKS["mobilenet_v1"](), NETWORKS["mobilenet_v2"]()
    assert (v1.groups[0], v1.features[0], v1.features[-1]) == ("stem", "block1 output (after ReLU)", "logits")
    assert [x.split()[0] for x in v2.features] == [f"features.{i}" for i in (1, 3, 6, 10, 13, 16, 17, 18)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: official_channels(n, np.ones(8), 20e6), "9 groups.*(8,)"),
        (lambda n: official_channels(n, -np.ones(9), 20e6), "use official_importances"),
        (lambda n: official_channels(n, np.full(9, np.nan), 20e6), "use official_importances"),
        (lambda n: official_channels(n, np.zeros(9), 0.0), "budget=0.0 must be a positive"),
        (lambda n: official_channels(n, np.zeros(9), np.inf), "budget=inf must be a positive"),
        (
            lambda n: official_channels(n, np.zeros(9), 20),
            "budget=20 of 4.10596e.07 FLOPs leaves layer1.0, .*raise the",
        ),
        (lambda n: official_flops(n, [16] * 8), "9 channel counts"),
        (lambda n: official_importances([np.nan], 1.0), "use hsic.relevance"),
        (lambda n: official_importances([0.5, 0.5], np.inf), "beta=inf must be finite"),
        (lambda n: official_importances([0.5, 0.5], -1e4), "beta=-10000.0 overflows"),
        (lambda n: resnet_cifar(18), "depth=18 is not 6n . 2"),
    ],
)
def test_errors_name_value_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call(NETWORKS["resnet20"]())
