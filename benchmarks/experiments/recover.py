"""Recovery after pruning on a few unlabelled images: the pruned network learns from the dense one, and nothing else.

Every arm prunes the same pretrained network to the same MACs, looking at its draw of the training images; then one and
the same recovery for everybody, on the same images without labels. "layers" removes layers by ResConv instead of
channels. "recover": top-1 on the last test images, with the settings of `recover=True`. "recover-settings": what those
settings were chosen by, on the first test images. "recover-curve": accuracy against time and number of images.
"""

from __future__ import annotations

import copy
from ast import literal_eval
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from statistics import mean
from typing import Any

from torch import nn

from benchmarks.arms import Arm, prune
from benchmarks.experiment import FOLLOWED, Experiment, Run
from benchmarks.tables import Rows, chosen, distinct, markdown, pivot, spread
from benchmarks.timing import seconds
from tp_importance import Budget, Recovery, ResConvPruner, count_ops, recover
from tp_importance.methods.resconv import LayerPlan

OURS = "OBS + sequential refit"
ARMS = (OURS, "L1", "L2", "random", "Taylor", "CATRO + sequential refit")
LAYERS = "layers"
MANY, FEW = "epochs=89 feature_weight=", "epochs=400 feature_weight="
RECIPES = {
    500: (*(f"{MANY}{w}" for w in ("30", "100", "300", "30 lr=0.004")), "epochs=160 feature_weight=30"),
    50: (
        *(f"{FEW}{w}" for w in ("10", "30", "100", "30 lr=0.001", "30 lr=0.004", "30 batch_size=25")),
        *(f"epochs=1600 feature_weight={w}" for w in ("30", "100")),
    ),
}
"""What was tried one after the other, by number of images."""
VISITS = (5_000, 10_000, 20_000, 40_000, 80_000)


@cache
def start(run: Run, network: str, arm: str, budget: float, images: int, draw: int) -> tuple[nn.Module, float]:
    """The network before any training, and how long that took; not to be changed."""
    task, began = run.task(network), seconds(run.device)
    batches = task.draw(draw, images)
    if arm == LAYERS:
        pruner = shallower(run, network, budget, images, draw)
        pruner.apply(planned(run, network, budget, images, draw), refit="sequential")
        return pruner.model, seconds(run.device) - began
    model, _ = prune(task, Arm.parse(arm), batches, budget)
    return model, seconds(run.device) - began


@cache
def planned(run: Run, network: str, budget: float, images: int, draw: int) -> LayerPlan:
    """Which layers go."""
    return shallower(run, network, budget, images, draw).plan()


def shallower(run: Run, network: str, budget: float, images: int, draw: int) -> ResConvPruner:
    task = run.task(network)
    batches = task.draw(draw, images)
    return ResConvPruner(task.fresh(), task.inputs, batches, budget=Budget(macs=budget), importance="output")


def keys(run: Run) -> Iterator[dict[str, Any]]:
    """The dense network, then what every arm makes of every draw; the results of an arm stand together."""
    for network in run.axis("network"):
        yield {"network": network, "arm": "dense"}
        for values in product(*map(run.axis, ("budget", "image", "arm", "draw", "recipe"))):
            yield {"network": network, **dict(zip(("budget", "images", "arm", "draw", "recipe"), values, strict=True))}


def tried(run: Run) -> Iterator[dict[str, Any]]:
    """Settings, by number of images."""
    for key in keys(run):
        known = [r for recipes in RECIPES.values() for r in recipes]
        if key["arm"] == "dense" or key["recipe"] not in known or key["recipe"] in RECIPES.get(key["images"], ()):
            yield key


def curve_keys(run: Run) -> Iterator[dict[str, Any]]:
    """Cheap cells first."""
    for network in run.axis("network"):
        yield {"network": network, "arm": "dense"}
        names = ("budget", "draw", "arm", "visits", "images")
        for values in product(*map(run.axis, ("budget", "draw", "arm", "visit", "image"))):
            key = dict(zip(names, values, strict=True))
            if key["visits"] >= key["images"]:
                yield {"network": network, **key, "recipe": f"epochs={key['visits'] // key['images']}"}


def settings(recipe: str, seed: int) -> Recovery:
    """Of a text such as ``"lr=0.001 epochs=20"``; what it does not name is as by default."""
    given = (part.split("=") for part in recipe.split())
    return Recovery(**{name: literal_eval(value) for name, value in given}, seed=seed)


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task = run.task(key["network"])
    top1 = partial(task.top1, images=run.n_test, last=run.last)
    if key["arm"] == "dense":
        return {**task.unpruned(1), "top1": round(top1(task.fresh()), 3)}
    made = tuple(key[k] for k in ("network", "arm", "budget", "images", "draw"))
    untrained, pruning = start(run, *made)
    before, how = top1(untrained), settings(key["recipe"], key["draw"])
    began = seconds(run.device)
    if key["arm"] == LAYERS:  # it recovers on the way
        which = (key["network"], key["budget"], key["images"], key["draw"])
        pruner = shallower(run, *which)
        removal = pruner.apply(planned(run, *which), refit="sequential", recover=how)
        model, report = pruner.model, removal.recovery
        assert report is not None
    else:
        model = copy.deepcopy(untrained)
        report = recover(model, task.model, [x for x, _ in task.draw(key["draw"], key["images"])], how)
    spent = seconds(run.device) - began  # with layers, also their removal
    macs, params = count_ops(model, task.inputs)
    return {
        "before": round(before, 3),
        "top1": round(top1(model), 3),
        "macs": macs,
        "params": params,
        "pruning_s": round(pruning, 1),
        "recovery_s": round(spent, 1),
        "epochs": round(report.epochs, 2),
    }


def by_arm(rows: Rows) -> str:
    """One line per network, budget, number of images and arm, best first within what is comparable."""
    dense = {r["network"]: r for r in rows if r["arm"] == "dense"}
    lines = []
    for network, budget, images in distinct(chosen(rows, recipe=""), "network", "budget", "images"):
        cells = chosen(rows, network=network, budget=budget, images=images, recipe="")
        found = {arm: chosen(cells, arm=arm) for arm in distinct(cells, "arm")}
        for arm, mine in sorted(found.items(), key=lambda item: -mean(r["top1"] for r in item[1])):
            whole = dense[network]
            lines.append(
                [
                    f"{network} ({whole['top1']:.1f})",
                    f"{mean(r['macs'] for r in mine) / whole['macs']:.0%}",
                    images,
                    arm,
                    *(spread([r[k] for r in mine]) for k in ("before", "top1")),
                    f"{mean(r['pruning_s'] for r in mine):.0f}",
                    len(mine),
                ]
            )
    header = ["network (dense)", "MACs", "images", "pruned by", "pruned", "recovered", "pruning, s"]
    return markdown([*header, "draws"], lines)


def by_recipe(rows: Rows) -> str:
    """What each setting gives on the images that choose."""
    rows = [r for r in rows if r["arm"] != "dense"]
    return pivot([{**r, "recipe": r["recipe"] or "defaults"} for r in rows], "recipe", "images")


def by_visits(rows: Rows) -> str:
    """Accuracy, and minutes, per number of images and of images seen, repeats included."""
    rows = [r for r in rows if r["arm"] != "dense"]
    visits, images = (sorted({r[k] for r in rows}) for k in ("visits", "images"))
    lines = []
    for n in images:
        mine = chosen(rows, images=n)
        cells = [chosen(mine, visits=v) for v in visits]
        lines.append(
            [n, spread([r["before"] for r in mine]), *(spread([r["top1"] for r in c]) if c else "" for c in cells)]
        )
    took = [f"{mean(r['recovery_s'] for r in chosen(rows, visits=v)) / 60:.1f} min" for v in visits]
    header = ["images", "pruned", *(f"{v // 1000}k seen, {t}" for v, t in zip(visits, took, strict=True))]
    return markdown(header, lines)


COMMON: dict[str, Any] = {
    "threads": 1,
    "device": "cpu",
    "smoke": {"image": [100], "arm": ["L1", OURS], "recipe": ["epochs=1"], "visit": [100]},
}
AXES: dict[str, Any] = {"network": ["resnet20"], "budget": [0.5], "image": [500]}
EXPERIMENTS = (
    Experiment(
        "recover",
        "recovery after pruning on a few unlabelled images, on CIFAR-10",
        {**AXES, "arm": ARMS, "draw": [0, 1, 2], "recipe": [""]},
        cell,
        settings={"n_test": 5_000, "last": True, **FOLLOWED},
        show={"by-arm": by_arm},
        keys=keys,
        **COMMON,
    ),
    Experiment(
        "recover-settings",
        "what the settings of a recovery were chosen by",
        {**AXES, "image": [500, 50], "arm": [OURS], "draw": [0], "recipe": [*RECIPES[500], *RECIPES[50]]},
        cell,
        settings={"n_test": 5_000, "last": False, **FOLLOWED},
        show={"by-recipe": by_recipe},
        keys=tried,
        **COMMON,
    ),
    Experiment(
        "recover-curve",
        "accuracy after a recovery against its time and the number of images",
        {**AXES, "image": [50, 100, 500, 1_000, 5_000], "visit": VISITS, "arm": [OURS], "draw": [0]},
        cell,
        settings={"n_test": 5_000, "last": True, **FOLLOWED},
        show={"by-visits": by_visits},
        keys=curve_keys,
        **COMMON,
    ),
)
