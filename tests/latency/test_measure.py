import platform
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch import nn

from tp_importance.latency.measure import Latency, least_latency, measure_latency, steady_memory
from tp_importance.testing import Snapshot

X = torch.zeros(4, 10)


class FakeTimer:
    """Runs the statement once, and reports what the test says."""

    calls: list = []  # noqa: RUF012

    def __init__(self, stmt, *, globals, num_threads):
        self.stmt, self.globals, self.threads = stmt, globals, num_threads

    def blocked_autorange(self, min_run_time):
        exec(self.stmt, self.globals)
        FakeTimer.calls.append((self.threads, min_run_time, torch.is_inference_mode_enabled()))
        times = [0.001, 0.002, 0.004]
        return type("Found", (), {"times": times, "number_per_run": 10, "median": 0.002, "iqr": 0.0015})


@pytest.fixture
def fake(monkeypatch):
    FakeTimer.calls = []
    monkeypatch.setattr("torch.utils.benchmark.Timer", FakeTimer)


def test_numbers(fake):
    found = measure_latency(nn.Linear(10, 10), X, min_run_time=0.25)
    assert found == Latency(2.0, 1.5, 30, 4, "cpu", torch.get_num_threads())
    assert FakeTimer.calls == [(torch.get_num_threads(), 0.25, True)]
    assert str(found) == "2.000 ms (IQR 1.500, batch 4, cpu)"


class Two(nn.Module):
    seen: ClassVar[list[tuple[bool, bool]]] = []  # lists of the model itself are put back

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 10)

    def forward(self, a, b):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.linear(a) + b


@pytest.mark.parametrize("inputs", [(X, X), {"a": X, "b": X}], ids=["tuple", "dict"])
def test_inputs_and_modes(fake, inputs):
    model = Two().train()
    snapshot = Snapshot(model)
    Two.seen.clear()
    assert measure_latency(model, inputs).batch == 4
    assert measure_latency(model, [X, 1], forward_fn=lambda m, x: m(x[0], x[0])).batch == 4
    assert model.seen == [(False, False)] * 2
    snapshot.check()


def test_modes_come_back_when_it_fails(fake):
    model = Two().train()
    with pytest.raises(TypeError):
        measure_latency(model, X)
    assert model.training and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_bad_time(seconds):
    with pytest.raises(ValueError, match="min_run_time"):
        measure_latency(nn.Linear(10, 10), X, min_run_time=seconds)


def test_without_parameters(fake):
    assert measure_latency(nn.ReLU(), torch.zeros(())).batch == 1


def test_by_the_clock():
    """A thousand times the work takes longer."""
    small, large = (
        measure_latency(nn.Linear(n, n), torch.zeros(64, n), min_run_time=0.02).median_ms for n in (16, 512)
    )
    assert 0 < small < large


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_stays_while_the_clock_runs():
    """In a process of its own: what other tests left in the heap decides where memory comes from."""
    program = """
import resource, torch
from tp_importance.latency.measure import steady_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)  # 40 MB: by its defaults glibc maps it anew every time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with steady_memory():
    kept = min(faults() for _ in range(5))  # a system short of memory takes pages back on its own
print(kept, max(faults() for _ in range(5)))
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    kept, given_back = map(int, out.split()[-2:])
    assert kept < 50 and given_back > 15  # few if the system has large pages


def test_the_allocator_is_set_back_after_an_exception():
    with pytest.raises(RuntimeError), steady_memory():
        raise RuntimeError


def test_least_of_three():
    medians = iter([3.0, 1.0, 2.0])
    seconds = []

    def measure(model, x, *, forward_fn, min_run_time):
        seconds.append(min_run_time)
        return Latency(next(medians), 0.0, 1, 1, "fake", 1)

    assert least_latency(nn.Linear(10, 10), X, min_run_time=0.3, measure=measure).median_ms == 1.0
    assert seconds == pytest.approx([0.1] * 3)
