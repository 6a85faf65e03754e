"""All parts of one network, each under a clock; what does not end is killed, and the next part starts afresh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

from benchmarks.cells import ROOT
from benchmarks.zoo.parts import NEEDS_GROUPS


class Worker:
    """A process that works through parts, and the lines it gives."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.zoo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd=ROOT,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()  # left open: the process ends when it is closed, so when this one ends
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def values(self, limit: float) -> dict[str, Any]:
        """Values of the next part; ``timeout`` or ``died`` if there are none."""
        start = time.monotonic()
        try:
            line = self._lines.get(timeout=limit)
        except Empty:
            return {"timeout": round(time.monotonic() - start)}
        if line is not None:
            return json.loads(line)["values"]
        self._said.seek(0)
        last = self._said.read()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
        return {"died": f"exit status {self._process.wait()}: {' '.join(last)[:240]}"}

    def kill(self) -> None:
        """End the process and all that it has started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


def examine(network: str, parts: Sequence[str], *, limit: float, threads: int, repeats: int) -> dict[str, Any]:
    """Values by part.

    Args:
        network: name in the catalogue.
        parts: their names, in order.
        limit: seconds that every part may take; building the network is one of them.
        threads: of torch.
        repeats: of what is timed; the least time counts.

    Returns:
        Values of every part; ``{"timeout": seconds}``, ``{"died": how}``, ``{"error": what}`` or ``{"skipped": why}``
        instead.

    Raises:
        ImportError: if the library of the network is missing.
    """
    found: dict[str, Any] = {}
    left = list(parts)
    while left:
        order = {"network": network, "parts": left, "known": found, "threads": threads, "repeats": repeats}
        worker = Worker(order)
        try:
            ready = worker.values(limit)
            if "missing" in ready:
                raise ImportError(ready["missing"])
            if ready:  # it cannot even be built
                found.update({part: ready for part in left})
                return found
            while left:
                part = left.pop(0)
                found[part] = worker.values(limit)
                if "timeout" in found[part] or "died" in found[part]:
                    break
        finally:
            worker.kill()
        if not {"timeout", "died", "error"}.isdisjoint(found.get("discovery", {})):
            skipped = [part for part in left if part in NEEDS_GROUPS]
            found.update({part: {"skipped": "there are no groups"} for part in skipped})
            left = [part for part in left if part not in skipped]
    return found
