"""Real NNI experiments that are interrupted, killed and resumed; each in a process and a home of its own."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import psutil
import pytest
import torch

from helpers.paths import ROOT
from tp_importance import Budget
from tp_importance.automl import BudgetProblem
from tp_importance.testing.networks import residual

DRIVER = ROOT / "tests" / "helpers" / "nni_driver.py"
LONGEST = 240  # seconds, for anything that is waited for; a quiet machine needs a tenth

pytestmark = pytest.mark.slow


class Driver:
    """A running tests/helpers/nni_driver.py and what it prints."""

    def __init__(self, folder, *args):
        self.folder, self.home = folder, str(folder / "home")
        env = {
            **os.environ,
            "HOME": self.home,
            "NNI_CONFIG_DIR": str(folder / "config"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", str(DRIVER), str(folder), *args]
        self.errors = folder / "stderr"
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        self._lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("{"):  # NNI prints there, too
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def wait(self, condition):
        """The first line for which the condition holds."""
        end = time.monotonic() + LONGEST
        while time.monotonic() < end:
            try:
                line = self._lines.get(timeout=1)
            except queue.Empty:
                continue
            assert line is not None, self.errors.read_text()
            if condition(line):
                return line
        raise AssertionError(f"nothing came in {LONGEST} s: {self.errors.read_text()}")

    def family(self):
        """All processes of the experiment, found by their home, the driver left out."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME") == self.home and process.pid != self.process.pid:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def server(self):
        return next((p for p in self.family() if "nni_node" in " ".join(p.cmdline())), None)

    def gone(self, seconds=0):
        """Whether nothing is left of the experiment, at the latest after some seconds."""
        end = time.monotonic() + seconds
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.2)
        return not left


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(seconds of a trial)``: a new experiment; ``start(seconds, old, id)``: an old driver's, resumed."""
    torch.manual_seed(0)
    x, methods = torch.randn(2, 3, 16, 16), ["magnitude", "fpgm"]
    problem = BudgetProblem.prepare(residual().eval(), x, budget=Budget(macs=0.5), methods=methods)
    drivers = []

    def begin(seconds, old=None, *resume):
        if old is None:
            folder = tmp_path_factory.mktemp("experiment")
            (folder / "home").mkdir()
            problem.save(folder / "problem.json")
        drivers.append(Driver(folder if old is None else old.folder, str(seconds), *resume))
        return drivers[-1]

    yield begin
    for driver in drivers:
        for process in [driver.process, *driver.family()]:
            process.kill()
        driver.process.wait()


@pytest.fixture(scope="module")
def running(start):
    """An experiment for every signal to come; they start together, as that is what takes time."""
    return {number: start(LONGEST) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}


def states(line):
    return Counter(row["status"] for row in line["rows"])


def free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.usefixtures("running")  # to start meanwhile
def test_killed_and_resumed_no_trial_is_lost(start):
    first = start(2)
    before = first.wait(lambda line: states(line)["SUCCEEDED"] >= 2 and states(line)["RUNNING"])
    assert states(before)["FAILED"] == 1
    for process in (first.server(), first.process):
        process.send_signal(signal.SIGKILL)  # trials and tuner may live on
    first.process.wait()
    second = start(2, first, before["id"])
    after = second.wait(lambda line: line["ended"])
    assert second.process.wait(LONGEST) == 0
    assert second.gone()
    rows = {row["id"]: row for row in after["rows"]}
    for row in before["rows"]:
        again = rows[row["id"]]
        if row["status"] in ("SUCCEEDED", "FAILED"):
            assert again == row
        else:
            assert again["status"] == "SUCCEEDED"
            assert not row["params"] or again["params"] == row["params"]
    assert states(after) == {"SUCCEEDED": 6, "FAILED": 1} and len(rows) == 7
    assert all(r["metrics"] == {"default": float(r["params"]["width:0.0"])} for r in rows.values() if r["metrics"])
    proposals = Counter(json.dumps(row["params"], sort_keys=True) for row in rows.values())
    # NNI tells nobody of a proposal it was handed but has not stored when it is killed: that one may be made again
    assert sum(proposals.values()) - len(proposals) <= 1, proposals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_trials_and_server(running, number):
    driver = running[number]
    line = driver.wait(lambda line: states(line)["RUNNING"])
    assert driver.server() is not None and not free(line["port"])
    driver.process.send_signal(number)
    assert driver.process.wait(LONGEST) in (-number, 128 + number)
    assert driver.gone() and free(line["port"])


def test_a_signal_while_the_server_starts(start):
    driver = start(2)
    end = time.monotonic() + LONGEST
    while driver.server() is None:
        assert time.monotonic() < end and driver.process.poll() is None, driver.errors.read_text()
        time.sleep(0.05)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.process.wait(LONGEST) == 128 + signal.SIGTERM
    assert driver.gone()


def test_the_server_ends_itself_when_python_is_killed(running):
    driver = running[signal.SIGKILL]
    line = driver.wait(lambda line: states(line)["RUNNING"])
    driver.process.kill()
    driver.process.wait()
    assert driver.gone(LONGEST) and free(line["port"])
