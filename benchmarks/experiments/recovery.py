"""Few-image recovery: how few training images does a pruned ResNet-20 need, and how far does it come.

Every arm prunes the same pretrained network to the same MACs, looking at its draw of the training images; where nothing
is refitted, batch norms follow on them. Then one and the same recipe for everybody: a run of its own per level,
``images`` images long, with the learning rate falling to zero. Top-1 on the first test images. Other recipes go into
the same file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from typing import Any

from torch import nn

from benchmarks.arms import Arm, prune
from benchmarks.experiment import FOLLOWED, Experiment, Run
from benchmarks.tables import Rows, chosen, distinct, pivot
from benchmarks.timing import seconds
from benchmarks.training import train
from tp_importance import Distiller

ARMS = (
    *("random", "L1", "L2", "Taylor", "CATRO"),
    "L1 + parallel refit",
    *(f"{c} + {how} refit" for c in ("CATRO", "OBS") for how in ("parallel", "sequential")),
    "OBS at CATRO's widths + sequential refit",
    "OBS, uniform + sequential refit",
)
LEVELS = (0, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000)


@dataclass(frozen=True)
class Recipe:
    """How to train, by default as recommended; ``weight`` 0 is training without a teacher.

    Attributes:
        lr: largest learning rate.
        batch_size: images per step.
        temperature: of the distillation.
        weight: the teacher's share of the loss.
        warmup: fraction of the steps in which the learning rate rises.
        freeze_bn: batch norms stay in eval mode.
        features: weight of the error in the outputs of the stages, whose widths every arm keeps.
    """

    lr: float = 0.01
    batch_size: int = 64
    temperature: float = 4.0
    weight: float = 0.9
    warmup: float = 0.0
    freeze_bn: bool = False
    features: float = 100.0

    def __str__(self) -> str:
        """Learning rate and loss, and what else is not as plain as can be."""
        loss = f"T {self.temperature:g}, w {self.weight:g}" if self.weight else "labels"
        rest = {k: getattr(self, k) for k in PLAIN}
        return ", ".join([loss, f"lr {self.lr:g}", *(f"{k} {v:g}" for k, v in rest.items() if v != PLAIN[k])])

    @classmethod
    def of(cls, run: Run) -> Recipe:
        return cls(**{f.name: getattr(run, f.name) for f in fields(cls)})


PLAIN = {"batch_size": 128, "warmup": 0.0, "freeze_bn": False, "features": 0.0}


@cache
def start(run: Run, network: str, arm: str, budget: float, draw: int) -> tuple[nn.Module, dict[str, Any]]:
    """The network before any training; not to be changed."""
    task = run.task(network)
    model, found = prune(task, Arm.parse(arm), task.draw(draw, run.draw_images), budget)
    return model, {k: found[k] for k in ("macs", "widths")}


def keys(run: Run) -> Iterator[dict[str, Any]]:
    """The cells of one recipe, cheap levels first."""
    recipe = str(Recipe.of(run))
    for values in product(*map(run.axis, ("network", "budget", "image", "draw", "arm"))):
        network, budget, images, draw, arm = values
        yield {
            **{"network": network, "budget": budget, "recipe": recipe if images else "", "images": images},
            **{"draw": draw, "arm": arm},
        }


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task, images = run.task(key["network"]), key["images"]
    model, found = copy.deepcopy(start(run, *(key[k] for k in ("network", "arm", "budget", "draw"))))
    began = seconds(run.device)
    if images:
        options = asdict(Recipe.of(run))
        features, soft = options.pop("features"), {k: options.pop(k) for k in ("temperature", "weight")}
        with ExitStack() as stack:
            if features and task.stages:
                teacher = Distiller(task.model, features=task.stages, feature_weight=features, **soft)
                stack.enter_context(teacher.watching(model))
                options["loss"] = teacher
            elif soft["weight"]:
                options["loss"] = Distiller(task.model, **soft)
            train(task, model, images, seed=key["draw"], bfloat16=run.bfloat16, **options).run()
    spent = seconds(run.device) - began
    return {"top1": round(task.top1(model, run.n_test), 3), "cpu_s": round(spent, 1), **found}


RECOMMENDED = "T 4, w 0.9, lr 0.01, batch_size 64, features 100"


def by_level(rows: Rows, recipe: str) -> str:
    """One column per number of images; untrained where the arm was trained, too."""
    mine = chosen(rows, recipe=recipe)
    trained = {(r["arm"], r["draw"]) for r in mine}
    mine += [r for r in rows if not r["images"] and (r["arm"], r["draw"]) in trained]
    levels = [n for n in LEVELS if chosen(mine, images=n)]
    header = ["arm", *(f"{n // 1000}k" for n in levels)]
    return pivot(mine, "arm", "images", digits=2, columns=levels, header=header, order=ARMS)


def every_recipe(rows: Rows) -> str:
    recipes = [r for r in distinct(rows, "recipe") if r]
    return "\n\n".join(f"**{recipe}**\n\n{by_level(rows, recipe)}" for recipe in recipes)


EXPERIMENTS = (
    Experiment(
        "recovery",
        "how few images a pruned network needs to recover, on CIFAR-10",
        {"network": ["resnet20"], "budget": [0.5], "image": LEVELS, "draw": [0, 1, 2], "arm": ARMS},
        cell,
        settings={"draw_images": 500, "n_test": 5_000, "bfloat16": True, **FOLLOWED},
        options=asdict(Recipe()),
        show={"recommended": lambda rows: by_level(rows, RECOMMENDED), "recipes": every_recipe},
        keys=keys,
        smoke={"image": [0, 898], "arm": ["L1", ARMS[-2]], "draw_images": 100},
        threads=1,
    ),
)
