"""Pruning while training: what adaptive ratios and protection add, beside the hosts' own ways.

"psap": the small residual CNN of examples/quickstart.py on scikit-learn's digits, from pretrained weights (15 epochs,
then 10 of pruning at learning rate 0.02) and from scratch (25 epochs at 0.05). "psap-cifar": a pretrained ResNet down
to a fifth of its MACs within two epochs. All arms take the same number of optimizer steps with the same batches and
learning rates, prune the same channels, and at the same iterations. Top-1 on the test images after the last step.

"psap-overhead": what PSAP costs per training step on random images: masked, and with the pulse on, as ratios to a bare
step of the same network. Rounds take one step of each in turn; ratios are taken within a round, then the median. With
one CPU thread the time is that of the process, so that other load on the machine hardly touches it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import while_training
from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, chosen, distinct, listing, markdown, pivot, spread
from benchmarks.tasks import Digits
from benchmarks.timing import in_turns, ratios
from benchmarks.training import train
from benchmarks.while_training import ARMS, HOSTS, PSAP
from tp_importance import Budget, PSAPPruner, PSAPSchedule, count_ops

STARTS = {"pretrained": (10, 0.02), "scratch": (25, 0.05)}
"""Epochs and learning rate on digits."""
PRETRAINING = 15


def keys(run: Run) -> Iterator[dict[str, Any]]:
    axes = map(run.axis, ("network", "draw", "weights", "arm"))
    for network, draw, weights, arm in product(*axes):
        for budget in [1.0] if arm == "dense" else run.axis("budget"):
            yield {"network": network, "draw": draw, "weights": weights, "arm": arm, "budget": budget}


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task, kept, draw = run.task(key["network"]).seeded(key["draw"]), key["budget"], key["draw"]
    if isinstance(task, Digits):
        (epochs, lr), images = run.starts[key["weights"]], sum(len(y) for _, y in task.train)
        model, batch_size = task.trained(PRETRAINING if key["weights"] == "pretrained" else 0), 64
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
    columns = sorted(
        distinct([r for r in rows if r["arm"] != "dense"], "weights", "budget"), key=lambda k: (k[0], -k[1])
    )
    lines = []
    for arm in ARMS:
        line = [arm]
        for start, budget in columns:
            mine = chosen(rows, arm=arm, weights=start, budget=[budget, 1.0])
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
    top1 = {(r["weights"], r["budget"], r["draw"], r["arm"]): r["top1"] for r in rows}
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


def stepper(kind: str, run: Run, name: str, batch: int) -> Callable[[], None]:
    """One training step, bare or under PSAP; set up so that nothing is pruned any more while it is timed."""
    torch.manual_seed(0)
    task = run.task(name)
    model = task.fresh().to(memory_format=torch.channels_last)
    x = torch.randn(batch, *task.inputs.shape[1:]).to(run.device, memory_format=torch.channels_last)
    y = (torch.arange(batch) % 10).to(run.device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)
    after: Callable[[], None] = lambda: None  # noqa: E731
    if kind != "bare":
        long = 10_000
        # one prune step at once; then the pulse goes on for ever, or there is none
        schedule = PSAPSchedule(prune_steps=1, begin=1 / long, end=1 / long, pulse=long // 2 if kind == "pulse" else 0)
        pruner = PSAPPruner(model, x[:2], budget=Budget(macs=0.5), schedule=schedule)
        pruner.start(optimizer, total_steps=long)
        after = pruner.step
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()

    step()  # the prune step
    if kind != "bare":
        assert any(pruner.masked.values()) and pruner.frozen == (kind == "masked")
    return step


def overhead(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Ratios of all kinds of step."""
    steps = {kind: stepper(kind, run, key["network"], key["batch"]) for kind in ("bare", "masked", "pulse")}
    spent, _ = in_turns(steps, run.rounds, run.device, warmup=2)
    bare_s = round(statistics.median(spent["bare"]), 4)
    return {"bare_s": bare_s, **ratios(spent, "bare"), "prune_step_s": round(prune_step(run, key["network"]), 4)}


def prune_step(run: Run, name: str) -> float:
    """Time of one prune step: sparsities, widths, masks."""
    task = run.task(name)
    model = task.fresh()
    schedule = PSAPSchedule(prune_steps=5, begin=0, end=1, pulse=0)
    kept = task.kept_in(model)
    pruner = PSAPPruner(model, task.inputs, budget=Budget(macs=0.5), schedule=schedule, ignored_layers=kept)
    pruner.start(torch.optim.SGD(model.parameters(), 0.1), total_steps=5)
    spent, _ = in_turns({"step": pruner.step}, 5, run.device, warmup=0)
    return statistics.median(spent["step"])


def by_step(rows: Rows) -> str:
    columns = {
        "network": "{network}",
        "batch": "{batch}",
        "device": "{device}",
        "bare step, s": "{bare_s}",
        "step": "{step}",
        "time / bare step": "{time:.3f}",
        "quartiles": "{within[0]:.3f} to {within[1]:.3f}",
        "prune step, s": "{prune_step_s}",
    }
    kinds = [
        {**r, "step": kind, "time": time, "within": r["quartiles"][kind]}
        for r in rows
        for kind, time in r["ratio"].items()
    ]
    return listing(kinds, columns)


EXPERIMENTS = (
    Experiment(
        "psap",
        "prune while training, on digits",
        {"network": ["digits"], "draw": [0, 1, 2], "weights": list(STARTS), "arm": ARMS, "budget": [0.5, 0.2]},
        cell,
        settings={"starts": {k: list(v) for k, v in STARTS.items()}, "pretraining": [PRETRAINING, 0.05]},
        show={"by-start": by_start, "contrasts": contrasts},
        keys=keys,
        smoke={"weights": ["scratch"], "arm": ["PSAP", "Torch-Pruning iterative L2"], "starts": {"scratch": [2, 0.05]}},
        threads=1,
    ),
    Experiment(
        "psap-cifar",
        "prune while training, on CIFAR-10",
        {
            "network": ["resnet20"],
            "draw": [0, 1, 2],
            "weights": ["pretrained"],
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
    Experiment(
        "psap-overhead",
        "what a training step costs under PSAP",
        {"network": ["resnet20"], "batch": [128]},
        overhead,
        settings={"rounds": 30},
        show={"by-step": by_step},
        keys=lambda run: (
            {"network": n, "batch": b, "device": run.device, "threads": run.threads}
            for n in run.axis("network")
            for b in run.axis("batch")
        ),
        smoke={"batch": [8], "rounds": 2},
        threads=1,
        device="cpu",
    ),
)
