"""Times as ratios to a bare pass, and peak memory of a process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.networks import cifar_resnet, coupled_resnet

BATCH = {"resnet8": 8, "resnet56": 100, "resnet50": 16, "mobilenet_v2": 16}


def seconds(device: torch.device | str) -> float:
    """Clock: of the process with one CPU thread, which other load hardly touches; else the wall's."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def in_turns(
    work: Mapping[str, Callable[[], Any]], rounds: int, device: str, warmup: int = 1
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds that each took in each round, and what it returned; they take turns, after some rounds to warm up."""
    spent: dict[str, list[float]] = {name: [] for name in work}
    found: dict[str, list[Any]] = {name: [] for name in work}
    for round_ in range(rounds + warmup):
        for name, do in work.items():
            start = seconds(device)
            result = do()
            if round_ >= warmup:
                spent[name].append(seconds(device) - start)
                found[name].append(result)
    return spent, found


def ratios(spent: Mapping[str, Sequence[float]], to: str, digits: int = 3) -> dict[str, Any]:
    """Median and quartiles of the ratios within a round."""
    within = {k: [a / b for a, b in zip(v, spent[to], strict=True)] for k, v in spent.items() if k != to}
    quartiles = {k: statistics.quantiles(v, n=4)[::2] if len(v) > 1 else 2 * v for k, v in within.items()}
    return {
        "ratio": {k: round(statistics.median(v), digits) for k, v in within.items()},
        "quartiles": {k: [round(q, digits) for q in v] for k, v in quartiles.items()},
    }


class Images:
    """Re-iterable random batches, made when they are asked for: they take no memory of their own."""

    def __init__(self, n: int, size: int, batch_size: int) -> None:
        self.n, self.size, self.batch_size = n, size, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.n, self.batch_size):
            count = min(self.batch_size, self.n - start)
            x = torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(start))
            yield x, torch.arange(count) % 10


def subject(name: str, run: Any) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network, and images to time it on: of CIFAR if it is there, else random."""
    model, size = network(name, run)
    batches: Any = Images(500 if name == "resnet56" else run.images, size, BATCH[name])
    if name == "resnet56":
        try:
            batches = run.task(name).draw(0, 500)
        except SystemExit as missing:
            print(missing, "- random images instead")
    return model.to(run.device), [(x.to(run.device), y.to(run.device)) for x, y in batches]


def network(name: str, run: Any) -> tuple[nn.Module, int]:
    """A network in eval mode, and the size of its images."""
    torch.manual_seed(0)
    if name in ("resnet8", "resnet56"):
        return coupled_resnet(1).eval() if name == "resnet8" else cifar_resnet(run.data_root, name), 32
    return getattr(models, name)().eval(), 224


def bare(model: nn.Module, batches: Any) -> None:
    model.eval()
    with torch.inference_mode():
        for x, _ in batches:
            model(x)


def peak_mb(work: Callable[[], Any], model: nn.Module, size: int) -> float:
    """MB that some work adds at its peak to what the process holds before; meant for a fresh process (Linux)."""
    bare(model, Images(2, size, 2))  # whatever the first pass allocates for good
    Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks; getrusage would keep the parent's
    before = _status_mb("VmRSS")
    work()
    return _status_mb("VmHWM") - before


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
