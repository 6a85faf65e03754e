"""A small vision transformer on digits: one-shot pruning of stream, heads and MLPs, and pruning while fine-tuning.

The network is that of examples/vit.py. A third of the images is only reported on. Every draw splits the others into
training images, from which the network is trained and pruned, and 300 to choose settings on (`--parts validation`).
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, chosen, markdown, pivot, spread
from tp_importance import Budget, PSAPPruner, count_ops, prune
from tp_importance.errors import BudgetError

METHODS = ("obs", "catro", "itpruner", "psap", "l1", "l2", "fpgm", "taylor", "random")
ATTENTION, REFITS = ("heads", "dims", "none"), ("none", "sequential")
TRAINED_BY = ("PSAP", "obs, then training", "l2, then training")
Part = tuple[Tensor, Tensor]


def example() -> Any:
    return importlib.import_module("examples.vit")


@cache
def data(draw: int) -> dict[str, Part]:
    """Training images, those to choose on, those to report."""
    x, y = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(x).float().div(8).sub(1).view(-1, 1, 8, 8), torch.from_numpy(y)
    rest, test = train_test_split(range(len(y)), test_size=599, random_state=0, stratify=y)
    training, validation = train_test_split(rest, test_size=300, random_state=draw, stratify=y[rest])
    return {
        name: (images[part], labels[part])
        for name, part in (("training", training), ("validation", validation), ("test", test))
    }


def batches(draw: int, size: int) -> list[Part]:
    x, y = data(draw)["training"]
    return list(zip(x.split(size), y.split(size), strict=True))


@cache
def dense(draw: int, epochs: int, lr: float) -> nn.Module:
    torch.manual_seed(draw)
    model = example().VisionTransformer()
    example().train(model, batches(draw, 32), epochs, draw, lr)
    return model


def top1(model: nn.Module, key: dict[str, Any]) -> float:
    part = data(key["draw"])[key["part"]]
    return round(example().accuracy(model, [part]), 3)


def setting(run: Run, key: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """A copy of the trained network, and two images."""
    return copy.deepcopy(dense(key["draw"], run.epochs, run.lr)), data(key["draw"])["training"][0][:2]


def one_shot(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    model, x = setting(run, key)
    if key["arm"] == "dense":
        macs, params = count_ops(model, x)
        return {"top1": top1(model, key), "macs": macs, "params": params}
    start, refit = time.perf_counter(), None if key["refit"] == "none" else key["refit"]
    loader = batches(key["draw"], 64)
    options = {"budget": Budget(macs=key["budget"]), "attention": key["attention"], "samples": run.images}
    try:
        report = prune(model, x, loader, method=key["arm"], refit=refit, **options).report
    except BudgetError as error:
        return {"error": str(error).splitlines()[0]}
    seconds = time.perf_counter() - start
    return {
        "top1": top1(model, key),
        "macs": report.cost.macs,
        "params": report.cost.params,
        "seconds": round(seconds, 2),
        "widths": {row.name: row.after for row in report.rows},
    }


def while_training(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Every arm takes as many optimizer steps on the same images; the dense network also trains on."""
    model, x = setting(run, key)
    loader, budget, arm = batches(key["draw"], 32), Budget(macs=key["budget"]), key["arm"]
    before, start = count_ops(model, x)[0], time.perf_counter()
    pruner = None
    if arm == "PSAP":
        pruner = PSAPPruner(model, x, budget=budget, attention=key["attention"])
    elif arm != "dense":
        prune(model, x, loader, method=arm.split(",")[0], budget=budget, attention=key["attention"])
    example().train(model, loader, run.more_epochs, key["draw"], run.more_lr, pruner)
    seconds, (macs, params) = time.perf_counter() - start, count_ops(model, x)
    assert arm == "dense" or macs <= key["budget"] * before, (key, macs / before)
    return {"top1": top1(model, key), "macs": macs, "params": params, "seconds": round(seconds, 1)}


def one_shot_keys(run: Run) -> Iterator[dict[str, Any]]:
    for part in run.axis("part"):
        for draw in run.axis("draw"):
            yield {"arm": "dense", "part": part, "draw": draw}
            for attention in run.axis("attention"):
                for arm in run.axis("arm"):
                    for refit in run.axis("refit"):
                        for budget in run.axis("budget"):
                            more = {"attention": attention, "refit": refit, "budget": budget}
                            yield {"arm": arm, "part": part, "draw": draw, **more}


def training_keys(run: Run) -> Iterator[dict[str, Any]]:
    for part in run.axis("part"):
        for draw in run.axis("draw"):
            yield {"arm": "dense", "part": part, "draw": draw, "budget": 1.0, "attention": "heads"}
            for attention in run.axis("attention"):
                for arm in run.axis("arm"):
                    for budget in run.axis("budget"):
                        yield {"arm": arm, "part": part, "draw": draw, "budget": budget, "attention": attention}


def by_method(rows: Rows) -> str:
    """One line per method, one column per attention and refit, at half of the MACs."""
    columns = [(attention, refit) for attention in ATTENTION for refit in REFITS]
    lines = [["dense", spread([r["top1"] for r in chosen(rows, arm="dense")]), *[""] * (len(columns) - 1)]]
    for arm in (m for m in METHODS if chosen(rows, arm=m, budget=0.5)):
        mine = [chosen(rows, arm=arm, attention=a, refit=r, budget=0.5) for a, r in columns]
        lines.append([arm, *(spread([r["top1"] for r in some if "top1" in r]) for some in mine)])
    return markdown(["method", *(f"{a}, {'refit' if r != 'none' else 'no refit'}" for a, r in columns)], lines)


def refitted(rows: Rows) -> str:
    """Heads as units, with a refit, by what is left of the MACs."""
    mine = [r for r in chosen(rows, attention="heads", refit="sequential") if "top1" in r]
    return pivot(mine, "arm", "budget", order=METHODS)


def widths(rows: Rows) -> str:
    """Channels that every method keeps in the network of the first draw; a head has 24 of the rows of q, k and v."""
    mine = [r for r in chosen(rows, attention="heads", budget=0.5, draw=1) if "widths" in r]
    lines = {r["arm"]: [r["arm"], *r["widths"].values()] for r in mine}
    names = list(mine[0]["widths"]) if mine else []
    return markdown(["method", *(n.replace("blocks.", "block ") for n in names)], lines.values())


def by_budget(rows: Rows) -> str:
    mine = [{**r, "column": "dense" if r["arm"] == "dense" else f"{r['budget']:g} of the MACs"} for r in rows]
    return pivot(mine, "arm", "column", digits=2, order=TRAINED_BY)


DRAWS = [1, 2, 3]
"""Draw 0 chose the training of the dense network."""
TRAINING = {"epochs": 30, "lr": 2e-3}

EXPERIMENTS = (
    Experiment(
        "vit",
        "one-shot pruning of a vision transformer on digits: stream, heads or head dimensions, MLPs",
        {
            "arm": METHODS,
            "part": ["test"],
            "draw": DRAWS,
            "attention": ATTENTION,
            "refit": REFITS,
            "budget": [0.5],
        },
        one_shot,
        settings={"images": 512, **TRAINING},
        show={"by-method": by_method, "refitted": refitted, "widths": widths},
        keys=one_shot_keys,
        smoke={"arm": ["l2", "obs"], "draw": [1], "attention": ["heads"], "epochs": 1},
        threads=1,
    ),
    Experiment(
        "vit-training",
        "prune a vision transformer while it is fine-tuned, on digits",
        {"arm": TRAINED_BY, "part": ["test"], "draw": DRAWS, "attention": ["heads"], "budget": [0.5, 0.25]},
        while_training,
        settings={"more_epochs": 10, "more_lr": 2e-3, **TRAINING},
        show={"by-budget": by_budget},
        keys=training_keys,
        smoke={"arm": ["PSAP"], "draw": [1], "budget": [0.5], "epochs": 1, "more_epochs": 1},
        threads=1,
    ),
)
