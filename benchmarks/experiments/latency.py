"""Does a network that was pruned to a predicted latency have it? Random weights; time does not depend on them.

Per network and batch the layer table is measured once and the model calibrated on the network and three uniformly
narrowed copies; then copies are pruned by L2 norm to fractions of the measured latency, and measured. Run it on a quiet
machine.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torchvision import models

from benchmarks.experiment import Experiment, Run
from benchmarks.networks import coupled_resnet
from benchmarks.tables import listing
from tp_importance import Budget, BudgetPruner, LatencyTable

NETWORKS = {"resnet50": models.resnet50, "mobilenet_v2": models.mobilenet_v2, "resnet8": lambda: coupled_resnet(1)}
SIZE = {"resnet8": 32}


def build(name: str, batch: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    size = SIZE.get(name, 224)
    return NETWORKS[name]().eval().to(device), torch.randn(batch, 3, size, size, device=device)


@cache
def layers(run: Run) -> LatencyTable:
    """Layer times, measured anew unless a file is given."""
    return LatencyTable(run.layers or None, min_run_time=run.layer_seconds)


def pruner(run: Run, name: str, batch: int, arm: str) -> BudgetPruner:
    model, x = build(name, batch, run.device)
    options: dict[str, Any] = {"allocator": arm.removeprefix("L2, "), "latency_table": layers(run)}
    importance = tp.importance.MagnitudeImportance(p=2)
    # bench-zoo has verified the groups
    return BudgetPruner(model, x, importance=importance, budget=Budget(latency=0.5), verify=False, **options)


@cache
def planner(run: Run, name: str, batch: int, arm: str) -> tuple[BudgetPruner, float]:
    """Measured with the first cell that needs it, then it plans for every budget."""
    made = pruner(run, name, batch, arm)
    start = time.perf_counter()
    made.measure_latency()
    return made, time.perf_counter() - start


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    case = key["network"], key["batch"], key["arm"]
    plans, spent = planner(run, *case)
    start = time.perf_counter()
    plan = plans.plan(Budget(latency=key["budget"]))
    planned = time.perf_counter() - start
    report = pruner(run, *case).apply(plan)
    ms = {name: round(value, 4) for name, value in report.latency_ms.to_dict().items()}
    return {
        **ms,
        "error": round(ms["predicted"] / ms["measured"] - 1, 4),
        "macs": round(report.cost.macs / report.dense.macs, 4),
        "plan_s": round(planned, 2),
        "model_s": round(spent, 1),
        "calibration": plans.measure_latency().calibration,
    }


COLUMNS = {
    "network": "{network}",
    "batch": "{batch}",
    "allocator": lambda r: r["arm"].removeprefix("L2, "),
    "budget": "{budget}",
    "dense ms": "{dense:.2f} ± {dense_iqr:.2f}",
    "predicted ms": "{predicted:.2f}",
    "measured ms": "{measured:.2f} ± {measured_iqr:.2f}",
    "error": lambda r: f"{100 * r['error']:+.1f} %",
    "MACs kept": "{macs:.3f}",
}
EXPERIMENTS = (
    Experiment(
        "latency",
        "prune to a predicted latency and measure it",
        {
            "network": ["resnet50", "mobilenet_v2"],
            "batch": [1, 8],
            "arm": ["L2, greedy", "L2, uniform"],
            "budget": [0.8, 0.6, 0.4],
        },
        cell,
        settings={"device": "cpu"},
        options={"layers": "", "layer_seconds": 0.03},  # file to keep layer times in, and how long to measure one
        show={"by-budget": lambda rows: listing(rows, COLUMNS)},
        dense=False,
        smoke={"network": ["resnet8"], "batch": [16], "arm": ["L2, uniform"], "budget": [0.9], "layer_seconds": 0.002},
        threads=1,
        device="cpu",
    ),
)
