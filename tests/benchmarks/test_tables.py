"""Documents say what the results say."""

from __future__ import annotations

import re
import shutil
from functools import cache

import pytest

from benchmarks import experiment, tables
from benchmarks.cells import RESULTS, ROOT

table_of = cache(experiment.table)


def differences(root):
    """Tables of documents under a root that differ from the results, as (document, experiment, table)."""
    found = []
    for name in tables.DOCUMENTS:
        text = (root / name).read_text(encoding="utf-8")
        old, new = (list(tables.MARKED.finditer(t)) for t in (text, tables.regenerated(text, table_of)))
        found += [(name, a[2], a[3]) for a, b in zip(old, new, strict=True) if a[0] != b[0]]
    return found


@pytest.fixture
def copies(tmp_path):
    for name in tables.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def test_documents_agree_with_the_results():
    assert differences(ROOT) == [], "run `make bench-tables`"


def test_a_number_edited_by_hand_is_noticed(copies):
    """One digit of one number, in every table."""
    path = copies / "docs/benchmarks.md"
    text = path.read_text(encoding="utf-8")
    marked = list(tables.MARKED.finditer(text))
    assert len(marked) > 20
    for table in marked:
        body = text[table.start(0) : table.end(0)]
        row = body.index("\n", body.index("| ---"))
        numbers = [m for m in re.finditer(r"\d+\.\d+", body[row:])] or [m for m in re.finditer(r"\d+", body[row:])]
        number = numbers[len(numbers) // 2]
        at = table.start(0) + row + number.end(0) - 1
        path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], encoding="utf-8")
        assert differences(copies) == [("docs/benchmarks.md", table[2], table[3])]


def test_filling_mends_it(copies):
    path = copies / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("± 0.2", "± 0.9", 1), encoding="utf-8")
    assert differences(copies)
    assert tables.fill(experiment.table, copies) == ["README.md"]
    assert path.read_text(encoding="utf-8") == text and tables.fill(experiment.table, copies) == []


def test_markers_must_be_closed_and_known():
    with pytest.raises(SystemExit, match=r"1 tables are opened and 0 closed"):
        tables.regenerated("<!-- table: cifar by-arm -->\n| a |\n", experiment.table)
    with pytest.raises(SystemExit, match="cifar has no table 'nothing'"):
        tables.regenerated("<!-- table: cifar nothing -->\n<!-- end -->", experiment.table)
    with pytest.raises(SystemExit, match="no experiment 'nothing'"):
        tables.regenerated("<!-- table: nothing by-arm -->\n<!-- end -->", experiment.table)


def test_every_stored_result_has_an_experiment_and_every_table_can_be_made():
    for path in RESULTS.glob("*.jsonl"):
        found = experiment.find(path.stem)
        for name, table in found.show.items():
            assert table(found.rows()).count("|") > 4, (path.stem, name)


def test_pivot_gives_mean_and_standard_deviation():
    rows = [{"arm": a, "network": n, "top1": t} for a, n, t in [("L1", "x", 1.0), ("L1", "x", 3.0), ("L2", "y", 5.25)]]
    assert tables.pivot(rows, "arm", "network", digits=2).splitlines() == [
        "| arm | x | y |",
        "| --- | --- | --- |",
        "| L1 | 2.00 ± 1.41 |  |",
        "| L2 |  | 5.25 |",
    ]
    assert tables.pivot(rows, "arm", "network", order=["L2"]).splitlines()[2].startswith("| L2 |")
