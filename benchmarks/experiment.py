"""What an experiment is: axes whose combinations are its cells, a function that makes one, and tables of them."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import cells, tables, tasks
from benchmarks.data import DATA_ROOT

FOLLOWED = {"batch_norms": "followed"}
"""Setting of results that depend on what happens to batch norms; those without it estimated them anew."""
SMOKE = {"network": ["digits"], "budget": [0.5], "draw": [0], "images": 100, "n_test": 200}
"""Axes and settings of all experiments that have them, to see in seconds whether all works."""


class Run:
    """The axes, settings and options of one call, as attributes, and the tasks that its cells share."""

    def __init__(self, experiment: Experiment, given: Mapping[str, Any]) -> None:
        self.experiment, self.given = experiment, dict(given)
        self._tasks: dict[str, tasks.Task] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["given"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def settings(self) -> dict[str, Any]:
        return {name: self.given[name] for name in self.experiment.settings}

    def axis(self, name: str) -> list[Any]:
        return self.given[plural(name)]

    def task(self, name: str) -> tasks.Task:
        """Network and data, made once."""
        if name not in self._tasks:
            self._tasks[name] = tasks.task(name, self)
        return self._tasks[name]

    def probe(self, key: dict[str, Any]) -> float:
        """A number that the experiment's ``probe`` measures in a fresh process."""
        code = "from benchmarks.experiment import answer; answer()"
        given = {k: str(v) if isinstance(v, Path) else v for k, v in self.given.items()}
        text = json.dumps([self.experiment.name, given, key])
        out = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, cwd=cells.ROOT)
        if out.returncode:
            raise RuntimeError(out.stderr)
        return float(out.stdout.split()[-1])


def answer() -> None:
    """Of the fresh process."""
    name, given, key = json.load(sys.stdin)
    given.update(data_root=Path(given["data_root"]), npz=given["npz"] and Path(given["npz"]))
    torch.set_num_threads(given["threads"])
    run = Run(find(name), given)
    assert run.experiment.probe is not None
    print(run.experiment.probe(run, key))


@dataclass(frozen=True)
class Experiment:
    """One configuration.

    Attributes:
        name: of the experiment and its results file.
        about: one line for the list.
        axes: values by default, outermost first; a cell is one of each.
        cell: ``cell(run, key)`` gives the values.
        settings: defaults of what must agree for cells to be comparable.
        options: defaults of what need not.
        show: tables by name, from the rows of the results.
        keys: the keys of all cells, if they are not the product of the axes after the unpruned networks.
        dense: whether every network is measured unpruned first, by ``cell`` with the arm "dense".
        smoke: replaces defaults so that all ends within seconds, beside :data:`SMOKE`.
        threads: of torch; None for its own choice.
        device: None for a GPU if there is one.
        probe: what is measured in a process of its own.
    """

    name: str
    about: str
    axes: Mapping[str, Iterable[Any]]
    cell: Callable[[Run, dict[str, Any]], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    show: Mapping[str, Callable[[tables.Rows], str]] = field(default_factory=dict)
    keys: Callable[[Run], Iterable[dict[str, Any]]] | None = None
    dense: bool = True
    smoke: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    device: str | None = None
    probe: Callable[[Run, dict[str, Any]], float] | None = None

    @property
    def results(self) -> Path:
        return cells.RESULTS / f"{self.name}.jsonl"

    def rows(self, path: Path | None = None) -> tables.Rows:
        return cells.Cells(path or self.results).rows()

    def all_keys(self, run: Run) -> Iterator[dict[str, Any]]:
        if self.keys is not None:
            yield from self.keys(run)
            return
        others = [a for a in self.axes if a != "network"]
        for network in run.axis("network"):
            if self.dense:
                yield {"network": network, "arm": "dense"}
            for values in product(*map(run.axis, others)):
                yield {"network": network, **dict(zip(others, values, strict=True))}

    def parser(self) -> argparse.ArgumentParser:
        """The arguments of this experiment, with its own defaults."""
        p = argparse.ArgumentParser(
            f"run.py {self.name}",
            description=sys.modules[self.cell.__module__].__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        for name, values in self.axes.items():
            default = list(values)
            p.add_argument(f"--{plural(name)}".replace("_", "-"), nargs="+", type=kind(*default), default=default)
        for what, part in (("must agree within a file of results", self.settings), ("free", self.options)):
            for name, default in part.items():
                if name in ("device", "threads"):  # see below
                    continue
                if part is self.settings and isinstance(default, (str, list, dict)):  # a constant
                    p.set_defaults(**{name: default})
                    continue
                how = (
                    {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": kind(default)}
                )
                p.add_argument(f"--{name}".replace("_", "-"), default=default, help=what, **how)
        best = "cuda" if torch.cuda.is_available() else "cpu"
        p.add_argument("--device", default=self.device or best)
        p.add_argument("--threads", type=int, default=self.threads or torch.get_num_threads(), help="CPU threads")
        p.add_argument("--data-root", type=Path, default=DATA_ROOT, help="data and weights (TP_IMPORTANCE_DATA)")
        p.add_argument("--npz", type=Path, help="images made by `run.py subset` instead of the whole data set")
        p.add_argument("--out", type=Path, default=self.results, help="JSON lines; cells in it are not run again")
        p.add_argument("--date", help="date to write into the results; default: today")
        p.add_argument("--table", action="store_true", help="only print the tables of --out, in markdown")
        p.add_argument("--smoke", action="store_true", help="tiny settings, over in seconds; into a temporary file")
        return p

    def main(self, arguments: list[str]) -> None:
        p = self.parser()
        if "--smoke" in arguments:
            out = Path(tempfile.mkdtemp()) / f"{self.name}.jsonl"
            known = {*self.axes, *self.settings, *self.options}
            tiny = {k: v for k, v in {**SMOKE, **self.smoke, "work": str(out.parent)}.items() if k in known}
            p.set_defaults(**{plural(k) if k in self.axes else k: v for k, v in tiny.items()}, out=out, threads=1)
        args = p.parse_args(arguments)
        if not args.table:
            self.run(Run(self, vars(args)))
        if not args.out.exists():
            raise SystemExit(f"there are no results in {args.out}")
        rows = self.rows(args.out)
        for name, table in self.show.items():
            print(f"{name}:\n\n{table(rows)}\n")

    def run(self, run: Run) -> cells.Cells:
        """Make all cells that are not there."""
        torch.set_num_threads(run.threads)
        found = cells.Cells(run.out, self.name, run.settings)
        environment = cells.environment(run.device, run.date)
        for key in self.all_keys(run):
            seed = key.get("draw", 0)

            def make(key: dict[str, Any] = key, seed: int = seed) -> dict[str, Any]:
                torch.manual_seed(seed)  # what is random and takes no generator
                return self.cell(run, key)

            try:
                found.fill(key, make, environment, seed)
            except cells.Paused as paused:
                print(paused, flush=True)
                break
        return found


def plural(axis: str) -> str:
    return axis if axis.endswith("s") else axis + ("es" if axis.endswith("ch") else "s")


def kind(*values: Any) -> Callable[[str], Any]:
    """How to read an argument that is like these values."""
    types = {type(v) for v in values}
    return float if float in types else int if types == {int} else str


def experiments() -> dict[str, str]:
    """The module of every experiment, by name, in the order of the list."""
    from benchmarks.experiments import MODULES

    return {name: module for module, names in MODULES.items() for name in names}


def find(name: str) -> Experiment:
    known = experiments()
    if name not in known:
        raise SystemExit(f"there is no experiment {name!r}; known: {', '.join(known)}")
    module = importlib.import_module(f"benchmarks.experiments.{known[name]}")
    return next(e for e in module.EXPERIMENTS if e.name == name)


def table(experiment: str, name: str) -> str:
    """One table from the results of the repository."""
    found = find(experiment)
    if name not in found.show:
        raise SystemExit(f"{experiment} has no table {name!r}; it has {', '.join(found.show)}")
    if not found.results.exists():
        raise SystemExit(f"{found.results} is missing, so the table {name!r} of {experiment} cannot be made")
    return found.show[name](found.rows())
