"""What ITPruner costs: one pass against a bare forward pass, a new budget, and the published double loop beside it.

Random weights: time does not depend on them. Bare pass, collection and what it needs for the L1 order of the channels
take turns; the ratio is taken within a round, then the median. With one CPU thread the time is that of the process.
The double loop recomputes all Gram matrices for every pair of groups; it is timed on some pairs and scaled to all.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torchvision import models

from benchmarks.experiment import Experiment, Run
from benchmarks.networks import coupled_resnet
from benchmarks.tables import Rows, listing
from benchmarks.timing import in_turns, ratios, seconds
from tp_importance import Budget, ITPruner
from tp_importance.allocation.curves import value_curves
from tp_importance.core.forward import call_model
from tp_importance.statistics.observe import Watch, observe

L1 = tp.importance.MagnitudeImportance(p=1)
FRACTIONS = np.linspace(0.2, 0.9, 15)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-50": (models.resnet50, 224),
    "MobileNetV2": (models.mobilenet_v2, 224),
    "DenseNet-121": (models.densenet121, 224),
    "EfficientNet-B0": (models.efficientnet_b0, 224),
    "ResNet-110": (partial(coupled_resnet, 18), 32),
    "ResNet-8": (partial(coupled_resnet, 1), 32),
}


def keep_memory() -> bool:
    """Ask the C library not to hand memory back between passes: page faults would dominate the bare pass."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    m_trim_threshold, m_mmap_max = -1, -4
    return mallopt is not None and bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


def hsic(x: Tensor, y: Tensor) -> Tensor:
    centre = torch.eye(len(x)) - 1 / len(x)
    return torch.trace(x @ x.T @ centre @ (y @ y.T) @ centre)


def nhsic(x: Tensor, y: Tensor) -> Tensor:
    """As in the published code: downstream anew for every pair."""
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    if not keep_memory():
        raise SystemExit("the C library does not keep memory when asked to: times would not compare")
    make, size = NETWORKS[key["network"]]
    model = make().eval()
    batch = torch.randn(run.batch, 3, size, size)
    pruner, pooled = (ITPruner(model, batch[:1], [batch], budget=Budget(macs=0.5), pool=p) for p in (False, True))

    def forward() -> None:
        with torch.inference_mode():
            call_model(model, batch)

    order = partial(value_curves, L1, pruner.groups)
    work = {"forward": forward, "collect": pruner.collect, "pooled": pooled.collect, "order": order}
    spent, _ = in_turns(work, run.repeats, "cpu")
    solves, kkt = [], []
    for fraction in FRACTIONS:
        start = seconds("cpu")
        plan = pruner.plan(Budget(macs=float(fraction)))
        solves.append(seconds("cpu") - start)
        kkt.append(plan.certificate["kkt_residual"])
    collect, ratio = float(np.median(spent["collect"])), ratios(spent, "forward", 6)["ratio"]
    result = {
        "groups": len(pruner.groups),
        "forward_s": float(np.median(spent["forward"])),
        "collect_s": collect,
        "order_s": float(np.median(spent["order"])),
        "ratio": ratio["collect"],
        "ratio_pooled": ratio["pooled"],
        "solve_ms": float(np.median(solves)) * 1e3,
        "worst_kkt": max(kkt),
    }
    if run.pairs:
        result |= loop(pruner, model, batch, run.pairs)
        result["loop_over_ours"] = result["loop_s"] / collect
    return result


def loop(pruner: ITPruner, model: nn.Module, batch: Tensor, pairs: int) -> dict[str, Any]:
    features: list[Tensor] = []
    watches = [
        Watch(g.name, model.get_submodule(c.name), partial(_keep, features, torch.from_numpy(c.channels)))
        for g in pruner.groups
        for c in g.consumers[:1]
    ]
    start = seconds("cpu")
    observe(model, [batch], watches, need_labels=False)
    forward = seconds("cpu") - start
    every = list(product(features, features))
    chosen = random.Random(0).sample(every, min(pairs, len(every)))
    start = seconds("cpu")
    for x, y in chosen:
        nhsic(x, y)
    return {"loop_s": forward + (seconds("cpu") - start) * len(every) / len(chosen), "pairs": len(chosen)}


def _keep(store: list[Tensor], channels: Tensor, x: Tensor, _out: Tensor, _labels: Tensor) -> None:
    store.append(x[:, channels].flatten(1))


def by_network(rows: Rows) -> str:
    columns: dict[str, Any] = {
        "network": "{network}",
        "groups": "{groups:.3g}",
        "forward s": "{forward_s:.3g}",
        "collect s": "{collect_s:.3g}",
        "ratio": "{ratio:.3g}",
        "without L1": lambda r: f"{(r['collect_s'] - r['order_s']) / r['forward_s']:.3g}",
        "pool=True": "{ratio_pooled:.3g}",
        "new budget ms": "{solve_ms:.3g}",
        "worst KKT": "{worst_kkt:.3g}",
        "double loop s": lambda r: f"{r['loop_s']:.3g}" if "loop_s" in r else "",
        "× ours": lambda r: f"{r['loop_over_ours']:.3g}" if "loop_s" in r else "",
    }
    return listing(rows, columns)


EXPERIMENTS = (
    Experiment(
        "itpruner-cost",
        "what ITPruner costs",
        {"network": list(NETWORKS)[:-1]},
        cell,
        settings={"batch": 100, "memory_kept": True},
        options={"repeats": 3, "pairs": 100},  # pairs of the double loop that are timed, 0 for none
        show={"by-network": by_network},
        dense=False,
        smoke={"network": ["ResNet-8"], "batch": 4, "repeats": 1, "pairs": 3},
        device="cpu",
    ),
)
