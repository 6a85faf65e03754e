import math

import numpy as np
import pytest

from tp_importance.maths.rescaling import Ratios


def test_chains_of_equations_in_any_order():
    rng = np.random.default_rng(0)
    true = np.exp(rng.normal(size=40))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ratios = Ratios()
        numbers = [ratios.new() for _ in true]
        for i in rng.permutation(np.arange(1, 40)):  # a random tree
            j = int(rng.integers(i))
            assert ratios.bind(numbers[i], numbers[j], true[i] / true[j])
        for i, j in rng.integers(40, size=(30, 2)):
            assert ratios.bind(int(i), int(j), true[i] / true[j])  # follows already
            if i != j:
                assert not ratios.bind(int(i), int(j), 1.5 * true[i] / true[j])
            assert ratios.value(int(i)) / ratios.value(int(j)) == pytest.approx(true[i] / true[j])
        assert not ratios.is_known(3)
        assert sorted(map(ratios.value, range(40)))[19] == pytest.approx(1.0)  # most stay near what they are
        assert ratios.pin(7) and ratios.pin(7) and ratios.is_known(3)
        assert ratios.value(7) == 1.0 and ratios.value(3) == pytest.approx(true[3] / true[7])


def test_known_factors_meet():
    ratios = Ratios()
    a, b, c, d = (ratios.new() for _ in range(4))
    assert ratios.bind(b, a, 2.0) and ratios.pin(a)
    assert ratios.bind(d, c, 0.5) and ratios.pin(d)
    assert ratios.bind(c, b, 1.0)  # both are known to be 2
    assert not ratios.bind(c, b, 1.1) and not ratios.pin(b) and not ratios.pin(c)
    assert [ratios.value(i) for i in (a, b, c, d)] == pytest.approx([1, 2, 2, 1])


def test_a_refused_equation_changes_nothing():
    ratios = Ratios()
    a, b, c = (ratios.new() for _ in range(3))
    assert ratios.pin(a) and ratios.pin(b) and ratios.bind(c, b, 3.0)
    assert not ratios.bind(c, a, 2.0)
    assert [ratios.value(i) for i in (a, b, c)] == pytest.approx([1, 1, 3])
    assert ratios.bind(c, a, 3.0 * (1 + 1e-12))


@pytest.mark.parametrize("pinned_first", [True, False])
def test_the_pin_survives_either_way_of_joining(pinned_first):
    ratios = Ratios()
    a, b = ratios.new(), ratios.new()
    pinned, free = (a, b) if pinned_first else (b, a)
    assert ratios.pin(pinned)
    assert ratios.bind(a, b, 4.0)
    assert ratios.is_known(free) and ratios.value(pinned) == 1.0
    assert ratios.value(free) == pytest.approx(0.25 if free == b else 4.0)


def test_untouched_factors_are_exactly_one():
    ratios = Ratios()
    a, b = ratios.new(), ratios.new()
    ratios.bind(a, b)
    assert ratios.value(a) == ratios.value(b) == 1.0


def test_a_ratio_must_be_positive():
    ratios = Ratios()
    a, b = ratios.new(), ratios.new()
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError):
            ratios.bind(a, b, bad)
    assert math.isfinite(ratios.value(a))
