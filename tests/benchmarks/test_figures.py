"""Pictures are drawn from results."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks import figures
from benchmarks.cells import ROOT


def test_accuracy_over_minutes():
    rows = [{"arm": "dense", "top1": 92.0}]
    for images in (500, 50):
        for seconds, top1 in ((120.0, 89.0), (60.0, 88.0)):
            rows.append({"arm": "OBS", "images": images, "recovery_s": seconds, "before": 80.0, "top1": top1})
    (axes,) = figures.recovery_curve(rows).axes
    assert [line.get_label() for line in axes.lines] == ["50 images", "500 images", "dense"]
    assert axes.lines[0].get_xydata().tolist() == [[0.0, 80.0], [1.0, 88.0], [2.0, 89.0]]


def test_pictures_are_the_same_every_time_and_those_of_the_documents_are_there(tmp_path):
    once, again = (figures.draw(tmp_path / name) for name in "ab")
    assert [a.read_bytes() for a in once] == [b.read_bytes() for b in again]
    for path in (ROOT / "docs" / "pictures").glob("*.svg"):
        assert path.stem in figures.FIGURES
