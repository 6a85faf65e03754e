"""Pictures of the documents, drawn from stored results: ``python benchmarks/run.py --figures``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import experiment
from benchmarks.cells import ROOT
from benchmarks.tables import Rows, chosen, distinct

FOLDER = ROOT / "docs" / "pictures"


def recovery_curve(rows: Rows) -> Figure:
    """Accuracy after a recovery against its minutes, one line per number of images."""
    figure = Figure(figsize=(6.4, 3.8), layout="tight")
    axes: Any = figure.subplots()
    (dense,) = chosen(rows, arm="dense")
    for images in sorted(distinct([r for r in rows if r["arm"] != "dense"], "images")):
        mine = sorted(chosen(rows, images=images), key=lambda r: r["recovery_s"])
        minutes = [0.0, *(r["recovery_s"] / 60 for r in mine)]
        axes.plot(minutes, [mine[0]["before"], *(r["top1"] for r in mine)], marker="o", label=f"{images:,} images")
    axes.axhline(dense["top1"], color="black", linestyle="--", linewidth=1, label="dense")
    axes.set(xlabel="minutes of recovery, one CPU thread", ylabel="top-1, %")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Rows], Figure]]] = {
    "recovery-curve": ("recover-curve", recovery_curve),
}
"""By file name: an experiment, and what draws its rows."""


def draw(folder: Path = FOLDER) -> list[Path]:
    """Draw all pictures whose results are there, as SVG that does not change from run to run."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (of, figure) in FIGURES.items():
        found = experiment.find(of)
        if found.results.exists():
            made.append(folder / f"{name}.svg")
            with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure(found.rows()).savefig(made[-1], metadata={"Date": None})
    return made
