"""Ways to prune a network while it trains, all with the same number of optimizer steps, batches and learning rates."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tasks import Task
from benchmarks.training import Training
from tp_importance import Budget, PSAPPruner, PSAPSchedule, count_ops
from tp_importance.graph.cost import CostModel

SCHEDULE = PSAPSchedule()
"""Everybody prunes at its prune steps, or in one go at the last of them."""
PSAP: dict[str, dict[str, Any]] = {
    "PSAP": {},
    "PSAP, no protection": {"protect": False},
    "PSAP, uniform ratios": {"ratios": "uniform"},
    "PSAP, uniform ratios, no protection": {"ratios": "uniform", "protect": False},
}


def prune(arm: str, job: Training, task: Task, kept: float) -> dict[str, Any]:
    """Train ``job.model`` to the end and down to ``kept`` of its MACs; what there is to say about it beside."""
    if arm == "dense":
        job.run()
        return {}
    if arm in PSAP:
        return _psap(job, task, kept, PSAP[arm])
    found = HOSTS[arm](job, task, kept)
    job.renew()
    job.run()
    return found


def _psap(job: Training, task: Task, kept: float, options: dict[str, Any]) -> dict[str, Any]:
    budget = Budget(macs=kept)
    groups = {"verify": task.verified, "ignored_layers": task.kept_in(job.model)}
    pruner = PSAPPruner(job.model, task.inputs, budget=budget, schedule=SCHEDULE, **groups, **options)
    pruner.start(job.optimizer, total_steps=job.total)
    while not pruner.frozen:
        job.run(1, after=pruner.step)
    report = pruner.finish()
    job.run()
    rows = [row for step in pruner.history for row in step.rows]
    counts = {k: sum(len(getattr(r, k)) for r in rows) for k in ("restored", "exchanged", "yielded")}
    return {**counts, "widths": {r.name: r.after for r in report.rows}}


def _iterative(job: Training, task: Task, kept: float) -> dict[str, Any]:
    """The same fraction of every group at every step; a new optimizer after each, as parameters are new."""
    iterations, _ = SCHEDULE.fit(job.total)

    def make(model: nn.Module, ratio: float) -> Any:
        return tp.pruner.BasePruner(
            model,
            task.inputs,
            tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            iterative_steps=len(iterations),
            ignored_layers=task.ignored(model),
        )

    pruner = make(job.model, ratio := _least_ratio(job, task, kept, make, len(iterations)))
    for iteration in iterations:
        job.run(iteration - job.iteration)
        pruner.step()
        job.renew()
    return {"ratio": ratio}


def _group_norm(job: Training, task: Task, kept: float) -> dict[str, Any]:
    """Sparse training up to the last prune step, then one step; strength of one of the host's CIFAR scripts."""
    iterations, _ = SCHEDULE.fit(job.total)

    def make(model: nn.Module, ratio: float) -> Any:
        importance, ignored = tp.importance.GroupMagnitudeImportance(p=2), task.ignored(model)
        options = {"reg": 5e-4, "pruning_ratio": ratio, "ignored_layers": ignored}
        return tp.pruner.GroupNormPruner(model, task.inputs, importance, **options)

    pruner = make(job.model, ratio := _least_ratio(job, task, kept, make, 1))
    job.run(iterations[-1], before=lambda: pruner.regularize(job.model))
    pruner.step()
    return {"ratio": ratio}


def _agp(job: Training, task: Task, kept: float) -> dict[str, Any]:
    """NNI's AGP schedule over its L1 pruner, coupled layers named by our groups; sped up at the last prune step."""
    import nni
    from nni.compression import TorchEvaluator
    from nni.compression.pruning import AGPPruner, L1NormPruner

    from nni_plugins import speedup

    iterations, _ = SCHEDULE.fit(job.total)
    model = CostModel.from_groups(task.groups)

    def config(ratio: float) -> list[dict[str, Any]]:
        return [
            {
                "op_names": [m.name for m in g.producers],
                "sparse_ratio": ratio,
                "target_settings": {"weight": {"dependency_group_id": g.name}},
            }
            for g in task.groups
        ]

    def costs(ratio: float) -> int:
        return int(model.evaluate(model.full - (model.full * ratio).astype(int))[0])

    ratio = next(r / 1000 for r in range(1000) if costs(r / 1000) <= kept * model.dense.macs)

    def training(model: nn.Module, optimizer: Any, _step: Any, _lr: Any = None, max_steps: Any = None, *_: Any) -> None:
        job.optimizer = optimizer
        job.run(max_steps)

    def loss(batch: Any, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    options = {"weight_decay": job.weight_decay, "nesterov": job.nesterov}
    sgd = nni.trace(torch.optim.SGD)(job.model.parameters(), job.lr, 0.9, **options)
    l1 = L1NormPruner(job.model, config(ratio), TorchEvaluator(training, sgd, loss))
    pruner = AGPPruner(l1, interval_steps=iterations[-1] // len(iterations), total_times=len(iterations))
    _, masks = pruner.compress(max_steps=iterations[-1], max_epochs=None)
    pruner.unwrap_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="masked and sped-up network differ")  # training goes on
        speedup(job.model, task.inputs, masks)
    return {"ratio": ratio}


def _least_ratio(job: Training, task: Task, kept: float, make: Callable[[nn.Module, float], Any], steps: int) -> float:
    """The least common ratio with which the host meets the budget, in thousandths: by trial on copies."""
    limit = kept * count_ops(job.model, task.inputs)[0]

    def costs(thousandths: int) -> int:
        twin = copy.deepcopy(job.model)
        pruner = make(twin, thousandths / 1000)
        for _ in range(steps):
            pruner.step()
        return count_ops(twin, task.inputs)[0]

    low, high = 0, 990
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if costs(middle) <= limit else (middle, high)
    return high / 1000


HOSTS: dict[str, Callable[[Training, Task, float], dict[str, Any]]] = {
    "Torch-Pruning iterative L2": _iterative,
    "Torch-Pruning GroupNorm": _group_norm,
    "NNI AGP + L1": _agp,
}
ARMS = (*PSAP, *HOSTS, "dense")
