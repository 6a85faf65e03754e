"""What a whole one-shot pruning costs beside its passes over the data, where the time goes, and how it grows.

"speed": `prune(model, x, loader, budget=Budget(macs=0.5))` on random images of 224 px, with a few images and with four
times as many. The time is a + b · images; a is the fixed cost, as a ratio to a bare pass over 512 such images in the
same round, b the passes, as a ratio to a bare pass over as many images. "scaling": seconds and peak memory of networks
of growing width, depth, number of images or of classes, all else fixed, with the exponent of the upper half of each
curve. "large": peak memory of a whole pruning of large networks.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, listing, markdown
from benchmarks.timing import Images, bare, in_turns, network, peak_mb, seconds
from tp_importance import Budget, prune
from tp_importance.core.progress import LOGGER

SIZE, REFERENCE = 224, 512
PHASES = ("tracing", "verifying", "collecting", "ordering channels", "allocating", "refitting", "removing channels")
AXES: dict[str, list[int]] = {
    "width": [64, 128, 256, 512, 1024, 2048, 4096],
    "depth": [20, 50, 110, 200],
    "samples": [64, 256, 1024, 4096],
    "classes": [10, 100, 1000],
}
LINEAR = 1024
"""Width from which on layers are linear: 3 × 3 convolutions of it would have too many features."""
BASE = {"width": 64, "depth": 20, "samples": 64, "classes": 10}


class Phases(logging.Handler):
    """Seconds per phase, from what the package logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 4:
            name, spent, *_ = record.args
            self.seconds[str(name)] = self.seconds.get(str(name), 0.0) + float(spent)  # type: ignore[arg-type]

    def __enter__(self) -> Phases:
        self._level = LOGGER.level
        LOGGER.setLevel(logging.INFO)
        LOGGER.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        LOGGER.removeHandler(self)
        LOGGER.setLevel(self._level)


def with_random_norms(name: str) -> nn.Module:
    """A network of torchvision with random weights, and batch norms that are not all alike."""
    model, _ = network(name, None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def mlps_only(model: nn.Module) -> dict[str, Any]:
    """Options by which a vision transformer loses channels of its MLPs only."""
    mlp = {id(m) for name, m in model.named_modules() if ".mlp." in name}
    return {
        "attention": "none",
        "ignored_layers": [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and id(m) not in mlp],
    }


def pruned(name: str, images: int, batch: int, method: str, refit: str | None) -> dict[str, float]:
    """Seconds per phase of one pruning."""
    model = with_random_norms(name)
    loader, x = Images(images, SIZE, batch), torch.zeros(1, 3, SIZE, SIZE)
    options = mlps_only(model) if name.startswith("vit") else {}
    with Phases() as phases:
        prune(model, x, loader, budget=Budget(macs=0.5), method=method, refit=refit, **options)
    return phases.seconds


def speed(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Fixed cost and passes of one network, as ratios within a round."""
    name, few, many = key["network"], run.images, 4 * run.images
    model = with_random_norms(name)
    work: dict[str, Callable[[], Any]] = {"bare": partial(bare, model, Images(many, SIZE, run.batch_size))}
    for count in (few, many):
        work[str(count)] = partial(pruned, name, count, run.batch_size, key["method"], key["refit"])
    spent, found = in_turns(work, run.rounds, run.device, warmup=0 if run.smoke else 1)
    rounds = list(zip(spent["bare"], spent[str(few)], spent[str(many)], strict=True))
    passes = [(t_many - t_few) / (many - few) / (b / many) for b, t_few, t_many in rounds]
    fixed = [(t_few - (t_many - t_few) * few / (many - few)) / (b * REFERENCE / many) for b, t_few, t_many in rounds]
    middle = partial(statistics.median)
    return {
        "fixed": round(middle(fixed), 3),
        "fixed_range": [round(min(fixed), 3), round(max(fixed), 3)],
        "passes": round(middle(passes), 2),
        "bare_512_s": round(middle(spent["bare"]) * REFERENCE / many, 2),
        "seconds": {count: round(middle(spent[count]), 2) for count in work},
        "phases": {p: round(middle([f.get(p, 0.0) for f in found[str(few)]]), 2) for p in PHASES},
    }


class Blocks(nn.Module):
    """Residual blocks of two 3 × 3 convolutions, or of two linear layers from a width of :data:`LINEAR` on."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.linear = width >= LINEAR
        make: Any = (lambda i, o: nn.Linear(i, o)) if self.linear else (lambda i, o: nn.Conv2d(i, o, 3, padding=1))
        norm: Any = nn.BatchNorm1d if self.linear else nn.BatchNorm2d
        self.stem = make(3, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(make(64, width), norm(width), nn.ReLU(), make(width, 64), norm(64))
            for _ in range((depth - 2) // 2)
        )
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mean((2, 3)) if self.linear else x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x if self.linear else x.mean((2, 3)))


def scaling_keys(run: Run) -> Iterator[dict[str, Any]]:
    for axis in run.axis("axis"):
        yield from ({"axis": axis, "value": value} for value in AXES[axis] if value <= run.largest)


def scaling(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak memory of one pruning in a fresh process each."""
    return {"s": round(run.probe({**key, "what": "s"}), 2), "peak_mb": round(run.probe({**key, "what": "mb"}))}


def scaling_probe(run: Run, key: dict[str, Any]) -> float:
    torch.manual_seed(0)
    setting = {**BASE, **({"depth": 4} if run.smoke else {}), key["axis"]: key["value"]}
    model = Blocks(setting["width"], setting["depth"], setting["classes"]).eval()
    loader = Images(setting["samples"], 16, 64)
    x = torch.zeros(2, 3, 16, 16)
    work = partial(prune, model, x, loader, budget=Budget(macs=0.5), samples=None)
    if key["what"] == "mb":
        return peak_mb(work, model, 16)
    start = seconds("cpu")
    work()
    return seconds("cpu") - start


def large(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    return {"peak_gb": round(run.probe(key) / 1024, 2)}


def large_probe(run: Run, key: dict[str, Any]) -> float:
    work = partial(pruned, key["network"], run.images, run.batch_size, "obs", "sequential")
    return peak_mb(work, with_random_norms(key["network"]), SIZE)


def times(rows: Rows) -> str:
    lines = [
        [
            r["network"],
            r["method"],
            r["refit"] or "none",
            f"{r['fixed']:.2f}",
            "{:.2f} to {:.2f}".format(*r["fixed_range"]),
            f"{r['passes']:.1f}",
            f"{r['bare_512_s']:.1f}",
        ]
        for r in rows
    ]
    header = ["network", "method", "refit", "fixed / bare pass over 512", "range", "passes", "bare pass over 512, s"]
    return markdown(header, lines)


def phases(rows: Rows) -> str:
    lines = [[r["network"], r["refit"] or "none", *(f"{r['phases'][p]:.1f}" for p in PHASES)] for r in rows]
    return markdown(["network", "refit", *PHASES], lines)


def exponent(values: Sequence[float], spent: Sequence[float]) -> float:
    """Slope of the upper half of a curve in logarithms."""
    half = len(values) // 2
    return float(np.polyfit(np.log(values[half:]), np.log(spent[half:]), 1)[0]) if len(values) > 2 else float("nan")


def curves(rows: Rows) -> str:
    lines = []
    for axis in AXES:
        mine = [r for r in rows if r["axis"] == axis]
        parts = {axis: mine}
        if axis == "width":
            parts = {f"{axis}, linear": [r for r in mine if r["value"] >= LINEAR]}
            parts = {f"{axis}, 3 × 3": [r for r in mine if r["value"] < LINEAR], **parts}
        lines += [curve(name, part) for name, part in parts.items() if part]
    return markdown(["axis", "values", "seconds", "exponent", "peak MB", "exponent of memory"], lines)


def curve(name: str, rows: Rows) -> list[str]:
    """One axis."""
    values = [r["value"] for r in rows]
    return [
        name,
        ", ".join(str(v) for v in values),
        ", ".join(f"{r['s']:.1f}" for r in rows),
        f"{exponent(values, [r['s'] for r in rows]):.2f}",
        ", ".join(str(r["peak_mb"]) for r in rows),
        f"{exponent(values, [max(r['peak_mb'], 1) for r in rows]):.2f}",
    ]


EXPERIMENTS = (
    Experiment(
        "speed",
        "the fixed cost of one-shot pruning, and its passes over the data",
        {
            "network": ["resnet18", "resnet50", "efficientnet_b0", "vit_b_16"],
            "method": ["obs"],
            "refit": ["sequential"],
        },
        speed,
        settings={"images": 16, "batch_size": 16, "rounds": 2, "threads": 2, "device": "cpu"},
        show={"times": times, "phases": phases},
        dense=False,
        smoke={"network": ["resnet8"], "images": 1, "batch_size": 2, "rounds": 1},
        device="cpu",
        threads=2,
    ),
    Experiment(
        "scaling",
        "seconds and memory of one-shot pruning against width, depth, images and classes",
        {"axis": list(AXES)},
        scaling,
        settings={"largest": 4096, "threads": 2, "device": "cpu"},
        show={"curves": curves},
        keys=scaling_keys,
        smoke={"axis": ["width"], "largest": 64},
        device="cpu",
        threads=2,
        probe=scaling_probe,
    ),
    Experiment(
        "large",
        "peak memory of pruning large networks at 224 px",
        {"network": ["resnet152", "efficientnet_v2_s", "vit_b_16"]},
        large,
        settings={"images": 32, "batch_size": 16, "threads": 2, "device": "cpu"},
        show={"peaks": lambda rows: listing(rows, {"network": "{network}", "peak GiB": "{peak_gb}"})},
        dense=False,
        smoke={"network": ["resnet8"], "images": 1, "batch_size": 1},
        device="cpu",
        threads=2,
        probe=large_probe,
    ),
)
