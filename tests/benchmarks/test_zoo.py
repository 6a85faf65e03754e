"""The zoo's own tools: its judge, its clock, its tables, and networks half of whose channels are dead."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from benchmarks.experiments import zoo
from benchmarks.zoo import parts, runner
from benchmarks.zoo.catalogue import CATALOGUE, by_name, chosen
from benchmarks.zoo.embedding import difference
from benchmarks.zoo.planted import kill_odd_channels, planted
from benchmarks.zoo.scramble import distinct, scramble

QUICK = (
    *("yolo11n", "swin_t", "retinanet_resnet50_fpn", "resnest14d", "res2net50_26w_4s", "ghostnet_100", "cspdarknet53"),
    *("skresnet18", "shufflenet_v2_x1_0", "nf_regnet_b0", "yolov8n", "yolov7-head", "yolov7-head-split"),
)


def test_the_catalogue_holds_what_was_asked_for():
    families = Counter(n.family for n in CATALOGUE.values())
    assert len(CATALOGUE) >= 80 and families["timm"] >= 40 and families["ultralytics"] == 10
    assert families["transformers"] >= 10
    assert sum(n.planted for n in CATALOGUE.values()) >= 20
    assert all(CATALOGUE[name].quick for name in QUICK)
    with pytest.raises(ValueError, match="two networks of the zoo are called 'unet'"):
        by_name([CATALOGUE["unet"], CATALOGUE["unet"]])


def test_attention_of_hugging_face_runs_fused_and_written_out():
    pytest.importorskip("transformers")
    outputs = []
    for name, implementation in (("bert-encoder", "sdpa"), ("bert-encoder-eager", "eager")):
        model, inputs = CATALOGUE[name].ready()
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            outputs.append(CATALOGUE[name].run(model, inputs))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_networks_are_chosen_by_name_pattern_and_family():
    assert [n.name for n in chosen("yolo11n")] == ["yolo11n"]
    assert [n.name for n in chosen("yolo11n*,crnn")] == ["yolo11n", "yolo11n-train", "crnn"]
    assert {n.family for n in chosen("video")} == {"video"} and len(chosen("")) == len(CATALOGUE)
    with pytest.raises(SystemExit, match="no network or family of the zoo matches 'yolo99'"):
        chosen("yolo99")


def test_nothing_in_a_network_is_trivially_equal():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.ReLU())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scramble(net.eval(), lambda: net(x), torch.Generator().manual_seed(0))
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if "num_batches" not in name:
            assert len(tensor.unique()) == tensor.numel(), name
    with torch.no_grad():
        assert 0.5 < float(net[:2](x).abs().max()) < 50  # statistics fit the data
    assert sorted(distinct(5, torch.Generator()).mul(5).long().tolist()) == [0, 1, 2, 3, 4]


def cut(keep_made, keep_read, norm=nn.BatchNorm1d):
    """A network of one hidden layer with distinct values, and what is left of it by hand."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 8), norm(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x = torch.randn(6, 5)
    scramble(dense, lambda: dense(x), torch.Generator().manual_seed(0))
    pruned = copy.deepcopy(dense)
    pruned[0] = nn.Linear(5, len(keep_made))
    pruned[1] = norm(len(keep_made))
    pruned[3] = nn.Linear(len(keep_read), 3)
    state = dense.state_dict()
    for name, value in state.items():
        if name.startswith(("0", "1")) and value.ndim:
            state[name] = value[keep_made]
    state["3.weight"] = state["3.weight"][:, keep_read]
    pruned.load_state_dict(state)
    return dense, pruned.eval(), lambda m: m(x.to(m[0].weight))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_the_judge_accepts_what_is_left_and_nothing_else(norm):
    assert difference(*cut([0, 2, 5], [0, 2, 5], norm)) is None
    assert "is off by" in difference(*cut([0, 2, 5], [0, 2, 6], norm))  # the consumer lost another channel
    dense, pruned, run = cut([0, 2, 5], [0, 2, 5], norm)
    with torch.no_grad():
        pruned[3].weight[1, 1] += 0.5
    assert difference(dense, pruned, run) == "3.weight is no part of the dense tensor"
    with torch.no_grad():
        pruned[3].weight[:, 1] += 0.5
    assert difference(dense, pruned, run) == "the values of 3.weight are not found in the dense tensor"


def test_the_judge_looks_at_the_module_where_values_repeat_themselves():
    dense, pruned, run = cut([0, 2, 5], [0, 2, 5])
    with torch.no_grad():
        dense[1].running_mean.zero_(), pruned[1].running_mean.zero_()
    assert difference(dense, pruned, run) is None


def test_the_judge_names_other_tensors():
    dense, pruned, run = cut([0, 2, 5], [0, 2, 5])
    pruned.append(nn.Linear(3, 3))
    assert difference(dense, pruned, run) == "it has other tensors: 4.bias, 4.weight"


def test_torch_pruning_alone_is_right_where_it_is_and_wrong_where_it_is_not():
    outcome = {}
    for name in ("unet", "resnet20-option-a"):
        exam = parts.Examination(CATALOGUE[name], {}, repeats=1)
        outcome[name] = parts.torch_pruning(exam)["outcome"]
    assert outcome == {"unet": "right", "resnet20-option-a": "wrong"}


@pytest.mark.parametrize("name", ["perceptron", "siamese", "dcgan", "mobilenet_v3_small"])
def test_dead_channels_go_and_nothing_changes(name):
    model, inputs = CATALOGUE[name].ready()
    found = planted(CATALOGUE[name], model, inputs)
    assert found["off"] is None and not found["live"] and found["removed"] > 0, found
    assert found["reached"] <= found["budget"] <= 0.6


def test_planting_kills_exactly_the_odd_channels():
    x = torch.randn(2, 8, 9, 9)
    for layer in (
        nn.Conv2d(8, 6, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 6, 2),
        nn.ConvTranspose2d(8, 4, 2, groups=2),
        nn.ConvTranspose2d(8, 8, 2, groups=8),
        nn.BatchNorm2d(8),
    ):
        scramble(layer.eval(), lambda layer=layer: layer(x), torch.Generator().manual_seed(0))
        kill_odd_channels(layer)
        alive = layer(x).abs().amax((0, 2, 3)) > 0
        assert alive[::2].all() and not alive[1::2].any(), layer


class Script:
    """Stands in for the worker: gives what each process in turn is to say."""

    def __init__(self, *processes):
        self.processes, self.orders, self.killed = list(processes), [], 0

    def __call__(self, order):
        self.orders.append(copy.deepcopy(order))
        self.lines = iter(self.processes.pop(0))
        return self

    def values(self, limit):
        return next(self.lines)

    def kill(self):
        self.killed += 1


def test_a_part_that_hangs_takes_no_other_with_it(monkeypatch):
    script = Script([{}, {"s": 1}, {"timeout": 9}], [{}, {"outcome": "right"}])
    monkeypatch.setattr(runner, "Worker", script)
    asked = ["forward", "discovery", "verified", "half", "torch_pruning"]
    found = runner.examine("unet", asked, limit=9, threads=1, repeats=1)
    skipped = {"skipped": "there are no groups"}
    assert found == {
        **{"forward": {"s": 1}, "discovery": {"timeout": 9}, "verified": skipped, "half": skipped},
        "torch_pruning": {"outcome": "right"},
    }
    assert script.killed == 2 and script.orders[1]["parts"] == ["torch_pruning"]
    assert script.orders[1]["known"]["forward"] == {"s": 1}


def test_a_part_that_dies_does_not_end_those_behind_it(monkeypatch):
    script = Script([{}, {"s": 1}, {"groups": 3}, {"died": "exit status -9: "}], [{}, {"met": True}])
    monkeypatch.setattr(runner, "Worker", script)
    found = runner.examine("unet", ["forward", "discovery", "verified", "half"], limit=9, threads=1, repeats=1)
    assert found["verified"] == {"died": "exit status -9: "} and found["half"] == {"met": True}


def test_a_missing_library_leaves_the_network_out(monkeypatch):
    monkeypatch.setattr(runner, "Worker", Script([{"missing": "ModuleNotFoundError: No module named 'timm'"}]))
    with pytest.raises(ImportError, match="timm"):
        runner.examine("dla34", ["forward"], limit=9, threads=1, repeats=1)


def test_real_processes_are_killed_and_report_how_they_die():
    found = runner.examine("perceptron", ["forward", "discovery"], limit=0.05, threads=1, repeats=1)
    assert found == {"forward": {"timeout": 0}, "discovery": {"timeout": 0}}
    worker = runner.Worker({"network": "perceptron"})  # an order without the rest
    assert "KeyError" in worker.values(120)["died"]
    worker.kill()


def test_no_process_is_left_behind_by_a_run_that_is_killed():
    code = (
        "from benchmarks.zoo.runner import Worker; import os, sys, time\n"
        "w = Worker({'network': 'perceptron', 'parts': ['forward'], 'known': {}, 'threads': 1, 'repeats': 10**9})\n"
        "w.values(100); print(w._process.pid, flush=True); time.sleep(100)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=runner.ROOT)
    worker = int(run.stdout.readline())
    os.kill(worker, 0)  # it is there
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while _running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running(worker)


def _running(process):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_tables_say_what_failed():
    good = {
        "network": "unet",
        "forward": {"s": 0.1, "macs": 2_000_000_000},
        "discovery": {"s": 0.25},
        "verified": {"s": 0.5, "groups": 17, "excluded": {"output": 1}, "reach": 1.0, "floor": 0.01},
        "half": {"s": 3.0, "met": True, "reached": 0.4999, "differs": None, "budget": 0.5},
        "oracle": {
            **{"masked_is_removed": None, "planned": None, "shifts_caught": [6, 6], "costs_exact": 2},
            "budgets": {"greedy": [20, 20]},
        },
        "planted": {"off": None, "live": [], "reached": 0.4999, "budget": 0.5},
        "torch_pruning": {"outcome": "right", "reason": None, "reached": 0.48},
    }
    bad = {
        "network": "yolov7-head",
        "forward": {"s": 0.1, "macs": 1_000_000_000},
        "discovery": {"timeout": 120},
        "verified": {"skipped": "there are no groups"},
        "torch_pruning": {"timeout": 120},
    }
    differs = {**good, "network": "dcgan", "half": {**good["half"], "differs": "output 0 is off by 0.2"}}
    rows = [bad, differs, good]
    by_network = zoo.by_network(rows).splitlines()
    assert by_network[2] == (
        "| unet | 2 | 0.100 | 0.25 | 0.50 | 17 | 1 output | 100.0 | 1.0 | yes, 50.0 | yes | 30 | right, 48.0 |"
    )
    assert "no: output 0 is off by 0.2" in by_network[3]
    assert by_network[4] == "| yolov7-head | 1 | 0.100 | more than 120 s |  |  |  |  |  |  |  |  | hang (120 s) |"
    assert len(zoo.checks(rows).splitlines()) == 4 and "unchanged at 50.0" in zoo.checks(rows)
    assert zoo.quick(rows).splitlines()[2:] == ["| yolov7-head | 0.100 | more than 120 s |  | 3.00 | no |  |"]
