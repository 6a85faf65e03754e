"""NNI experiments that end: the trial's side, and a run that is always stopped."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ._compat import import_nni, patient_launcher

__all__ = ["experiment_running", "nni_trial", "run_experiment", "trial_table"]

PRELOAD = Path(__file__).with_name("preload.js")
"""Repairs of NNI's server: 127.0.0.1 only, and patience with the tuner."""


def nni_trial(run: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> dict[str, float]:
    """The whole trial of an NNI experiment: get the parameters, run, report.

    Args:
        run: ``run(params) → metrics``: :func:`~tp_importance.automl.prune_trial` with everything but ``params`` filled
            in. NNI optimises ``default``; its web page shows the others, too.

    Returns:
        The metrics.

    Raises:
        RuntimeError: outside an experiment, where NNI gives no parameters. Whatever ``run`` raises ends the trial as
            failed, with the parameters at the end of its log, and the experiment goes on.
    """
    nni = import_nni()
    params = nni.get_next_parameter()
    if params is None:
        raise RuntimeError("NNI gives no parameters: run this as the trial_command of an experiment")
    found = {name: float(value) for name, value in run(params).items()}
    nni.report_final_result(found)
    return found


@contextmanager
def experiment_running(
    experiment: Any, *, port: int | None = None, loopback: bool = True, resume: bool = False
) -> Iterator[Any]:
    """Start an experiment, and stop it whatever happens: at the end, on an exception, on Ctrl-C, on SIGTERM.

    NNI's own ``Experiment.run`` leaves its server running when Python is killed or an exception passes by.

    Args:
        experiment: an ``nni.experiment.Experiment``.
        port: of the web page; default: a free one.
        loopback: let the server listen on 127.0.0.1 only; NNI itself listens on all interfaces and knows no setting.
        resume: go on with a stopped experiment.

    Yields:
        The experiment; its web page is at ``http://127.0.0.1:{experiment.port}``.

    Raises:
        RuntimeError: if the server is still alive after it was stopped and killed.
    """
    process: Any = None
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _exit) if main else None
    try:
        with _preloaded(loopback), patient_launcher():
            chosen = _free_port() if port is None else port
            if resume:
                experiment.resume(chosen, wait_completion=False)
            else:
                experiment.start(chosen)
        process = experiment._proc
        yield experiment
    finally:
        process = process or experiment._proc
        try:
            experiment.stop()
        finally:
            _end(process)
            if main:
                signal.signal(signal.SIGTERM, before)


def run_experiment(
    experiment: Any,
    *,
    seconds: float,
    port: int | None = None,
    loopback: bool = True,
    resume: bool = False,
    poll: float = 1.0,
    until: Callable[[list[dict[str, Any]]], bool] | None = None,
) -> list[dict[str, Any]]:
    """Run an experiment to its end, stop it, and return its trials.

    Args:
        experiment: see :func:`experiment_running`.
        seconds: longest time; after it the experiment is stopped as it is.
        port: see :func:`experiment_running`.
        loopback: see :func:`experiment_running`.
        resume: see :func:`experiment_running`.
        poll: seconds between looks.
        until: ``until(rows) → bool``, to stop earlier.

    Returns:
        One row per trial, see :func:`trial_table`.

    Raises:
        RuntimeError: if the experiment itself ends in an error, of its tuner say; names the log folder.
        TimeoutError: if no trial ended in the time.
    """
    with experiment_running(experiment, port=port, loopback=loopback, resume=resume) as running:
        end = time.monotonic() + seconds
        while True:
            status, rows = running.get_status(), trial_table(running)
            if status == "ERROR":
                log = Path(running.config.canonical_copy().experiment_working_directory, running.id, "log")
                raise RuntimeError(f"the experiment ended in an error: see {log}/dispatcher.log and nnimanager.log")
            if status in ("DONE", "STOPPED") or (until is not None and until(rows)):
                return rows
            if time.monotonic() > end:
                if not any(row["status"] in ("SUCCEEDED", "FAILED") for row in rows):
                    raise TimeoutError(f"no trial ended in {seconds:g} s; the status is {status}")
                return rows
            time.sleep(poll)


def trial_table(experiment: Any) -> list[dict[str, Any]]:
    """The trials of a running experiment: ``sequence``, ``id``, ``status``, ``seconds``, ``params``, ``metrics``.

    NNI hands out parameters in the order in which trials ask for them: if one dies before that, the next gets its
    parameters, and NNI's web page shows others. Here they are those the result was reported for.
    """
    load, jobs, rows = import_nni().load, experiment.list_trial_jobs(), []
    known = {str(p.parameter_id): p.parameters for job in jobs for p in job.hyperParameters or ()}
    for job in jobs:
        given = job.hyperParameters[0].parameters if job.hyperParameters else {}
        if job.finalMetricData:
            given = known.get(str(job.finalMetricData[0].parameterId), given)
        final = job.finalMetricData[0].data if job.finalMetricData else {}
        while isinstance(final, str):  # JSON, wrapped once or twice
            final = load(final)
        taken = (job.endTime - job.startTime) / 1000 if job.endTime and job.startTime else None
        rows.append(
            {
                "sequence": job.sequenceId,
                "id": job.trialJobId,
                "status": job.status,
                "seconds": taken,
                "params": dict(given),
                "metrics": dict(final) if isinstance(final, dict) else {"default": float(final)},
            }
        )
    return sorted(rows, key=lambda row: (row["sequence"] is None, row["sequence"]))


@contextmanager
def _preloaded(loopback: bool) -> Iterator[None]:
    """Processes started inside, if they are node, load the script first."""
    ours = {"NODE_OPTIONS": f'{os.environ.get("NODE_OPTIONS", "")} --require "{PRELOAD}"'.strip()}
    ours["NNI_PLUGINS_LOOPBACK"] = "1" if loopback else ""
    before = {key: os.environ.get(key) for key in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def _exit(number: int, frame: Any) -> None:
    """SIGTERM as an exception, so that what is running is stopped on the way out."""
    raise SystemExit(128 + number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: Any) -> None:
    """Make sure that the server, and what it has started, is gone."""
    if process is None:
        return
    psutil = import_nni("psutil")
    with suppress(psutil.NoSuchProcess):
        server = psutil.Process(process.pid)
        family = [server, *server.children(recursive=True)]
        with suppress(Exception):
            process.wait(timeout=20)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        alive = [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]
        if alive:
            raise RuntimeError(f"processes {[member.pid for member in alive]} of the experiment cannot be ended")
