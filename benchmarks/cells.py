"""Results as JSON lines: a header with the settings, then environments and cells in the order they were made.

The first line is ``{"experiment": ..., "settings": {...}}``; then come ``{"environment": n, ...}`` (versions, device,
threads, date, revision), ``{"key": {...}, "values": {...}, "seed": ..., "environment": n}``, and ``{"key": {...},
"left_out": reason}`` for what could not be imported.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "torch-pruning", "nni", "numpy", "tp-importance")

Key = dict[str, Any]


class Paused(Exception):
    """A cell is not finished and goes on with the next call."""


class Cells:
    """Results that survive an interruption: a cell is appended as soon as it is there, and never made again.

    Args:
        path: the file; its cells are kept if it was made with the same settings.
        experiment: its name.
        settings: what must agree for cells to be comparable; not looked at if only reading.
    """

    def __init__(self, path: Path, experiment: str = "", settings: dict[str, Any] | None = None) -> None:
        self.path = path
        self.header: dict[str, Any] = {"experiment": experiment, "settings": settings or {}}
        self.environments: list[dict[str, Any]] = []
        self.cells: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, dict[str, Any]] = {}
        self._whole = 0  # bytes up to the end of the last whole line
        self._last = path.stat().st_size if path.exists() else 0  # bytes when last seen
        if path.exists():
            self._read()
            found = self.header["settings"]
            if experiment and self.header["experiment"] != experiment:
                raise SystemExit(
                    f"{path} has cells of {self.header['experiment']!r}, not {experiment!r}: give another --out"
                )
            if settings is not None and found != json.loads(json.dumps(settings)):
                raise SystemExit(f"{path} was made with {found}, not {settings}: give another --out")

    def _read(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, raw in enumerate(lines, 1):
            try:
                line = json.loads(raw)
            except ValueError as error:
                if number < len(lines) or raw.endswith(b"\n"):
                    raise SystemExit(f"{self.path}, line {number} is damaged: {error}") from error
                warnings.warn(
                    f"{self.path}: the last line is torn and dropped; its cell will be made again", stacklevel=4
                )
                return
            self._whole += len(raw)
            self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        if "experiment" in line:
            self.header = line
        elif "left_out" in line:
            self.left_out[identity(line["key"])] = line
        elif "key" in line:
            self.cells[identity(line["key"])] = line
            self.left_out.pop(identity(line["key"]), None)
        else:
            self.environments.append({k: v for k, v in line.items() if k != "environment"})

    def __contains__(self, key: Key) -> bool:
        return identity(key) in self.cells

    def fill(self, key: Key, make: Callable[[], dict[str, Any]], environment: dict[str, Any], seed: int) -> None:
        """Compute and store the cell, unless it is there; what cannot be imported is noted as left out."""
        if key in self:
            return
        try:
            values = make()
        except ImportError as error:  # a cell may be filled in later, on a machine that has the package
            reason = f"{type(error).__name__}: {error}"
            if self.left_out.get(identity(key), {}).get("left_out") != reason:
                self._append({"key": key, "left_out": reason})
            return
        if environment not in self.environments:
            self._append({"environment": len(self.environments), **environment})
        number = self.environments.index(environment)
        self._append({"key": key, "values": values, "seed": seed, "environment": number})

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if self.path.stat().st_size != self._last:
                raise SystemExit(f"{self.path} has grown meanwhile, another run writes to it: give another --out")
            lines = [line] if self._whole else [self.header, line]
            f.truncate(self._whole)  # a torn line goes
            before = self.path.read_bytes()[-1:] if self._whole else b"\n"
            text = "".join(compact(one) + "\n" for one in lines).encode()
            f.write(text if before == b"\n" else b"\n" + text)
            f.flush()
            os.fsync(f.fileno())
            self._whole = self._last = f.tell()
        self._add(json.loads(compact(line)))
        shown = {**line.get("key", {}), **line.get("values", {}), **{k: v for k, v in line.items() if k == "left_out"}}
        print(*(v for v in shown.values() if not isinstance(v, (list, dict))), flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """Key and values of every cell in one dictionary."""
        return [{**cell["key"], **cell["values"]} for cell in self.cells.values()]


def identity(key: Key) -> str:
    """A key as text; the order of its fields does not matter."""
    return json.dumps(key, sort_keys=True)


def compact(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def environment(device: str | torch.device, day: str | None = None) -> dict[str, Any]:
    """Versions, hardware and revision, for the results file."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.device(device).type == "cuda"
    return {
        "date": day or date.today().isoformat(),
        "python": platform.python_version(),
        **versions,
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "revision": revision(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"CPU {model}, {os.cpu_count()} cores"


def revision() -> str | None:
    """The commit, with a + if files differ from it; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
