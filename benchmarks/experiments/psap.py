"""Pruning while training: what adaptive ratios and protection add, beside the hosts' own ways.

"psap": the small residual CNN of examples/quickstart.py on scikit-learn's digits, from pretrained weights (15 epochs,
then 10 of pruning at learning rate 0.02) and from scratch (25 epochs at 0.05). "psap-cifar": a pretrained ResNet down
to a fifth of its MACs within two epochs. All arms take the same number of optimizer steps with the same batches and
learning rates, prune the same channels, and at the same iterations. Top-1 on the test images after the last step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks import while_training
from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, chosen, distinct, markdown, pivot, spread
from benchmarks.tasks import Digits
from benchmarks.training import train
from benchmarks.while_training import ARMS, HOSTS, PSAP
from tp_importance import count_ops

STARTS = {"pretrained": (10, 0.02), "scratch": (25, 0.05)}
"""Epochs and learning rate on digits."""
PRETRAINING = 15


def keys(run: Run) -> Iterator[dict[str, Any]]:
    axes = map(run.axis, ("network", "draw", "start", "arm"))
    for network, draw, start, arm in product(*axes):
        for budget in [1.0] if arm == "dense" else run.axis("budget"):
            yield {"network": network, "draw": draw, "start": start, "arm": arm, "budget": budget}


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task, kept, draw = run.task(key["network"]).seeded(key["draw"]), key["budget"], key["draw"]
    if isinstance(task, Digits):
        (epochs, lr), images = run.starts[key["start"]], sum(len(y) for _, y in task.train)
        model, batch_size = task.trained(PRETRAINING if key["start"] == "pretrained" else 0), 64
        n_test, before = 899, {"before": round(task.top1(model, 899), 3)}
    else:
        epochs, lr, images, batch_size, n_test = run.epochs, run.lr, run.images, run.batch_size, run.n_test
        model, before = task.fresh(), {}
    dense = count_ops(model, task.inputs)[0]
    options = {"seed": draw, "batch_size": batch_size, "lr": lr, "nesterov": True}
    job = train(task, model, epochs * images, bfloat16=run.given.get("bfloat16", False), **options)
    torch.manual_seed(draw)
    began = time.perf_counter()
    found = while_training.prune(key["arm"], job, task, kept)
    spent = time.perf_counter() - began
    assert job.iteration == job.total
    macs = count_ops(job.model, task.inputs)[0]
    assert key["arm"] == "dense" or macs <= kept * dense, (key, macs / dense)
    top1 = round(task.top1(job.model, n_test), 3)
    return {"top1": top1, **before, "macs": macs / dense, "steps": job.total, "seconds": round(spent, 1), **found}


def by_start(rows: Rows) -> str:
    """Mean ± standard deviation over draws, and the mean number of restorations."""
    columns = sorted(distinct([r for r in rows if r["arm"] != "dense"], "start", "budget"), key=lambda k: (k[0], -k[1]))
    lines = []
    for arm in ARMS:
        line = [arm]
        for start, budget in columns:
            mine = chosen(rows, arm=arm, start=start, budget=[budget, 1.0])
            restored = [r["restored"] for r in mine if r.get("restored")]
            line.append(spread([r["top1"] for r in mine], 2) + (f" ({np.mean(restored):.0f})" if restored else ""))
        lines.append(line)
    return markdown(["arm", *(f"{start}, {budget:g} of the MACs" for start, budget in columns)], lines)


CONTRASTS = {
    "protection, adaptive ratios": ("PSAP", "PSAP, no protection"),
    "protection, uniform ratios": ("PSAP, uniform ratios", "PSAP, uniform ratios, no protection"),
    "adaptive ratios, protected": ("PSAP", "PSAP, uniform ratios"),
    "adaptive ratios, unprotected": ("PSAP, no protection", "PSAP, uniform ratios, no protection"),
    "PSAP over Torch-Pruning iterative L2": ("PSAP", "Torch-Pruning iterative L2"),
    "PSAP unprotected over Torch-Pruning iterative L2": ("PSAP, no protection", "Torch-Pruning iterative L2"),
}
"""What is added, and the two arms that differ by it."""


def contrasts(rows: Rows) -> str:
    """Differences within a start, a budget and a draw: mean ± standard error, and how many are above and below 0."""
    top1 = {(r["start"], r["budget"], r["draw"], r["arm"]): r["top1"] for r in rows}
    lines = []
    for what, (one, other) in CONTRASTS.items():
        found = [v - top1[*k[:3], other] for k, v in top1.items() if k[3] == one and (*k[:3], other) in top1]
        if len(found) > 1:
            error = np.std(found, ddof=1) / len(found) ** 0.5
            signs = f"{sum(d > 0 for d in found)} / {sum(d < 0 for d in found)} of {len(found)}"
            lines.append([what, f"{np.mean(found):+.2f} ± {error:.2f}", signs])
    return markdown(["what is added", "points", "better / worse"], lines)


def by_network(rows: Rows) -> str:
    budgets = distinct(rows, "network", "budget")
    mine = [{**r, "column": f"{r['network']}, {r['budget']:g} of the MACs"} for r in rows]
    columns = [f"{network}, {budget:g} of the MACs" for network, budget in sorted(budgets)]
    return pivot(mine, "arm", "column", digits=2, columns=columns, order=ARMS)


EXPERIMENTS = (
    Experiment(
        "psap",
        "prune while training, on digits",
        {"network": ["digits"], "draw": [0, 1, 2], "start": list(STARTS), "arm": ARMS, "budget": [0.5, 0.2]},
        cell,
        settings={"starts": {k: list(v) for k, v in STARTS.items()}, "pretraining": [PRETRAINING, 0.05]},
        show={"by-start": by_start, "contrasts": contrasts},
        keys=keys,
        smoke={"start": ["scratch"], "arm": ["PSAP", *list(HOSTS)[:2]], "starts": {"scratch": [2, 0.05]}},
        threads=1,
    ),
    Experiment(
        "psap-cifar",
        "prune while training, on CIFAR-10",
        {
            "network": ["resnet20"],
            "draw": [0, 1, 2],
            "start": ["pretrained"],
            "arm": [*PSAP, next(iter(HOSTS))],
            "budget": [0.2],
        },
        cell,
        settings={
            **{"epochs": 2, "images": 50_000, "n_test": 10_000, "batch_size": 128, "lr": 0.02, "bfloat16": True},
            "stream": "augmented",  # batches of results without it were drawn in another order
        },
        show={"by-arm": by_network},
        keys=keys,
        smoke={"network": ["resnet20"], "arm": ["PSAP"], "epochs": 1, "images": 1_280},
        threads=1,
    ),
)
