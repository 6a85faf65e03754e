"""What all benchmarks share: where the data are, where results go, and in which environment they were made."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FOLLOWED = {"batch_norms": "followed"}
"""Setting of results that depend on what happens to batch norms; those without it estimated them anew."""
DATA_ROOT = Path(os.environ.get("TP_IMPORTANCE_DATA", ROOT.parent / "shared" / "data"))


def parser(description: str, result: str) -> argparse.ArgumentParser:
    """Arguments of every benchmark; ``result`` is the file name of its results."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, default=RESULTS / result, help="JSON to write; cells in it are not run again")
    p.add_argument("--table", action="store_true", help="only print the table of --out, in markdown")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    p.add_argument("--date", default=date.today().isoformat(), help="date to write into the results")
    return p


def add_data_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--data-root", type=Path, default=DATA_ROOT, help="folder with data and weights (TP_IMPORTANCE_DATA)"
    )
    p.add_argument("--npz", type=Path, help="images from benchmarks/cifar_subset.py instead of the whole data set")


def require(path: Path, what: str) -> Path:
    """``path``, or an exit that says what is missing and where it was looked for."""
    if not path.exists():
        raise SystemExit(
            f"{what} is missing: {path} does not exist. Give --data-root, or set TP_IMPORTANCE_DATA, to a folder with "
            "the data (docs/benchmarks.md says which files)"
        )
    return path


def load_module(path: Path) -> Any:
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(device: str | torch.device, day: str) -> dict[str, Any]:
    """Versions and hardware, for the results file."""
    versions = {}
    for name in ("torch", "torchvision", "torch-pruning", "nni", "numpy", "tp-importance"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.device(device).type == "cuda"
    return {
        "date": day,
        "python": platform.python_version(),
        **versions,
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"CPU {model}, {os.cpu_count()} cores"


def write_json(path: Path, content: Any) -> None:
    """Write a file that is either the old or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)


class Cells:
    """Results that survive an interruption: one cell per key, written as soon as it is there.

    Args:
        path: the JSON file; its cells are kept if it was made with the same ``settings``.
        settings: what must agree for cells to be comparable.
        environment: recorded once per run and referred to by the cells of that run.
    """

    def __init__(self, path: Path, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "runs": [], "cells": [], "left_out": []}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != json.loads(json.dumps(settings)):
                raise SystemExit(f"{path} was made with {self.content['settings']}, not {settings}: give another --out")
        if environment not in self.content["runs"]:
            self.content["runs"].append(environment)
        self.run = self.content["runs"].index(environment)

    def __contains__(self, key: dict[str, Any]) -> bool:
        return any(cell["key"] == key for cell in self.content["cells"])

    def fill(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Compute and store the cell, unless it is there; what cannot be imported is noted as left out."""
        if key in self:
            return
        try:
            cell = make()
        except ImportError as error:  # a cell may be filled in later, on a machine that has the package
            self._write("left_out", {"key": key, "reason": f"{type(error).__name__}: {error}"})
            return
        self.content["left_out"] = [c for c in self.content["left_out"] if c["key"] != key]
        self._write("cells", {"key": key, **cell, "run": self.run})

    def _write(self, part: str, cell: dict[str, Any]) -> None:
        if cell not in self.content[part]:
            self.content[part].append(cell)
        write_json(self.path, self.content)
        print(*(v for v in flat(cell).values() if not isinstance(v, (list, dict))), flush=True)


def read_results(path: Path) -> dict[str, Any]:
    """What :class:`Cells` wrote."""
    return json.loads(require(path, "the results file").read_text())


def flat(cell: dict[str, Any]) -> dict[str, Any]:
    """Key and values of a cell in one dictionary."""
    return {**cell["key"], **{k: v for k, v in cell.items() if k != "key"}}


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
