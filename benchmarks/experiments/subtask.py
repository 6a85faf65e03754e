"""Pruning to a classification subtask: does class information help when only some classes matter?

"subtask": pretrained CIFAR-10 ResNets keep three of the ten classes: half of the MACs go in one shot, seen through
images of these classes, batch norms follow on them, classifier sliced, top-1 among the three on their test images. A
blind arm sees all ten classes.

"imagenette": EfficientNet-Lite0, a depthwise ImageNet network, pruned to the ten classes of Imagenette, 100 training
images of each. The classifier is cut to them first, so that only what they need counts; for a blind arm it has 1,000
outputs while channels are valued and refitted, and is cut afterwards. Top-1 among the ten on 1,000 validation images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks.arms import REFITS, Arm, settings
from benchmarks.data import IMAGENETTE_CLASSES, Batches
from benchmarks.experiment import FOLLOWED, Experiment, Run
from benchmarks.tables import Rows, chosen, pivot, spread
from tp_importance import count_ops, recalibrate_batchnorm, slice_classifier

ARMS = ("L2, uniform", "blind CATRO", *(f"CATRO θ = {theta:g}" for theta in (0.0, 0.5, 0.7, 0.9, 1.0)))


def only(batches: Batches, classes: list[int]) -> Batches:
    """The samples of ``classes``, labels unchanged."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    keep = torch.isin(y, torch.tensor(classes, device=y.device))
    return list(zip(x[keep].split(100), y[keep].split(100), strict=True))


@torch.inference_mode()
def accuracy(task: Any, model: torch.nn.Module, classes: list[int]) -> float:
    """Top-1 among ``classes``, in percent; output c is class ``classes[c]``."""
    found = [model(task.of_class(label)).argmax(1) == target for target, label in enumerate(classes)]
    return 100.0 * float(torch.cat(found).double().mean())


def keys(run: Run) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    triples = [sorted(rng.choice(10, 3, replace=False).tolist()) for _ in range(run.subtasks)]
    axes = map(run.axis, ("network", "draw", "budget"))
    for network, draw, budget, classes, arm in product(*axes, triples, run.axis("arm")):
        yield {"network": network, "draw": draw, "budget": budget, "classes": classes, "arm": arm}


def three(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task, arm = run.task(key["network"]), Arm.parse(key["arm"])
    model, every = task.fresh(), task.draw(key["draw"], run.images)
    loader = only(every, key["classes"])
    report = arm.pruner(task, model, every if arm.blind else loader, key["budget"]).step()
    recalibrate_batchnorm(model, loader, reference=task.model)
    slice_classifier(model, key["classes"])
    return {"top1": round(accuracy(task, model.eval(), key["classes"]), 3), "macs": report.cost.macs}


def ten(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task = run.task(key["network"])
    if key["arm"] == "dense":
        return task.unpruned(run.n_test)
    arm, start = Arm.parse(key["arm"]), time.perf_counter()
    model: Any = task.whole() if arm.blind else task.fresh()  # type: ignore[attr-defined]
    batches = task.draw(0, run.images)
    # of the whole network so much that, the classifier cut afterwards, no more is left than of a cut one
    budget = int(key["budget"] * count_ops(task.model, task.inputs)[0]) if arm.blind else key["budget"]
    pruner = arm.pruner(task, model, batches, budget)
    with arm.measure:
        plan = pruner.plan()
    model.zero_grad()
    if key["refit"] == "sequential":
        pruner.loader = batches[: -(-run.refit_images // len(batches[0][0]))]
    pruner.apply(plan, refit=settings(key["refit"], memory_limit=run.memory << 30))
    seconds = time.perf_counter() - start
    if arm.blind:
        slice_classifier(model, IMAGENETTE_CLASSES)
    macs, params = count_ops(model, task.inputs)
    top1 = round(task.top1(model, run.n_test), 2)
    return {"top1": top1, "macs": macs, "params": params, "pruning_s": round(seconds, 1), "widths": plan.widths}


def counted(values: Any) -> str:
    return f"{spread(values, 2)} ({len(values)})" if len(values) > 1 else spread(values, 2)


def by_arm(rows: Rows) -> str:
    header = ["criterion", *sorted({r["network"] for r in rows})]
    return pivot(rows, "arm", "network", cell=counted, header=header, order=ARMS)


def by_refit(rows: Rows) -> str:
    """One table per budget."""
    dense, parts = chosen(rows, arm="dense")[0]["top1"], []
    for budget in sorted({r["budget"] for r in rows if r["arm"] != "dense"}, reverse=True):
        header = [f"{budget:g} of the MACs (dense {dense:.1f})", "no refit", *REFITS[1:]]
        mine = chosen(rows, budget=budget)
        parts.append(pivot(mine, "arm", "refit", columns=REFITS, header=header, order=TEN))
    return "\n\n".join(parts)


TEN = ("L1, uniform", "Taylor, greedy", "blind CATRO", "CATRO", "blind OBS", "OBS", "OBS by outputs", "OBS θ = 0.8")
IMAGENETTE = Experiment(
    "imagenette",
    "prune a depthwise ImageNet network to ten classes",
    {"network": ["efficientnet-lite0"], "budget": [0.5, 0.7], "refit": ["none", "sequential"], "arm": TEN},
    ten,
    settings={"images": 1_000, "refit_images": 1_000, "n_test": 1_000, **FOLLOWED},
    options={"memory": 20},  # GiB that a sequential refit may take
    show={"by-refit": by_refit},
    smoke={"refit": ["sequential"], "arm": ["L1, uniform", "OBS by outputs"], "images": 128, "refit_images": 64},
)
EXPERIMENTS = (
    Experiment(
        "subtask",
        "prune to three of ten CIFAR classes",
        {"network": ["resnet20", "resnet56"], "draw": [0, 1, 2], "budget": [0.5], "arm": ARMS},
        three,
        settings={"images": 500, "subtasks": 5, **FOLLOWED},
        show={"by-arm": by_arm},
        keys=keys,
        smoke={"arm": ARMS[:3], "images": 200, "subtasks": 1},
    ),
    IMAGENETTE,
    *(
        replace(
            IMAGENETTE,
            name=f"imagenette-{n}",
            about=f"the same with {n} images for the refit",
            axes={**IMAGENETTE.axes, "budget": [0.5], "refit": ["sequential"], "arm": ["CATRO", "OBS"]},
            settings={**IMAGENETTE.settings, "refit_images": n},
            options={"memory": 10},
            smoke={**IMAGENETTE.smoke, "arm": ["OBS"]},
        )
        for n in (250, 500)
    ),
)
