"""Results files: what is there is kept, whatever happens."""

from __future__ import annotations

import json

import pytest

from benchmarks.cells import RESULTS, Cells, environment

HERE = {"torch": "2.0", "threads": 1, "revision": None}


def filled(path, n=3, settings=None):
    cells = Cells(path, "made-up", {"images": 5} if settings is None else settings)
    for draw in range(n):
        cells.fill({"arm": "L1", "draw": draw}, lambda draw=draw: {"top1": 50.5 + draw}, HERE, draw)
    return cells


def test_a_line_per_cell_and_environments_once(tmp_path):
    path = tmp_path / "sub" / "results.jsonl"
    filled(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"experiment": "made-up", "settings": {"images": 5}}
    assert lines[1] == {"environment": 0, **HERE}
    assert lines[2] == {"key": {"arm": "L1", "draw": 0}, "values": {"top1": 50.5}, "seed": 0, "environment": 0}
    assert len(lines) == 5
    assert Cells(path).rows()[-1] == {"arm": "L1", "draw": 2, "top1": 52.5}


def test_cells_are_not_made_again(tmp_path):
    path = tmp_path / "results.jsonl"
    filled(path)
    before = path.read_bytes()
    again = filled(path)
    assert {"draw": 1, "arm": "L1"} in again and path.read_bytes() == before  # whatever the order of the fields
    again.fill({"arm": "L2", "draw": 0}, lambda: {"top1": 1.0}, {**HERE, "threads": 2}, 0)
    assert path.read_bytes().startswith(before)
    assert [e["threads"] for e in Cells(path).environments] == [1, 2]


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    filled(path)
    with pytest.raises(SystemExit, match=r"made with \{'images': 5\}, not \{'images': 6\}: give another --out"):
        Cells(path, "made-up", {"images": 6})


@pytest.mark.parametrize("kept", [1, 12, 40])
def test_a_torn_line_costs_one_cell(tmp_path, kept):
    path = tmp_path / "results.jsonl"
    filled(path)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    path.write_bytes(whole[: last + kept])
    with pytest.warns(UserWarning, match="the last line is torn"):
        cells = filled(path, 2)
    assert len(cells.cells) == 2 and {"arm": "L1", "draw": 2} not in cells
    with pytest.warns(UserWarning, match="the last line is torn"):
        filled(path)
    assert path.read_bytes() == whole


def test_a_torn_header_and_a_missing_last_newline(tmp_path):
    path = tmp_path / "results.jsonl"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    filled(path, 4)
    assert path.read_bytes().startswith(whole) and len(Cells(path).cells) == 4
    path.write_bytes(whole[:9])
    with pytest.warns(UserWarning, match="the last line is torn"):
        filled(path)
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "results.jsonl"
    filled(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))
    with pytest.raises(SystemExit, match="line 3 is damaged"):
        Cells(path)


def test_what_cannot_be_imported_is_left_out_until_it_can(tmp_path):
    path, key = tmp_path / "results.jsonl", {"arm": "NNI L1"}

    def missing():
        raise ImportError("no module named nni")

    for _ in range(2):
        cells = filled(path, 1)
        cells.fill(key, missing, HERE, 0)
    assert path.read_text().count("no module named nni") == 1 and key not in Cells(path)
    cells.fill(key, lambda: {"top1": 3.0}, HERE, 0)
    assert key in Cells(path) and not Cells(path).left_out


def test_the_environment_names_versions_device_and_revision():
    found = environment("cpu", "2026-01-02")
    assert found["date"] == "2026-01-02" and found["torch"] and found["device"].startswith("CPU")
    assert found["threads"] >= 1 and found["revision"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda p: p.stem)
def test_stored_results_are_whole(path):
    cells = Cells(path)
    assert cells.header["experiment"] == path.stem and cells.cells
    numbers = {line["environment"] for line in cells.cells.values()}
    assert numbers == set(range(len(cells.environments)))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(cells.environments) + len(cells.cells) + len(cells.left_out)


def test_two_runs_on_one_file_do_not_destroy_each_other(tmp_path):
    path = tmp_path / "one.jsonl"
    first, second = (Cells(path, "one", {"a": 1}) for _ in range(2))
    second.fill({"k": 1}, lambda: {"v": 1}, {}, 0)
    with pytest.raises(SystemExit, match="has grown meanwhile"):
        first.fill({"k": 2}, lambda: {"v": 2}, {}, 0)
    second.fill({"k": 3}, lambda: {"v": 3}, {}, 0)
    assert [row["v"] for row in Cells(path).rows()] == [1, 3]


def test_a_file_of_another_experiment_is_refused(tmp_path):
    path = tmp_path / "one.jsonl"
    Cells(path, "one", {"a": 1}).fill({"k": 1}, lambda: {"v": 1}, {}, 0)
    with pytest.raises(SystemExit, match="has cells of 'one', not 'two'"):
        Cells(path, "two", {"a": 1})
