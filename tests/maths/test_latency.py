"""Stairs, monotone surfaces and the calibration of predicted latencies."""

import math

import numpy as np
import pytest

from tp_importance.maths.latency import Grid, Surfaces, calibrate, knots, monotone, stair

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
