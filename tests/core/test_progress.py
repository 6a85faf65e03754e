"""Phases: named on stderr where asked for, logged everywhere, closed on any exit; and an import that says nothing."""

import io
import logging
import re
import subprocess
import sys
import tomllib

import pytest
import torch
import torch_pruning as tp
from torch import nn
from tqdm.auto import tqdm

import tp_importance
from helpers.logs import fresh_logging  # noqa: F401 - a fixture
from helpers.paths import ROOT
from helpers.resconv_cases import X32, Basic
from tp_importance import (
    Budget,
    CATROPruner,
    ITPruner,
    LatencyTable,
    OBSPruner,
    PSAPPruner,
    PSAPSchedule,
    Refit,
    ResConvPruner,
    prune,
    recalibrate_batchnorm,
    refitted_step,
)
from tp_importance.automl import prune_trial
from tp_importance.core.progress import LOGGER, phase, shown, track
from tp_importance.latency.measure import Latency
from tp_importance.testing import class_loader, make_network

LOADER = class_loader()
HALF = Budget(macs=0.5)
FIRST = ["tracing", "verifying"]
REST = ["ordering channels", "allocating", "removing channels"]


pytestmark = pytest.mark.usefixtures("fresh_logging")


def residual():
    return make_network("residual")


def resconv():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Basic(), Basic(), nn.Conv2d(8, 2, 1))
    return net.eval(), X32


def by_prune(progress, **options):
    model, x = residual()
    prune(model, x, LOADER, budget=HALF, progress=progress, **options)


def by_pruner(cls, progress, **options):
    model, x = residual()
    cls(model, x, LOADER, budget=HALF, progress=progress, **options).step(refit="parallel")


def by_latency(progress):
    model, x = residual()
    table = LatencyTable(min_run_time=1e-4, measure=Clock())
    budget = Budget(latency=0.8)
    OBSPruner(model, x, LOADER, budget=budget, latency_table=table, progress=progress).step()


class Clock:
    """Latency that grows with the parameters."""

    def __call__(self, model, inputs, *, forward_fn=None, min_run_time=0.1):
        ms = 1.0 + sum(p.numel() for p in model.parameters())
        return Latency(ms, 0.0, 1, 1, "cpu", 1)


def by_psap(progress):
    model, x = residual()
    optimizer = torch.optim.SGD(model.train().parameters(), 0.01)
    pruner = PSAPPruner(model, x, budget=HALF, schedule=PSAPSchedule(prune_steps=2, pulse=2), progress=progress)
    pruner.start(optimizer, total_steps=12)
    for i in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(LOADER[i % 4][0]), LOADER[i % 4][1]).backward()
        optimizer.step()
        pruner.step()
    pruner.finish()


def by_resconv(progress):
    model, x = resconv()
    loader = [torch.randn(8, *x.shape[1:])]
    ResConvPruner(model, x, loader, budget=Budget(macs=0.7), importance="output", progress=progress).step()


def by_resconv_latency(progress):
    model, x = resconv()
    budget = Budget(latency=1.0)
    ResConvPruner(model, x, budget=budget, a=0.5, min_run_time=1e-3, progress=progress).plan(Budget(latency_ms=1e4))


def by_host(progress):
    model, x = residual()
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    importance = tp.importance.MagnitudeImportance()
    host = tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=heads)
    refitted_step(host, x, LOADER, refit="parallel", progress=progress)


def by_trial(progress):
    model, x = residual()
    options = {"example_inputs": x, "loader": LOADER, "evaluate": lambda net: 0.5, "budget": HALF}
    prune_trial(model, {"method": "taylor"}, latency_seconds=0.001, progress=progress, **options)


RUNS = {
    "prune": (by_prune, [*FIRST, "collecting", *REST, "refitting"]),
    "prune, no refit": (
        lambda progress: by_prune(progress, refit="batchnorm"),
        [*FIRST, "collecting", *REST, "recalibrating batch norms"],
    ),
    "prune, layer by layer": (
        lambda progress: by_prune(progress, refit=Refit("sequential", memory_limit=1, recalibrate=False)),
        [*FIRST, "collecting", *REST, "refitting"],
    ),
    "prune by gradients": (
        lambda progress: by_prune(progress, method="taylor"),
        [*FIRST, "computing gradients", *REST, "refitting"],
    ),
    "CATRO": (
        lambda progress: by_pruner(CATROPruner, progress),
        [*FIRST, "collecting", *REST, "refitting", "recalibrating batch norms"],
    ),
    "OBS": (lambda progress: by_pruner(OBSPruner, progress), [*FIRST, "collecting", *REST, "refitting"]),
    "ITPruner": (
        lambda progress: by_pruner(ITPruner, progress),
        [*FIRST, "collecting", "comparing layers", "allocating", "removing channels", "refitting"],
    ),
    "latency": (by_latency, [*FIRST, "measuring latency", "timing layers", "timing narrowed copies", *REST]),
    "PSAP": (by_psap, [*FIRST, "prune step 1 of 2", "prune step 2 of 2", "removing channels"]),
    "ResConv": (
        by_resconv,
        [
            "converting",
            "leaving out single layers",
            "ordering layers",
            "choosing layers",
            "collecting",
            "removing layers",
        ],
    ),
    "ResConv, latency": (by_resconv_latency, ["measuring latency", "timing layers", "collecting"]),
    "host": (by_host, ["removing channels", *FIRST, "collecting", "refitting", "recalibrating batch norms"]),
    "trial": (
        by_trial,
        [*FIRST, "computing gradients", *REST, "recalibrating batch norms", "evaluating", "measuring latency"],
    ),
}


def ours(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "tp_importance"]


@pytest.mark.parametrize("name", RUNS)
def test_every_phase_is_named_on_stderr_if_asked_for_and_logged_anyway(name, capsys, caplog):
    run, phases = RUNS[name]
    caplog.set_level(logging.DEBUG, "tp_importance")
    run(progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert [p for p in phases if p not in err] == []
    assert not tqdm._instances  # all closed
    logged = ours(caplog)
    assert [p for p in phases if not any(m.startswith(f"{p}: ") for m in logged)] == []

    caplog.clear()
    run(progress=False)
    assert capsys.readouterr() == ("", "")
    again = ours(caplog)
    assert [m.partition(":")[0] for m in again] == [m.partition(":")[0] for m in logged]


def test_the_log_at_info_has_durations_and_key_numbers(caplog):
    caplog.set_level(logging.INFO, "tp_importance")
    by_prune(False)
    found = {r.getMessage().partition(":")[0]: r.getMessage() for r in caplog.records if r.name == "tp_importance"}
    assert all(r.levelno == logging.INFO for r in caplog.records)
    seconds = r"\d+\.\d\d s"
    for name, rest in {
        "verifying": "groups 4, tests 1, unsafe 0",
        "collecting": "batches 4, samples 64",
        "ordering channels": "groups 4",
        "allocating": r"cost .* MACs, .* params",
        "refitting": "layers 5",
        "removing channels": r"before .* MACs, .* params, after .* MACs, .* params",
    }.items():
        assert re.fullmatch(f"{name}: {seconds}, {rest}", found[name]), found[name]


def test_what_is_part_of_a_phase_is_logged_at_debug(caplog):
    caplog.set_level(logging.DEBUG, "tp_importance")
    with phase("outer"), phase("inner"):
        pass
    ends = {r.getMessage().partition(":")[0]: r.levelno for r in caplog.records if r.getMessage().endswith(" s")}
    assert ends == {"inner": logging.DEBUG, "outer": logging.INFO}


def test_an_import_says_nothing_and_the_logger_leaves_the_root_alone():
    code = (
        "import logging, sys, torch, tp_importance as t, tp_importance.automl; from torch import nn\n"
        "assert 'pytest' not in sys.modules\n"
        "net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))\n"
        "x = torch.randn(2, 3, 8, 8)\n"
        "t.prune(net, x, [x], budget=t.Budget(macs=0.5))\n"
        "assert not logging.root.handlers and logging.root.level == logging.WARNING\n"
        "log = logging.getLogger('tp_importance')\n"
        "assert [type(h).__name__ for h in log.handlers] == ['NullHandler'] and log.level == 0\n"
    )
    assert run_python(code) == ("", "")


def test_an_import_of_the_plugins_says_nothing_and_needs_no_pytest():
    pytest.importorskip("nni")
    assert run_python("import sys, nni_plugins; assert 'pytest' not in sys.modules") == ("", "")


def run_python(code):
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout, found.stderr


def test_the_version_is_that_of_the_project_file():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert tp_importance.__version__ == wanted


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_bars_are_closed_on_exceptions_and_the_state_is_as_before(error, capsys, caplog):
    caplog.set_level(logging.INFO, "tp_importance")

    def batches():
        yield from LOADER[:2]
        raise error

    class Broken:
        __iter__ = staticmethod(batches)

    model, _ = residual()
    with pytest.raises(error):
        recalibrate_batchnorm(model, Broken(), progress=True)
    assert not tqdm._instances
    told = rf"recalibrating batch norms: \d+\.\d\d s, ended by {error.__name__}, batches 1"  # one is held back
    assert any(re.fullmatch(told, r.getMessage()) for r in caplog.records)
    capsys.readouterr()
    recalibrate_batchnorm(model, LOADER)  # bars are off again
    assert capsys.readouterr().err == ""


def test_a_loop_that_is_left_early_closes_its_bar(capsys, caplog):
    caplog.set_level(logging.INFO, "tp_importance")

    def leave():
        for number in track(range(5), "counting", progress=True):
            if number == 2:
                raise ValueError(number)

    with pytest.raises(ValueError, match="2") as caught:
        leave()
    assert not tqdm._instances and caught.traceback  # though the traceback is alive
    with shown():
        pass
    assert "ended early, its 2" in caplog.records[-1].getMessage()
    assert LOGGER.name == "tp_importance"


def test_inner_bars_are_wiped_and_outer_ones_stay(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with phase("outer", progress=True):
        for _ in track(range(3), "inner", unit="item"):
            pass
    assert not tqdm._instances
    last = err.getvalue().replace("\n", "\r").replace("\x1b[A", "\r").split("\r")
    visible = [text for text in last if text.strip()]
    assert visible[-1].startswith("outer") and "inner" in err.getvalue()


def test_bars_follow_the_block_not_the_process(capsys):
    with shown(), shown(None), phase("on"):
        pass
    assert "on" in capsys.readouterr().err
    with shown(), shown(False), phase("off"):
        pass
    with phase("off"):
        pass
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stderr", "progress", "seen"),
    [
        (Terminal, None, True),
        (Terminal, True, True),
        (Terminal, False, False),
        (io.StringIO, None, False),
        (io.StringIO, True, True),
    ],
)
def test_a_terminal_shows_bars_unless_told_otherwise(stderr, progress, seen, monkeypatch):
    monkeypatch.setattr("tp_importance.core.progress._DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", stderr())
    model, x = residual()
    prune(model, x, LOADER, budget=HALF, progress=progress)
    text = sys.stderr.getvalue()
    assert [name for name in (*FIRST, *REST) if name in text] == ([*FIRST, *REST] if seen else [])


def test_short_phases_do_not_flicker_in_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in track(range(3), "short"):
        pass
    assert sys.stderr.getvalue() == ""
