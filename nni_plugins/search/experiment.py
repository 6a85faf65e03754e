"""NNI experiments that end: the trial's side, and a run that is always stopped."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tp_importance.automl.space import parameters_noted

from .._compat import import_nni
from .patches import patient_launcher
from .server import end_orphans, end_processes, exit_on_signal, free_port, preloaded, processes_of

__all__ = ["experiment_running", "nni_trial", "run_experiment", "trial_table"]


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
    with parameters_noted(params):
        found = {name: float(value) for name, value in run(params).items()}
    nni.report_final_result(found)
    return found


@contextmanager
def experiment_running(
    experiment: Any, *, port: int | None = None, loopback: bool = True, resume: bool = False
) -> Iterator[Any]:
    """Start an experiment, and stop it whatever happens: at the end, on an exception, on Ctrl-C, on SIGTERM.

    NNI's own ``Experiment.run`` leaves its server running when Python is killed or an exception passes by. Here the
    server watches Python and stops by itself, with its trials, if that is gone.

    Args:
        experiment: an ``nni.experiment.Experiment``.
        port: of the web page; default: a free one.
        loopback: let the server listen on 127.0.0.1 only; NNI itself listens on all interfaces and knows no setting.
        resume: go on with an experiment that was stopped or killed, ``Experiment(None, id)``. NNI takes the
            configuration from its database. Trials that were running are run again, no result is lost.

    Yields:
        The experiment; its web page is at ``http://127.0.0.1:{experiment.port}``.

    Raises:
        RuntimeError: if an experiment to be resumed still runs, or if a process of the experiment is still alive after
            it was stopped and killed.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, exit_on_signal) if main else None
    try:
        if resume:
            end_orphans(experiment.id)
        with preloaded(loopback), patient_launcher():
            chosen = free_port() if port is None else port
            if resume:
                experiment.resume(chosen, wait_completion=False)
            else:
                experiment.start(chosen)
        yield experiment
    finally:
        family = processes_of(experiment.id)  # the server may be there and NNI not know it yet
        try:
            experiment.stop()
        finally:
            end_processes([*family, *processes_of(experiment.id)])
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
        RuntimeError: if the experiment itself ends in an error, of its tuner say; gives the reason and the log folder.
        TimeoutError: if no trial ended in the time.
    """
    with experiment_running(experiment, port=port, loopback=loopback, resume=resume) as running:
        end = time.monotonic() + seconds
        while True:
            status, rows = running.get_status(), trial_table(running)
            if status == "ERROR":
                log = Path(running.config.canonical_copy().experiment_working_directory, running.id, "log")
                raise RuntimeError(f"the experiment ended in an error{_reason(log)}; see the logs in {log}")
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
    parameters, and NNI's web page shows others. Here they are those the result was reported for. In an experiment that
    was resumed two trials may have the same ``sequence``; ``id`` belongs to one only.
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
        ended = job.endTime and job.endTime > 0  # -1 while it runs
        taken = (job.endTime - job.startTime) / 1000 if ended and job.startTime else None
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
    return sorted(rows, key=lambda row: (row["sequence"] is None, row["sequence"], row["id"]))


def _reason(log: Path) -> str:
    """What the tuner said last, if it was the tuner."""
    text = (log / "nnimanager.log").read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"Dispatcher error: (.+)", text)
    return f": {found[-1]}" if found else ""
