"""One-shot pruning of pretrained CIFAR-10 ResNets: which criterion keeps the accuracy, without any training.

Every cell: block-internal channels (those of verified groups), a budget in MACs that is met exactly, batch norms follow
on the images the criterion saw, top-1 on the test images. Random and magnitude run under the same protocol; a spread
is over draws of the images. "exponent": how far CATRO takes losses relative to a group's energy.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.arms import Arm
from benchmarks.experiment import FOLLOWED, Experiment, Run
from benchmarks.tables import Rows, chosen, markdown, pivot, spread
from benchmarks.timing import seconds
from tp_importance.allocation.curves import value_curves
from tp_importance.pruning.importance import StatisticalImportance
from tp_importance.statistics import consumers

BOTH = ("random", "L1", "L2", "FPGM", "BN scale", "Taylor", "Taylor multivariable", "NNI L1", "NNI FPGM", "NNI Taylor")
OURS = ("CATRO channel", "CATRO channel maps", "CATRO", "CATRO θ = 1", "CATRO θ = 0")
UNIFORM_ONLY = ("NNI L1", "NNI FPGM")
ARMS = [f"{c}, {a}" for c in (*BOTH, *OURS) for a in ("uniform", "greedy") if a == "uniform" or c not in UNIFORM_ONLY]
TITLES = {"resnet20": "ResNet-20", "resnet32": "ResNet-32", "resnet44": "ResNet-44", "resnet56": "ResNet-56"}


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task = run.task(key["network"])
    if key["arm"] == "dense":
        left_out = {e.name: e.reason for e in task.groups.excluded}
        return {**task.unpruned(run.n_test), "scoring_s": 0.0, "groups": task.groups.widths, "excluded": left_out}
    arm, model, batches = Arm.parse(key["arm"]), task.fresh(), task.draw(key["draw"], run.images)
    start = seconds(run.device)
    pruner = arm.pruner(task, model, batches, key["budget"])
    importance: Any = pruner.importance
    if isinstance(importance, StatisticalImportance):
        importance.collect(model, task.inputs, batches, groups=pruner.groups)
    curves = value_curves(importance, pruner.groups)
    scoring = seconds(run.device) - start  # apart from allocation and surgery
    pruner.importance = SimpleNamespace(curves=lambda _: curves)
    model.zero_grad()
    report = pruner.step(refit="batchnorm")
    return {
        "top1": round(task.top1(model, run.n_test), 3),
        "macs": report.cost.macs,
        "params": report.cost.params,
        "scoring_s": round(scoring, 4),
        "widths": [row.after for row in report.rows],
    }


def by_arm(rows: Rows) -> str:
    columns = [n for n in TITLES if chosen(rows, network=n)]
    header = ["criterion", "widths", *(TITLES[n] for n in columns)]

    def label(arm: str) -> list[str]:
        return [*arm.split(", "), ""][:2]

    return pivot(rows, "arm", "network", columns=columns, header=header, order=["dense", *ARMS], label=label)


README = {
    "dense": ["dense"],
    "random": ["random"],
    **{f"Torch-Pruning {c}": [c] for c in ("L1", "L2", "FPGM", "BN scale")},
    "Torch-Pruning Taylor": ["Taylor", "Taylor multivariable"],
    **{c: [c] for c in ("NNI L1", "NNI FPGM", "NNI Taylor")},
    'CATRO `"channel"` (literal)': ["CATRO channel"],
    '**CATRO `"consumer"`** (default)': ["CATRO"],
}


def best(rows: Rows) -> str:
    """Per criterion and network the better widths."""
    lines = []
    for label, criteria in README.items():
        line = [label]
        for network in TITLES:
            arms = [arm for arm in ("dense", *ARMS) if arm.split(", ")[0] in criteria]
            top1 = [[r["top1"] for r in chosen(rows, network=network, arm=arm)] for arm in arms]
            text = spread(max((t for t in top1 if t), key=np.mean, default=[]))
            line.append(f"**{text}**" if label.startswith("**") and text else text)
        lines.append(line)
    return markdown(["criterion", *TITLES.values()], lines)


def exponent(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    with mock.patch.object(consumers, "ENERGY_EXPONENT", key["exponent"]):
        found = cell(run, {**key, "arm": "CATRO, greedy"})
    return {name: found[name] for name in ("top1", "macs")}


EXPERIMENTS = (
    Experiment(
        "cifar",
        "one-shot pruning on CIFAR-10: criteria under uniform and greedy widths",
        {"network": ["resnet20", "resnet56"], "arm": ARMS, "budget": [0.5], "draw": [0, 1, 2]},
        cell,
        settings={"images": 500, "n_test": 10_000, **FOLLOWED},
        show={"by-arm": by_arm, "best": best},
        smoke={"arm": ["L1, uniform", "CATRO, greedy"]},
    ),
    Experiment(
        "exponent",
        "how far CATRO takes losses relative to a group's energy",
        {
            "network": ["resnet20", "resnet56"],
            "exponent": [1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.0],
            "budget": [0.5],
            "draw": [3, 4, 5],  # they chose nothing before
        },
        exponent,
        settings={"images": 500, "n_test": 10_000, **FOLLOWED},
        show={"by-exponent": lambda rows: pivot(rows, "exponent", "network", digits=2)},
        dense=False,
        smoke={"exponent": [1.0, 0.75], "draw": [3]},
    ),
)
