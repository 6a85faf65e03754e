"""What shortcuts of the mathematics cost: channels that go in rounds, and the search for a ridge.

"ordering": losses of OBS in rounds against one channel at a time, over all groups and widths of a network. "ridge": the
ridge that a sequential refit chooses for every layer against that of the least score, from eigenvalues. Networks with
weights see their own images, those of torchvision, with random weights, random ones.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiment import Experiment, Run
from benchmarks.experiments.speed import with_random_norms
from benchmarks.networks import PRETRAINED
from benchmarks.tables import Rows, listing
from benchmarks.tasks import DIGITS, EFFICIENTNET
from benchmarks.timing import Images
from tp_importance import Budget, OBSImportance, prunable_groups, prune
from tp_importance.maths import elimination
from tp_importance.maths.ridge import RIDGES, cross_validated
from tp_importance.refitting import layers

OWN = (*PRETRAINED, EFFICIENTNET, DIGITS)
ZOO = (
    "resnet18",
    "vgg11_bn",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "densenet121",
    "googlenet",
    "convnext_tiny",
    "swin_t",
)
NEGLIGIBLE = 1e-3
"""Losses below this fraction of the loss of a whole group count as that."""


def subject(run: Run, key: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Network, example inputs and batches."""
    name, images = key["network"], key["images"]
    if name in OWN:
        task = run.task(name)
        return task.fresh(), task.inputs, task.draw(0, images)
    return with_random_norms(name), torch.zeros(1, 3, 64, 64), Images(images, 64, 16)


def ordering(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Excess of the losses of rounds over those of single steps, and the time of both."""
    model, x, batches = subject(run, key)
    groups = prunable_groups(model, x)
    importance = OBSImportance().collect(model, x, batches, groups=groups)
    found, spent = {}, {}
    for how, of in (("single", 1 << 30), ("rounds", elimination.ROUND)):
        with mock.patch.object(elimination, "ROUND", of):
            start = time.process_time()
            found[how] = importance.value(groups)
            spent[how] = time.process_time() - start
    excess = []
    for name, single in found["single"].items():
        one, many = single.loss[1:-1], found["rounds"][name].loss[1:-1]
        excess.append((many - one) / np.maximum(one, NEGLIGIBLE * single.loss[0]))
    all_of_them = np.concatenate(excess)
    return {
        "widths": len(all_of_them),
        "mean": round(float(all_of_them.mean()), 5),
        "q99": round(float(np.quantile(all_of_them, 0.99)), 5),
        "largest": round(float(all_of_them.max()), 5),
        "single_s": round(spent["single"], 2),
        "rounds_s": round(spent["rounds"], 2),
    }


def scores(second: Tensor, kept: Tensor, missing: Tensor, error: Tensor, n: float, shares: Any, c: bool) -> list[float]:
    """Generalised cross-validation of every candidate, from eigenvalues."""
    total = np.zeros(len(RIDGES))
    for g, keep in enumerate(kept.to(second.device)):
        p, m = second[g][keep][:, keep].double(), missing[g][keep].double()
        weight = torch.ones_like(error[g]) if shares is None else shares[g].to(error)
        values, vectors = torch.linalg.eigh(p / p.diagonal().mean())
        values, size = values.clamp_min(0), p.diagonal().mean()
        turned = (vectors.mT @ m).square() @ weight.double() / size
        for i, ridge in enumerate(RIDGES):
            left = (error[g] * weight).sum() - (turned * (values + 2 * ridge) / (values + ridge).square()).sum()
            free = 1 - (float((values / (values + ridge)).sum()) + c) / n
            total[i] += float(left.clamp_min(0)) / free**2 if free > 0 else np.inf
    return total.tolist()


def ridge(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """In how many layers the search finds the best candidate, or one that is as good within a thousandth."""
    model, x, batches = subject(run, key)
    excess: list[float] = []

    def checked(second: Tensor, kept: Tensor, missing: Tensor, error: Tensor, rows: float, *more: Any, constant: bool):
        step, chosen = cross_validated(second, kept, missing, error, rows, *more, constant=constant)
        if bool((error > 0).any()):
            score = scores(second, kept, missing, error, rows, more[0] if more else None, constant)
            least = min(score)
            excess.append(score[RIDGES.index(chosen)] / least - 1 if np.isfinite(least) and least > 0 else 0.0)
        return step, chosen

    with mock.patch.object(layers, "cross_validated", checked):
        prune(model, x, batches, budget=Budget(macs=0.5))
    return {
        "layers": len(excess),
        "same": sum(e < 1e-3 for e in excess),
        "largest": round(max(excess, default=0.0), 4),
    }


def losses(rows: Rows) -> str:
    lines = [
        {
            **r,
            "mean": f"{100 * r['mean']:.2f} %",
            "q99": f"{100 * r['q99']:.1f} %",
            "largest": f"{100 * r['largest']:.1f} %",
            "ratio": f"{r['single_s'] / max(r['rounds_s'], 0.01):.1f}",
        }
        for r in rows
    ]
    columns = {
        "network": "{network}",
        "images": "{images}",
        "widths": "{widths}",
        "mean excess": "{mean}",
        "99 of 100 are below": "{q99}",
        "largest": "{largest}",
        "time of single steps / of rounds": "{ratio}",
    }
    return listing(lines, columns)


EXPERIMENTS = (
    Experiment(
        "ordering",
        "losses of channels that go in rounds against one at a time",
        {"network": ["resnet20", "resnet56", EFFICIENTNET, *ZOO], "images": [500, 50]},
        ordering,
        settings={"threads": 1, "device": "cpu"},
        show={"losses": losses},
        dense=False,
        smoke={"images": [20]},
        device="cpu",
        threads=1,
    ),
    Experiment(
        "ridge",
        "the ridge a refit chooses against the best of the candidates",
        {
            "network": ["resnet20", "resnet56", EFFICIENTNET, "resnet18", "mobilenet_v2", "vgg11_bn"],
            "images": [500, 50],
        },
        ridge,
        settings={"threads": 1, "device": "cpu"},
        show={
            "choices": lambda rows: listing(
                rows,
                {
                    "network": "{network}",
                    "images": "{images}",
                    "layers": "{layers}",
                    "as good as the best": "{same}",
                    "largest excess of the score": "{largest}",
                },
            )
        },
        dense=False,
        smoke={"images": [20]},
        device="cpu",
        threads=1,
    ),
)
