"""The processes of an NNI experiment: its server, its tuner and its trials, started with repairs and ended for sure."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._compat import import_nni

__all__ = ["PRELOAD", "end_orphans", "end_processes", "exit_on_signal", "free_port", "preloaded", "processes_of"]

PRELOAD = Path(__file__).parents[1] / "preload.js"
"""Repairs of NNI's server: 127.0.0.1 only, and patience with the tuner."""


@contextmanager
def preloaded(loopback: bool) -> Iterator[None]:
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


def exit_on_signal(number: int, frame: Any) -> None:
    """SIGTERM as an exception, so that what is running is stopped on the way out."""
    raise SystemExit(128 + number)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server(name: str) -> Any:
    """The server of an experiment, or None."""
    psutil = import_nni("psutil")
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--experiment-id" in words[:-1] and words[words.index("--experiment-id") + 1] == name:
            return process
    return None


def processes_of(name: str) -> list[Any]:
    """All processes of an experiment: its server, its tuner, its trials; also if their parents are gone."""
    psutil = import_nni("psutil")
    server = _server(name)
    found = set() if server is None else {server}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or not ours
            given = process.environ()
            if given.get("NNI_EXP_ID") == name or f"/{name}/log" in given.get("NNI_LOG_DIRECTORY", ""):
                found.add(process)
    for process in list(found):
        with suppress(psutil.Error):
            found |= set(process.children(recursive=True))
    return [process for process in found if process.pid != os.getpid()]


def end_processes(family: list[Any]) -> None:
    """Make sure that processes are gone."""
    psutil = import_nni("psutil")
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    alive = [member for member in alive if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    if alive:
        raise RuntimeError(f"processes {[member.pid for member in alive]} of the experiment cannot be ended")


def end_orphans(name: str, seconds: float = 60) -> None:
    """What a killed server has left behind; a server that lost its Python ends itself, which takes a moment."""
    end = time.monotonic() + seconds
    while (server := _server(name)) is not None:
        if time.monotonic() > end:
            raise RuntimeError(f"experiment {name} still runs (process {server.pid}): nnictl stop {name}")
        time.sleep(0.5)
    end_processes(processes_of(name))
