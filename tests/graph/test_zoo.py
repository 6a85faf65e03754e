"""Groups of zoo networks: how many there are, what is within reach, and one pruning that another judge looks at."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision")

from benchmarks.zoo.catalogue import CATALOGUE
from benchmarks.zoo.parts import Examination, half, verified

EXPECTED: dict[str, tuple[int, float]] = {
    "perceptron": (2, 1.0),
    "unet": (17, 1.0),
    "dcgan": (4, 1.0),
    "siamese": (4, 1.0),  # two calls of one encoder
    "mobilenet_v3_small": (27, 1.0),
    "lraspp_mobilenet_v3_large": (30, 1.0),
    "resnet20-option-a": (10, 1.0),  # nine blocks, and 16 of the channels that go through all stages
    "super-resolution": (3, 1.0),  # four channels of nine behind a pixel shuffle are four units
    "audio": (7, 1.0),  # stem, stream, four gated blocks with value and gate tied, head
    "crnn": (4, 0.99),  # the last convolution makes inputs of an LSTM; its hidden size and the head behind it stay
    "text-cnn": (3, 1.0),  # three convolutions; what an embedding alone makes is in no group
    "several-tasks": (4, 1.0),  # a gate of one channel ties nothing
    "yolov7-head": (20, 1.0),
    "yolov7-head-split": (20, 1.0),
}
"""Groups that are left after the verification, and the least fraction of the MACs within reach."""


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_and_one_pruning(name):
    exam = Examination(CATALOGUE[name], {}, repeats=1)
    found = verified(exam)
    groups, reach = EXPECTED[name]
    assert found["groups"] == groups and found["reach"] >= reach, found
    assert "unverified" not in found["excluded"], found["reasons"]
    done = half(exam)
    assert done["met"] and done["differs"] is None, done
    assert 0.49 < done["reached"] <= 0.5


def test_channels_that_a_shuffle_moves():
    exam = Examination(CATALOGUE["shufflenet_v2_x1_0"], {}, repeats=1)
    found = verified(exam)
    assert found["reach"] >= 0.95 and "unverified" not in found["excluded"], found
    done = half(exam)
    assert done["met"] and done["differs"] is None, done


def test_group_norms_let_a_diffusion_network_shrink():
    """Ties of its skips leave whole norm groups to go; least widths are a few percent of the cost.

    The single head of its attention stays.
    """
    found = verified(Examination(CATALOGUE["diffusion-unet"], {}, repeats=1))
    assert found["excluded"] == {"output": 1, "mixed": 1} and found["floor"] < 0.04, found
