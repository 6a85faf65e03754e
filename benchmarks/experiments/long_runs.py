"""Long trainings of pruned networks, as resumable pieces: every call goes on for some minutes, its state on disk.

"long": the pretrained ResNet-20 at half of its MACs, 20 epochs of CIFAR-10, with and without distillation, accuracy of
the last epoch. "headline": what the paper of ResConv claims, ResNet-110 at 34.5 % of its FLOPs against the dense one,
both from scratch; for a machine with a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cells import ROOT, Paused
from benchmarks.experiment import Experiment, Run
from benchmarks.long_training import Shallower, Start, WhileTraining, trained
from benchmarks.networks import untrained_cifar_resnet
from benchmarks.tables import Rows, pivot
from tp_importance import count_ops

PSAP, LAYERS = "PSAP, while training", "layers, L1"
ARMS = ("L1", "Taylor", "CATRO", "OBS + sequential refit", "ITPruner", PSAP, LAYERS)
KINDS = {PSAP: WhileTraining, LAYERS: Shallower}


def keys(run: Run) -> Iterator[dict[str, Any]]:
    """The dense network is trained on as the others are."""
    for network, distil, draw in product(*map(run.axis, ("network", "distil", "draw"))):
        for budget, arm in product(run.axis("budget"), ("dense", *run.axis("arm"))):
            kept = 1.0 if arm == "dense" else budget
            yield {"network": network, "budget": kept, "arm": arm, "distil": distil, "draw": draw}


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task = run.task(key["network"])
    model = trained(
        started(run, key),
        round(run.epochs * 50_000 / run.piece),
        run.piece,
        seed=key["draw"],
        distil=bool(key["distil"]),
        going=clock(run),
        lr=run.lr,
        warmup=run.warmup,
        nesterov=True,
        bfloat16=run.bfloat16,
    )
    if model is None:
        raise Paused(f"{key}: time is up; the next call goes on")
    macs, params = count_ops(model, task.inputs)
    return {"top1": round(task.top1(model, run.n_test, last=True), 3), "macs": macs, "params": params}


def started(run: Run, key: dict[str, Any]) -> Start:
    """What is trained, as it was left."""
    task = run.task(key["network"])
    fresh = partial(untrained, run, key) if run.scratch else task.fresh
    name = "-".join(str(v) for v in key.values()).replace(", ", "-").replace(" ", "")
    kind = KINDS.get(key["arm"], Start)
    options = {k: getattr(run, k) for k in ("reg", "s", "a", "scalar_lr")} if kind is Shallower else {}
    return kind(task, ROOT / Path(run.work) / name, key["arm"], key["budget"], key["draw"], fresh, **options)


def untrained(run: Run, key: dict[str, Any]) -> nn.Module:
    torch.manual_seed(key["draw"])
    return untrained_cifar_resnet(run.data_root, key["network"]).to(run.device)


def clock(run: Run) -> Callable[[], bool]:
    """Whether a call has time for another piece; its time begins with its first cell."""
    began = run.given.setdefault("began", time.monotonic())
    return lambda: time.monotonic() - began < 60 * run.minutes


def by_arm(rows: Rows) -> str:
    """With and without distillation."""
    teacher = {0: "labels", 1: "labels and the dense network"}
    rows = [{**r, "by": teacher[r["distil"]]} for r in rows]
    return pivot(rows, ["network", "arm"], "by", order=("dense", *ARMS))


COMMON: dict[str, Any] = {
    "settings": {
        "epochs": 20.0,
        "lr": 0.05,
        "warmup": 0.05,
        "bfloat16": True,
        "n_test": 5_000,
        "scratch": False,
        "piece": 10_000,
    },
    "options": {"minutes": 5.0, "work": "outputs/long", "reg": 1e-3, "s": 1.0, "a": 0.0, "scalar_lr": 0.1},
    "show": {"by-arm": by_arm},
    "keys": keys,
    "smoke": {"epochs": 0.004, "piece": 64, "arm": [PSAP, LAYERS, "L1"], "distil": [0, 1], "bfloat16": False},
}
HEADLINE = {"epochs": 200.0, "lr": 0.1, "warmup": 0.02, "scratch": True}
EXPERIMENTS = (
    Experiment(
        "long",
        "pruned networks after 20 epochs of training, in pieces of a few minutes",
        {"network": ["resnet20"], "budget": [0.5], "arm": ARMS, "distil": [0, 1], "draw": [0, 1]},
        cell,
        **COMMON,
    ),
    Experiment(
        "headline",
        "ResConv's claim for ResNet-110, from scratch, in pieces of a few minutes; wants a GPU",
        {"network": ["resnet110"], "budget": [0.345], "arm": [LAYERS], "distil": [0], "draw": [0]},
        cell,
        **{
            **COMMON,
            "settings": {**COMMON["settings"], **HEADLINE},
            "options": {**COMMON["options"], "work": "outputs/headline", "s": 0.2, "a": 1.0},
        },
    ),
)
