import importlib
import json

import pytest
import torch_pruning as tp

from tp_importance import Budget, BudgetPruner, CATROPruner, count_ops
from tp_importance.budget import Cost
from tp_importance.graph.groups import Excluded
from tp_importance.pruning.report import GroupRow, PruningReport
from tp_importance.testing import class_loader, make_network

PNG = b"\x89PNG\r\n\x1a\n"


def small():
    """By hand: every number below can be checked with pencil and paper."""
    return PruningReport(
        rows=[GroupRow("stem", 8, 8, 6, 0.25), GroupRow("layer1.conv1", 16, 12, 4, 0.5)],
        dense=Cost(macs=1_000_000, params=4_000),
        before=Cost(macs=800_000, params=3_000),
        cost=Cost(macs=400_000, params=1_000),
        limits={"macs": 500_000},
        bytes_per_param=4.0,
        excluded=[Excluded("head", 10, "produces the network's output", "output")],
        constant={"stem": 2},
        criterion="Criterion",
    )


@pytest.fixture(scope="module")
def real():
    model, x = make_network("residual")
    pruner = CATROPruner(model, x, class_loader(n=32), budget=Budget(macs=0.5, params=0.6))
    return pruner.step(), count_ops(model, x), pruner


def test_text():
    text = str(small())
    lines = text.splitlines()
    assert lines[0].split() == ["group", "channels", "removed", "MACs"]
    assert lines[1].split() == ["stem", "8", "→", "6", "0.250", "0.250"]
    assert lines[2].split() == ["layer1.conv1", "12", "→", "4", "0.750", "0.500"]
    assert lines[4].split() == ["macs", "1,000,000", "→", "400,000", "(0.4000,", "limit", "500,000)"]
    assert lines[5].split() == ["params", "4,000", "→", "1,000", "(0.2500)"]
    assert lines[6].split() == ["bytes", "16,000", "→", "4,000", "(0.2500)"]
    assert lines[7] == "constant on the data: 2 in stem"
    assert lines[8] == "left alone: head (10): produces the network's output"
    assert len({len(line) for line in lines[:3]}) == 1  # a table


def test_text_of_nothing():
    empty = PruningReport([], Cost(macs=0, params=0), Cost(macs=0, params=0), Cost(macs=0, params=0), {}, 0.0, [])
    assert "group" in str(empty)


def test_numbers_are_those_of_the_network(real):
    report, counted, pruner = real
    assert (report.cost.macs, report.cost.params) == counted
    assert report.limits == {"macs": report.dense.macs // 2, "params": int(0.6 * report.dense.params)}
    assert [r.name for r in report.rows] == list(pruner.initial_widths)  # in execution order
    for row in report.rows:
        assert row.pruning_ratio == pytest.approx(1 - row.after / row.initial)
        assert 0 < row.macs_share < 1
    assert report.totals() == [
        ("macs", report.dense.macs, counted[0]),
        ("params", report.dense.params, counted[1]),
        ("bytes", 4 * report.dense.params, 4 * counted[1]),
    ]
    assert report.criterion == "CATROImportance"
    assert [(e.name, e.width) for e in report.excluded] == [("3.2", 4)]


def test_criterion_and_bytes_of_other_networks():
    model, x = make_network("residual")
    pruner = BudgetPruner(
        model.half(), x.half(), importance=tp.importance.MagnitudeImportance(), budget=Budget(macs=0.5)
    )
    report = pruner.step()
    assert report.criterion == "MagnitudeImportance" and report.bytes_per_param == 2.0
    assert report.totals()[2] == ("bytes", 2 * report.dense.params, 2 * report.cost.params)


def test_rows_of_a_second_step():
    model, x = make_network("residual")
    pruner = CATROPruner(model, x, class_loader(n=32), budget=Budget(macs=0.7))
    first = {r.name: r for r in pruner.step().rows}
    for row in pruner.step(Budget(macs=0.4)).rows:
        assert row.initial == first[row.name].initial and row.before == first[row.name].after >= row.after


def test_json_round_trip(real, tmp_path):
    for report in (small(), real[0]):
        text = report.to_json(tmp_path / "report.json")
        assert (tmp_path / "report.json").read_text(encoding="utf-8") == text + "\n"
        again = PruningReport.from_dict(json.loads(text))
        assert again == report and str(again) == str(report) and again.to_json() == text
        assert isinstance(again.cost, Cost) and isinstance(again.rows[0], GroupRow)
        assert isinstance(again.excluded[0], Excluded)


def test_json_is_plain():
    data = json.loads(small().to_json())
    assert data["cost"] == {"macs": 400_000, "params": 1_000} and data["limits"] == {"macs": 500_000}
    assert data["rows"][1] == {"name": "layer1.conv1", "initial": 16, "before": 12, "after": 4, "macs_share": 0.5}


def test_frame():
    frame = small().to_frame()
    assert list(frame.columns) == ["name", "initial", "before", "after", "macs_share", "pruning_ratio"]
    assert frame["after"].tolist() == [6, 4] and frame["pruning_ratio"].tolist() == [0.25, 0.75]
    assert len(PruningReport([], *[Cost(macs=1, params=1)] * 3, {}, 4.0, []).to_frame()) == 0


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(real, tmp_path, suffix):
    path = tmp_path / f"report.{suffix}"
    figure = real[0].plot(path)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == [r.name for r in real[0].rows]
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    assert heights == [[r.initial for r in real[0].rows], [r.after for r in real[0].rows]]
    assert path.stat().st_size > 1000
    assert suffix != "png" or path.read_bytes()[:8] == PNG


def test_plot_without_a_file_touches_no_global_state():
    pyplot = importlib.import_module("matplotlib.pyplot")
    before = pyplot.get_fignums()
    small().plot()
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize(("use", "package"), [("to_frame", "pandas"), ("plot", "matplotlib")])
def test_missing_extras_are_named(monkeypatch, use, package):
    original = importlib.import_module

    def without(name, *args):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    report = small()
    with pytest.raises(RuntimeError, match=rf"{package} is needed.*tp-importance\[report\]"):
        getattr(report, use)()
    report.to_json()
    str(report)
