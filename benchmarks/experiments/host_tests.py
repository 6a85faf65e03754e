"""The hosts' own test suites with our classes in place of theirs, on a copy outside the repository.

Every file runs up to three times: *as shipped*; if anything failed, *repaired*: random stand-ins for downloads
(weights, MNIST), and NNI's tracer made to run on a current torch; and *ours*, which is repaired with our importance or
pruner for theirs. The last two are compared. A file is killed after ``--timeout`` seconds of CPU time. A cell is one
file.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import re
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nni.compression.pruning
import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import tp_importance as ours
from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, chosen, distinct, markdown
from nni_plugins import CATROPruner
from nni_plugins.surgery.tracer import legacy_tracer_shim

SHIPPED, REPAIRED, OURS = MODES = ("as shipped", "repaired", "ours")
NNI_PRUNERS = ("L1NormPruner", "L2NormPruner", "FPGMPruner", "SlimPruner", "TaylorPruner")
TOUCHED = re.compile(r"tp\.importance|" + "|".join(NNI_PRUNERS))
NOTHING: dict[str, Any] = {"test": "(import)", "outcome": "not reached", "reason": "killed", "used": {}}
USED: Counter[str] = Counter()  # what our classes did in the current test


def labelled_batches(example: Any) -> list[Any]:
    """One random batch of eight samples and four classes, shaped like ``example``."""
    return [(tree_map(lambda x: torch.randn(8, *x.shape[1:]), example), torch.arange(8) % 4)]


class Substitute:
    """Mixed into every Torch-Pruning importance: CATRO, collected when first asked and when stale."""

    def __call__(self, group: Any) -> Tensor | None:
        graph = group._DG
        try:
            score = (getattr(graph, "catro", None) or collected(graph))(group)
        except ours.StaleStatisticsError:
            score = collected(graph)(group)
        USED["left alone" if score is None else "scored"] += 1
        return score


def collected(graph: Any) -> ours.CATROImportance:
    """CATRO on random data for the model of ``graph``, traced as the test had it traced."""
    USED["collected"] += 1
    example = graph.traced_with["example_inputs"]
    names = ("output_transform", "unwrapped_parameters", "customized_pruners")
    groups = ours.prunable_groups(graph.model, example, **{k: graph.traced_with.get(k) for k in names})
    graph.catro = ours.CATROImportance().collect(graph.model, example, labelled_batches(example), groups=groups)
    return graph.catro


class NNISubstitute(CATROPruner):
    """CATRO with the signatures of NNI's pruners; its data have the shape of the test's ``dummy_input``."""

    def __init__(self, model: nn.Module, config_list: Any, *_: Any, **given: Any) -> None:
        USED["pruner"] += 1
        scopes = [frame.frame.f_locals for frame in inspect.stack(0)]
        example = next(s[name] for s in scopes for name in ("dummy_input", "dummy_inputs") if name in s)
        options = {k: given.get(k) for k in ("evaluator", "existed_wrappers")}
        super().__init__(model, config_list, **options, loader=labelled_batches(example))


def substitute() -> None:
    build, base = tp.DependencyGraph.build_dependency, tp.importance.Importance

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.traced_with = inspect.signature(build).bind(self, *args, **kwargs).arguments
        return build(self, *args, **kwargs)

    tp.DependencyGraph.build_dependency = recording
    for name, cls in list(vars(tp.importance).items()):
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base:
            setattr(tp.importance, name, type(name, (Substitute, cls), {}))
    for name in NNI_PRUNERS:
        setattr(nni.compression.pruning, name, NNISubstitute)


def stand_in_for_downloads() -> None:
    """Random images for MNIST; instead of pretrained weights random ones, the same for the same network."""
    load, data = nn.Module.load_state_dict, torchvision.datasets

    def load_state_dict(self: nn.Module, state: Any, *args: Any, **kwargs: Any) -> Any:
        if len(state):
            return load(self, state, *args, **kwargs)
        torch.manual_seed(0)
        for module in self.modules():
            getattr(module, "reset_parameters", int)()

    data.MNIST = lambda *_, train=True, transform=None, **__: data.FakeData(
        60000 if train else 10000, (1, 28, 28), transform=transform
    )
    torchvision.models.WeightsEnum.get_state_dict = lambda *_, **__: {}
    nn.Module.load_state_dict = load_state_dict


class Recorder:
    """Pytest plugin: one JSON line per test and state, so that a killed file keeps what it finished."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path, self.mode = path, mode

    def write(self, nodeid: str, outcome: str, report: Any = None) -> None:
        text = str(getattr(report, "longrepr", None) or "").strip()
        errors = re.findall(r"^E  +(.*)", text, re.M) or text.split("\n")[-1:]
        line = {"test": nodeid.split("::", 1)[-1], "outcome": outcome, "reason": errors[0][:400], "used": dict(USED)}
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        if report.nodeid.endswith(".py") and (not report.passed or not report.result):
            self.write("(import)", report.outcome, report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        USED.clear()
        self.write(nodeid, "timed out")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.write(report.nodeid, report.outcome, report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        with contextlib.nullcontext() if self.mode == SHIPPED else legacy_tracer_shim():
            return (yield)


def child(file: Path, mode: str, results: Path, timeout: int) -> None:
    for stream in (1, 2):
        os.dup2(os.open(results.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout))
    torch.manual_seed(0)
    if mode != SHIPPED:
        stand_in_for_downloads()
    if mode == OURS:
        substitute()
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(file.parent)]
    pytest.main([str(file), *options], [Recorder(results, mode)])


def outcomes(file: Path, mode: str, work: Path, timeout: int) -> dict[str, dict[str, Any]]:
    """Outcome per test of one file, run in a process of its own."""
    results = work / f"{file.stem}.{mode.replace(' ', '-')}.jsonl"
    process = multiprocessing.get_context("fork").Process(target=child, args=(file, mode, results, timeout))
    process.start()
    process.join(10 * timeout)
    process.kill()
    process.join()
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else [NOTHING]
    return {line["test"]: line for line in lines}


HOSTS = {"Torch-Pruning": ("tp_src", "tests"), "NNI": ("nni_src", "test/algo/compression")}
"""Where the checkout of a host is given, and its folder of tests."""


@cache
def copied(run: Run, host: str) -> Path:
    """A copy of the host's tests."""
    given, folder = HOSTS[host]
    source = Path(run.given[given]).resolve()
    if not (source / folder).is_dir():
        raise SystemExit(f"{source / folder} does not exist: is {source} a checkout of {host}?")
    work = Path(tempfile.mkdtemp(prefix="host-tests-"))
    print(f"{host}: logs in {work}", flush=True)
    return Path(shutil.copytree(source / folder, work / host / Path(folder).name))


def keys(run: Run) -> Iterator[dict[str, Any]]:
    """The files of the hosts of which a checkout is given."""
    given = [host for host, (name, _) in HOSTS.items() if run.given[name]]
    if not given:
        raise SystemExit("nothing to run: give TP_SRC=<checkout> or NNI_SRC=<checkout>, as in docs/host-tests.md")
    for host in given:
        copy = copied(run, host)
        for file in sorted({*copy.rglob("test_*.py"), *copy.rglob("*_test.py")}):
            if run.only in file.name:
                yield {"host": host, "file": str(file.relative_to(copy))}


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Outcomes per test of one file: as shipped, repaired, ours, and what our classes did."""
    copy = copied(run, key["host"])
    file, before = copy / key["file"], Path.cwd()
    os.chdir(copy.parent)  # tests write logs and data where they run
    try:
        shipped = repaired = outcomes(file, SHIPPED, copy.parent, run.timeout)
        if any(t["outcome"] == "failed" for t in shipped.values()):
            repaired = outcomes(file, REPAIRED, copy.parent, run.timeout)
        touched = TOUCHED.search(file.read_text())
        replaced = outcomes(file, OURS, copy.parent, run.timeout) if touched else repaired
    finally:
        os.chdir(before)
    found, reasons = {}, {}
    for test in {**shipped, **repaired, **replaced}:
        rows = [tests.get(test, NOTHING) for tests in (shipped, repaired, replaced)]
        found[test] = [*(row["outcome"] for row in rows), dict(rows[2]["used"])]
        said = {mode: row["reason"] for mode, row in zip(MODES, rows, strict=True) if row["reason"]}
        reasons |= {test: said} if said else {}
        print(f"{file.stem}::{test}: {', '.join(found[test][:3])} {found[test][3] or ''}", flush=True)
    return {"tests": found, "reasons": reasons}


def by_host(rows: Rows) -> str:
    """How many tests ended how, and how many of those that use our classes end as without them."""
    lines = []
    for host in distinct(rows, "host"):
        tests = [t for r in chosen(rows, host=host) for t in r["tests"].values()]
        counts = [Counter(t[i] for t in tests) for i in range(len(MODES))]
        using = [t for t in tests if t[3]]
        same = f"{sum(t[1] == t[2] for t in using)} of {len(using)}"
        lines.append([host, len(tests), *(", ".join(f"{n} {o}" for o, n in c.items()) for c in counts), same])
    return markdown(["suite", "tests", *MODES, "the same with our classes"], lines)


EXPERIMENTS = (
    Experiment(
        "host-tests",
        "run the hosts' own tests with our classes in place of theirs",
        {},
        cell,
        options={"tp_src": "", "nni_src": "", "only": "", "timeout": 240},
        show={"by-host": by_host},
        keys=keys,
        threads=1,
    ),
)
