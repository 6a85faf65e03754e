"""Ways to prune a network while it trains, all with the same number of optimizer steps, batches and learning rates."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from tp_importance import Budget, PSAPPruner, PSAPSchedule, count_ops, prunable_groups
from tp_importance.graph.cost import CostModel

SCHEDULE = PSAPSchedule()
"""Everybody prunes at its prune steps, or in one go at the last of them."""

PSAP: dict[str, dict[str, Any]] = {
    "PSAP": {},
    "PSAP, no protection": {"protect": False},
    "PSAP, uniform ratios": {"ratios": "uniform"},
    "PSAP, uniform ratios, no protection": {"ratios": "uniform", "protect": False},
}
HOSTS = ("Torch-Pruning iterative L2", "Torch-Pruning GroupNorm", "NNI AGP + L1")
ARMS = (*PSAP, *HOSTS, "dense")


@dataclass
class Training:
    """SGD with momentum and a cosine learning rate; the network and the optimizer may be exchanged on the way.

    Attributes:
        model: the network.
        x: example inputs.
        batch: the batch of an iteration.
        total: optimizer steps in all.
        lr: first learning rate.
        ignored: layers whose outputs are kept.
        bfloat16: run forward passes under autocast.
    """

    model: nn.Module
    x: Tensor
    batch: Callable[[int], tuple[Tensor, Tensor]]
    total: int
    lr: float
    ignored: list[str] = field(default_factory=list)
    bfloat16: bool = False
    iteration: int = 0
    optimizer: Any = None

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """A new optimizer, as after a surgery that knows none."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), self.lr, 0.9, weight_decay=5e-4, nesterov=True)

    def run(
        self, steps: int, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
    ) -> None:
        """Train; ``before`` and ``after`` every optimizer step something may be done."""
        self.model.train()
        for _ in range(steps):
            x, y = self.batch(self.iteration)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * 0.5 * float(1 + torch.cos(torch.tensor(torch.pi * self.iteration / self.total)))
            self.optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
                loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            if before is not None:
                before()
            self.optimizer.step()
            self.iteration += 1
            if after is not None:
                after()

    @property
    def left(self) -> int:
        return self.total - self.iteration

    def ignored_layers(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(name) for name in self.ignored]


def prune(arm: str, job: Training, kept: float) -> dict[str, Any]:
    """Train ``job.model`` to the end and down to ``kept`` of its MACs; what there is to say about it beside."""
    if arm == "dense":
        job.run(job.total)
        return {}
    if arm in PSAP:
        return _psap(job, kept, PSAP[arm])
    return {HOSTS[0]: _iterative, HOSTS[1]: _group_norm, HOSTS[2]: _agp}[arm](job, kept)


def _psap(job: Training, kept: float, options: dict[str, Any]) -> dict[str, Any]:
    pruner = PSAPPruner(
        job.model,
        job.x,
        budget=Budget(macs=kept),
        schedule=SCHEDULE,
        ignored_layers=job.ignored_layers(job.model),
        **options,
    )
    pruner.start(job.optimizer, total_steps=job.total)
    while not pruner.frozen:
        job.run(1, after=pruner.step)
    report = pruner.finish()
    job.run(job.left)
    rows = [row for step in pruner.history for row in step.rows]
    counts = {k: sum(len(getattr(r, k)) for r in rows) for k in ("restored", "exchanged", "yielded")}
    return {**counts, "widths": {r.name: r.after for r in report.rows}}


def _iterative(job: Training, kept: float) -> dict[str, Any]:
    """The same fraction of every group at every step; a new optimizer after each, as parameters are new."""
    iterations, _ = SCHEDULE.fit(job.total)

    def make(model: nn.Module, ratio: float) -> Any:
        return tp.pruner.BasePruner(
            model,
            job.x,
            tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            iterative_steps=len(iterations),
            ignored_layers=_host_ignored(job, model),
        )

    pruner = make(job.model, ratio := _least_ratio(job, kept, make, len(iterations)))
    for iteration in iterations:
        job.run(iteration - job.iteration)
        pruner.step()
        job.renew()
    job.run(job.left)
    return {"ratio": ratio}


def _group_norm(job: Training, kept: float) -> dict[str, Any]:
    """Sparse training up to the last prune step, then one step; strength of one of the host's CIFAR scripts."""
    iterations, _ = SCHEDULE.fit(job.total)

    def make(model: nn.Module, ratio: float) -> Any:
        return tp.pruner.GroupNormPruner(
            model,
            job.x,
            tp.importance.GroupMagnitudeImportance(p=2),
            reg=5e-4,
            pruning_ratio=ratio,
            ignored_layers=_host_ignored(job, model),
        )

    pruner = make(job.model, ratio := _least_ratio(job, kept, make, 1))
    job.run(iterations[-1], before=lambda: pruner.regularize(job.model))
    pruner.step()
    job.renew()
    job.run(job.left)
    return {"ratio": ratio}


def _agp(job: Training, kept: float) -> dict[str, Any]:
    """NNI's AGP schedule over its L1 pruner, coupled layers named by our groups; sped up at the last prune step."""
    import nni
    from nni.compression import TorchEvaluator
    from nni.compression.pruning import AGPPruner, L1NormPruner

    from nni_plugins import speedup

    iterations, _ = SCHEDULE.fit(job.total)
    groups = prunable_groups(job.model, job.x, job.ignored_layers(job.model))
    model = CostModel.from_groups(groups)
    dense = model.dense.macs

    def config(ratio: float) -> list[dict[str, Any]]:
        return [
            {
                "op_names": [m.name for m in g.producers],
                "sparse_ratio": ratio,
                "target_settings": {"weight": {"dependency_group_id": g.name}},
            }
            for g in groups
        ]

    def costs(ratio: float) -> int:
        return int(model.evaluate(model.full - (model.full * ratio).astype(int))[0])

    ratio = next(r / 1000 for r in range(1000) if costs(r / 1000) <= kept * dense)

    def training(model: nn.Module, optimizer: Any, _step: Any, _lr: Any = None, max_steps: Any = None, *_: Any) -> None:
        job.optimizer = optimizer
        job.run(max_steps)

    def loss(batch: Any, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    sgd = nni.trace(torch.optim.SGD)(job.model.parameters(), job.lr, 0.9, weight_decay=5e-4, nesterov=True)
    l1 = L1NormPruner(job.model, config(ratio), TorchEvaluator(training, sgd, loss))
    pruner = AGPPruner(l1, interval_steps=iterations[-1] // len(iterations), total_times=len(iterations))
    _, masks = pruner.compress(max_steps=iterations[-1], max_epochs=None)
    pruner.unwrap_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="masked and sped-up network differ")  # training goes on
        speedup(job.model, job.x, masks)
    job.renew()
    job.run(job.left)
    return {"ratio": ratio}


def _host_ignored(job: Training, model: nn.Module) -> list[nn.Module]:
    return [*job.ignored_layers(model), list(model.modules())[-1]]


def _least_ratio(job: Training, kept: float, make: Callable[[nn.Module, float], Any], steps: int) -> float:
    """The least common ratio with which the host meets the budget, in thousandths: by trial on copies."""
    limit = kept * count_ops(job.model, job.x)[0]

    def costs(thousandths: int) -> int:
        twin = copy.deepcopy(job.model)
        pruner = make(twin, thousandths / 1000)
        for _ in range(steps):
            pruner.step()
        return count_ops(twin, job.x)[0]

    low, high = 0, 990
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if costs(middle) <= limit else (middle, high)
    return high / 1000
