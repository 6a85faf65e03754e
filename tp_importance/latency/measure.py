"""Measured latency: of a network, and of single layers on the inputs they get."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.arguments import unwrapped_model
from ..core.batches import tensors_in
from ..core.devices import reference_tensor
from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched

__all__ = ["Latency", "device_name", "least_latency", "measure_latency", "steady_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@dataclass(frozen=True)
class Latency:
    """Latency of one forward pass.

    Attributes:
        median_ms: median over blocks of runs, in milliseconds.
        iqr_ms: their interquartile range.
        runs: forward passes that were timed.
        batch: first dimension of the inputs.
        device: name of the device.
        threads: CPU threads.
    """

    median_ms: float
    iqr_ms: float
    runs: int
    batch: int
    device: str
    threads: int

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} ms (IQR {self.iqr_ms:.3f}, batch {self.batch}, {self.device})"


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    min_run_time: float = 0.5,
) -> Latency:
    """Time ``model`` in eval mode without gradients, with ``torch.utils.benchmark`` (warm-up, device synchronisation).

    On Linux freed memory stays in the process meanwhile (:func:`steady_memory`), as with any caching allocator: by its
    defaults glibc gives large activations back to the system after some passes and not after others, and page faults
    make the same network take 16 or 27 ms. Run the network that way too (jemalloc, or MALLOC_TRIM_THRESHOLD_ and
    MALLOC_MMAP_MAX_=0 in the environment).

    Args:
        model: the network.
        example_inputs: tensor, tuple or dict; the latency is that of all of it, not per sample.
        forward_fn: ``forward_fn(model, example_inputs)``.
        min_run_time: seconds to spend at least.

    Returns:
        The :class:`Latency`, with the CPU threads torch uses now.

    Raises:
        TypeError: if the model is none, or wrapped (``DistributedDataParallel``, ...).
        ValueError: if ``min_run_time`` is not positive.

    Example:
        >>> measure_latency(nn.Linear(10, 10), torch.zeros(4, 10), min_run_time=0.01).batch
        4
    """
    from torch.utils.benchmark import Timer  # prints "No CUDA runtime is found" on machines without one

    if not min_run_time > 0:
        raise ValueError(f"min_run_time={min_run_time} must be positive seconds, e.g. 0.5")
    run, like = forward_fn or call_model, reference_tensor(unwrapped_model(model))
    device = torch.device("cpu") if like is None else like.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads()
    with untouched(model), steady_memory(), torch.inference_mode():
        model.eval()
        timer = Timer(
            "run(model, inputs)",
            globals={"run": run, "model": model, "inputs": fresh_inputs(example_inputs)},
            num_threads=threads,
        )
        found = timer.blocked_autorange(min_run_time=min_run_time)
    runs = len(found.times) * found.number_per_run
    sizes = [len(t) for t in tensors_in(example_inputs) if t.dim()]
    return Latency(found.median * 1e3, found.iqr * 1e3, runs, sizes[0] if sizes else 1, name, threads)


def least_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    min_run_time: float = 0.5,
    measure: Callable[..., Latency] = measure_latency,
) -> Latency:
    """The :class:`Latency` with the least of three medians: other work on the machine only makes a network slower.

    Args:
        model: the network.
        example_inputs: as for :func:`measure_latency`.
        forward_fn: as for :func:`measure_latency`.
        min_run_time: seconds to spend at least, in all.
        measure: the clock.
    """
    found = [measure(model, example_inputs, forward_fn=forward_fn, min_run_time=min_run_time / 3) for _ in range(3)]
    return min(found, key=lambda latency: latency.median_ms)


def device_name(device: torch.device) -> str:
    """Name of a device that tells two machines apart.

    Args:
        device: where the network is.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@contextmanager
def steady_memory() -> Iterator[None]:
    """Keep freed memory in the process meanwhile, where the C library is glibc; elsewhere nothing happens.

    Afterwards memory is given back as glibc does once it has freed a large block. On GPUs torch caches memory itself.
    """
    library = ctypes.CDLL(None) if platform.system() == "Linux" else None
    mallopt, trim = (getattr(library, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, 65536)
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
        trim(0)
