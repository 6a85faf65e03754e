"""What to do with batch norms after pruning: leave them, re-estimate them, or move them by the change that was seen.

Every cell prunes once, in one shot and without training, and then gives the same network statistics by each rule:
*left* (untouched), *re-estimated* (those of the images), *shifted* (mean + m_p − m_d, variance × v_p/v_d) and
*followed* (mean m_p + r (μ − m_d), the package's rule). m, v are mean and variance on the images, of the pruned (p)
and the dense network (d). The rule is chosen on the last test images, ``select``, and reported on the first, ``top1``.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest import mock

from torch import Tensor, nn

from benchmarks.arms import Arm
from benchmarks.data import Batches
from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, pivot
from benchmarks.tasks import Task
from tp_importance import Refit, recalibrate_batchnorm
from tp_importance.maths.batchnorm import ChannelMoments
from tp_importance.statistics import running_statistics
from tp_importance.statistics.dense_reference import DenseReference

RULES = ("left", "re-estimated", "shifted", "followed")


def shifted(mean: Tensor, var: Tensor, dense: ChannelMoments, pruned: ChannelMoments) -> tuple[Tensor, Tensor]:
    """The rival: the mean moves by the difference, whatever the scale."""
    excited = dense.variance > 1e-4 * var
    ratio = (pruned.variance / dense.variance.where(excited, dense.variance.new_ones(()))).where(excited, 1.0)
    return mean.to(dense.mean) + pruned.mean - dense.mean, var.to(dense.mean) * ratio


def by_rule(rule: str, model: nn.Module, batches: Any, reference: DenseReference) -> nn.Module:
    """The network with statistics by a rule; ``model`` is not changed."""
    model = copy.deepcopy(model)
    if rule == "re-estimated":
        return recalibrate_batchnorm(model, batches)
    if rule == "shifted":
        with mock.patch.object(running_statistics, "follow_change", shifted):
            return recalibrate_batchnorm(model, batches, reference=reference)
    return model if rule == "left" else recalibrate_batchnorm(model, batches, reference=reference)


@lru_cache(maxsize=1)
def pruned(
    run: Run, task: Task, arm: str, budget: float, refit: str, draw: int
) -> tuple[nn.Module, Batches, DenseReference]:
    """Once for all rules."""
    model, batches = task.fresh(), task.draw(draw, run.images)
    dense = copy.deepcopy(model)
    pruner = Arm.parse(arm).pruner(task, model, batches, budget)
    pruner.step(refit=None if refit == "none" else Refit(refit, recalibrate=False))  # type: ignore[arg-type]
    model.zero_grad()
    return model, batches, DenseReference.matched(dense, model)


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    task = run.task(key["network"])
    if key["arm"] == "dense":
        model = task.fresh()
    else:
        found = pruned(run, task, *(key[k] for k in ("arm", "budget", "refit", "draw")))
        model = by_rule(key["rule"], *found)
    return {"top1": round(task.top1(model, run.n_test), 3), "select": round(task.top1(model, run.n_test, last=True), 3)}


def by_rules(rows: Rows, value: str = "top1") -> str:
    dense = {r["network"]: r[value] for r in rows if r["arm"] == "dense"}

    def label(key: tuple[Any, ...]) -> list[str]:
        name, refit, budget, arm = key
        return [f"{name} ({dense[name]:.1f})", refit, f"{budget:g}", arm]

    down, header = ("network", "refit", "budget", "arm"), ["network (dense)", "refit", "MACs kept", "criterion", *RULES]
    mine = [r for r in rows if r["arm"] != "dense"]
    return pivot(mine, down, "rule", value=value, columns=RULES, header=header, label=label)


RULED = Experiment(
    "batchnorm",
    "what to do with batch norm statistics after pruning",
    {
        "network": ["resnet20", "resnet32", "resnet56"],
        "refit": ["none", "parallel"],
        "budget": [0.95, 0.7, 0.5],
        "arm": ["L1", "CATRO", "OBS"],
        "draw": [0, 1, 2],
        "rule": RULES,
    },
    cell,
    settings={"images": 500, "n_test": 1_000},
    show={"by-rule": by_rules, "selection": lambda rows: by_rules(rows, "select")},
    smoke={"budget": [0.7], "arm": ["L1"]},
)
EXPERIMENTS = (
    RULED,
    replace(
        RULED,
        name="batchnorm-500",
        about="the same on further networks and fewer test images",
        axes={
            **RULED.axes,
            "network": ["resnet56", "resnet32"],
            "refit": ["none"],
            "budget": [0.7],
            "arm": ["L1", "CATRO"],
        },
        settings={"images": 500, "n_test": 500},
    ),
)
