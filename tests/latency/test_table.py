"""The table of times of single layers, and its file."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from helpers.latency_cases import Clock
from tp_importance import LatencyTable
from tp_importance.graph.counting import Call
from tp_importance.latency.measure import Latency
from tp_importance.latency.model import LatencyModel
from tp_importance.latency.table import conditions_of, timed_layer
from tp_importance.testing import topology

# -- the table


def test_table_survives_in_its_file(tmp_path):
    case, path, clock = topology("residual"), tmp_path / "sub" / "table.json", Clock()
    first = LatencyModel.measure(case.groups, case.x, LatencyTable(path, measure=clock))
    layers = clock.calls
    again = LatencyTable(path, measure=clock)
    second = LatencyModel.measure(case.groups, case.x, again)
    assert clock.calls - layers == 3 * (1 + 3) and len(again) > 20  # only networks: three times the dense and 3 copies
    u = np.array([g.min_units for g in case.groups])
    assert first.predict(u) == second.predict(u)
    again.save()
    assert json.loads(path.read_text())["conditions"]["threads"] == torch.get_num_threads()


def test_layers_of_one_shape_are_timed_once():
    x, clock = torch.zeros(1, 4, 5, 5), Clock()
    table = LatencyTable(measure=clock).use(conditions_of(nn.Conv2d(4, 4, 3), x))
    for _ in range(2):
        layer = timed_layer(nn.Conv2d(4, 4, 3), Call("a", (1, 4, 5, 5), (1, 4, 3, 3), 1))
        grid = table.grid(layer)
    assert len(table) == clock.calls and grid.inputs == grid.outputs == [1, 2, 3, 4]
    other = timed_layer(nn.Conv2d(4, 4, 3, stride=2), Call("b", (1, 4, 5, 5), (1, 4, 2, 2), 1))
    assert other.key != layer.key


@pytest.mark.parametrize("what", ["device", "threads", "torch", "dtype", "memory_format"])
def test_foreign_tables_are_refused_or_replaced(tmp_path, what):
    path = tmp_path / "table.json"
    table = LatencyTable(path, measure=Clock()).use(conditions_of(nn.Linear(2, 2), torch.zeros(1, 2)))
    layer = timed_layer(nn.Linear(2, 2), Call("fc", (1, 2), (1, 2), 4))
    table.grid(layer)
    table.save()
    content = json.loads(path.read_text())
    content["conditions"][what] = "another"
    path.write_text(json.dumps(content))
    here = conditions_of(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=rf"other conditions \({what}: 'another', here .*remeasure=True"):
        LatencyTable(path).use(here)
    fresh = LatencyTable(path, remeasure=True, measure=Clock()).use(here)
    assert len(fresh) == 0 and fresh.conditions == here


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "tp_importance.latency.table", "version": 0}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no latency table"):
        LatencyTable(path)
    with pytest.raises(ValueError, match="min_run_time"):
        LatencyTable(min_run_time=0)


def test_conditions_know_the_memory_format():
    net, x = nn.Conv2d(4, 4, 3), torch.zeros(2, 4, 5, 5)
    assert conditions_of(net, x)["memory_format"] == "contiguous"
    last = x.contiguous(memory_format=torch.channels_last)
    assert conditions_of(net, last)["memory_format"] == "channels_last"
    seen = []

    def measure(module, inputs, **_):
        seen.append(inputs.is_contiguous(memory_format=torch.channels_last))
        return Latency(1.0, 0.0, 1, 1, "", 1)

    table = LatencyTable(measure=measure).use(conditions_of(net, last))
    table.time(timed_layer(net, Call("a", (2, 4, 5, 5), (2, 4, 3, 3), 1)), 3, 2)
    assert seen == [True]


@pytest.mark.parametrize("inputs, outputs", [(4, 12), (12, 4), (4, 4)])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_whose_groups_are_channels_are_timed_as_they_are_cut(kind, inputs, outputs):
    layer = kind(inputs, outputs, 3, groups=4)
    timed = timed_layer(layer, Call("c", (1, inputs, 8, 8), tuple(layer(torch.zeros(1, inputs, 8, 8)).shape), 1))
    assert (timed.inputs, timed.outputs, timed.multiple) == (1, outputs, outputs // 4)
    half, shape = timed.build(1, outputs // 2)
    assert (half.in_channels, half.out_channels, half.groups) == (inputs // 2, outputs // 2, 2)
    assert shape == (1, inputs // 2, 8, 8) and half(torch.zeros(shape)).shape[1] == outputs // 2
    plain = timed_layer(kind(4, 4, 3, groups=4), Call("c", (1, inputs, 8, 8), (1, 4, 6, 6), 1))
    assert (timed.key == plain.key) == (inputs == outputs)
