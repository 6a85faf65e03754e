"""What networks are pruned by, read from names such as ``"CATRO θ = 0.5, greedy + sequential refit"``.

Criteria are the methods that the package registers, those of the hosts with raw scores, which "greedy" can rank across
groups, and those of NNI's own pruners.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import Batches
from benchmarks.tasks import Task
from tp_importance import Budget, BudgetPruner, CATROImportance, Refit
from tp_importance.pruning.gradient_importance import GradientImportance
from tp_importance.pruning.registry import METHODS
from tp_importance.statistics.consumers import ConsumerStatistics

Make = Callable[..., Any]
REFITS = ("none", "parallel", "sequential")


def criterion(make: Make) -> Make:
    """The same, asked with a network, its images, and the layers that may be pruned."""
    return lambda model, batches, layers, **options: make(**options)


def of_nni(kind: str) -> Make:
    return lambda model, batches, layers: Fixed(model, nni_metrics(kind, model, batches, layers))


imp = tp.importance
METHOD = {name: criterion(m.make) for name, m in METHODS.items() if m.make is not None}
raw = {"normalizer": None}
CRITERIA: dict[str, Make] = {
    **{f'method "{name}"': registered for name, registered in METHOD.items()},
    "random": criterion(imp.RandomImportance),
    "L1": criterion(partial(imp.MagnitudeImportance, p=1, **raw)),
    "L2": criterion(partial(imp.MagnitudeImportance, p=2, **raw)),
    "FPGM": criterion(partial(imp.FPGMImportance, **raw)),
    "BN scale": criterion(partial(imp.BNScaleImportance, **raw)),
    "Taylor": criterion(lambda: GradientImportance(imp.TaylorImportance(**raw))),
    "Taylor multivariable": criterion(lambda: GradientImportance(imp.TaylorImportance(multivariable=True, **raw))),
    "NNI L1": of_nni("l1"),
    "NNI FPGM": of_nni("fpgm"),
    "NNI Taylor": of_nni("taylor"),
    "PSAP": METHOD["psap"],
    "ITPruner": METHOD["itpruner"],
    "CATRO channel": criterion(partial(CATROImportance, space="channel", pool=True)),
    "CATRO channel maps": criterion(partial(CATROImportance, space="channel", pool=False)),
    "CATRO": METHOD["catro"],
    "OBS": METHOD["obs"],
    "OBS by outputs": METHOD["obs"],
}
NAME = re.compile(
    r"(?P<blind>blind )?(?P<criterion>.+?)(?: θ = (?P<theta>[\d.]+))?(?: at (?P<widths>\w+)'s widths)?"
    r"(?:, (?P<allocator>uniform|greedy))?(?: \+ (?P<refit>parallel|sequential) refit)?"
)


@dataclass(frozen=True)
class Arm:
    """What a network is pruned by.

    Attributes:
        criterion: a name in :data:`CRITERIA`.
        allocator: how it spends the budget; None: its default.
        refit: how the layers behind removed channels are refitted; "none": batch norms follow, nothing else.
        theta: weight of the scatter between classes.
        widths: a criterion whose widths are taken instead.
        blind: for a subtask, whether all classes are looked at.
    """

    criterion: str
    allocator: str | None = None
    refit: str = "none"
    theta: float | None = None
    widths: str | None = None
    blind: bool = False

    @classmethod
    def parse(cls, name: str) -> Arm:
        found = NAME.fullmatch(name)
        if found is None or found["criterion"] not in CRITERIA or (found["widths"] or "L1") not in CRITERIA:
            known = ", ".join(CRITERIA)
            raise SystemExit(
                f"{name!r} is no arm: it begins with one of {known}; then ', uniform' or ' + parallel refit'"
            )
        theta = None if found["theta"] is None else float(found["theta"])
        refit, blind = found["refit"] or "none", bool(found["blind"])
        return cls(found["criterion"], found["allocator"], refit, theta, found["widths"], blind)

    def importance(self, model: nn.Module, batches: Batches, layers: list[str]) -> Any:
        options = {} if self.theta is None else {"class_weight": self.theta}
        return CRITERIA[self.criterion](model, batches, layers, **options)

    def pruner(self, task: Task, model: nn.Module, batches: Batches, macs: float, **options: Any) -> BudgetPruner:
        """Of a copy of the task's network, whose groups are verified once."""
        found = {"verify": task.verified, "ignored_layers": task.kept_in(model), "keep_padded": False}
        options = {"allocator": self.allocator, **found, **options}
        if self.widths is not None:
            widths = Arm(self.widths, self.allocator).pruner(task, model, batches, macs).plan().widths
            options |= {"min_widths": widths, "max_widths": widths}
        importance = self.importance(model, batches, task.layers)
        return BudgetPruner(model, task.inputs, batches, importance=importance, budget=Budget(macs=macs), **options)

    @property
    def measure(self) -> Any:
        """What losses are relative to, while planning."""
        return by_outputs() if self.criterion.endswith("by outputs") else nullcontext()


def prune(
    task: Task, arm: Arm, batches: Batches, macs: float, *, refit: Refit | str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A pruned copy of the task's network, what it costs, and how long it took; ``refit`` replaces that of the arm."""
    model, start = task.fresh(), time.perf_counter()
    pruner = arm.pruner(task, model, batches, macs)
    with arm.measure:
        report = pruner.step(refit=refit or settings(arm.refit))
    seconds = time.perf_counter() - start
    model.zero_grad()
    cost = {"macs": report.cost.macs, "params": report.cost.params, "pruning_s": round(seconds, 2)}
    return model, cost | {"widths": [row.after for row in report.rows]}


def settings(refit: str, **options: Any) -> Refit:
    """Settings of a refit by its name; without one batch norms follow."""
    return Refit("batchnorm" if refit == "none" else refit, **options)  # type: ignore[arg-type]


@contextmanager
def by_outputs() -> Iterator[None]:
    """OBS with losses relative to energy^¾ of the consumer's own output, not to the energy of the residual sum."""

    def relative(statistics: ConsumerStatistics, name: str) -> float:
        return (statistics.energy(name) or float("inf")) ** -0.75

    without = mock.patch.object(ConsumerStatistics, "sums", lambda *_: nullcontext())
    with without, mock.patch.object(ConsumerStatistics, "relative", relative):
        yield


class Fixed(tp.importance.Importance):
    """Scores that are known per layer: those of the group's root."""

    def __init__(self, model: nn.Module, scores: dict[str, Tensor]) -> None:
        self._scores = {model.get_submodule(name): score for name, score in scores.items()}

    def __call__(self, group: Any) -> Tensor:
        return self._scores[group[0].dep.target.module][group[0].idxs]


def nni_metrics(kind: str, model: nn.Module, batches: Batches, layers: list[str]) -> dict[str, Tensor]:
    """What NNI 3.0's own pruner scores the filters of ``layers`` with, on a copy of the model.

    Args:
        kind: ``"l1"`` (L1NormPruner), ``"fpgm"`` (FPGMPruner) or ``"taylor"`` (TaylorPruner: the mean over batches of
            Σ (w·g)² per filter, collected by NNI's hooks while its evaluator trains at learning rate 0 in eval mode).
        model: the network.
        batches: images and labels; only ``"taylor"`` looks at them.
        layers: convolutions to score.

    Raises:
        ImportError: if NNI cannot be imported.
    """
    import nni
    from nni.compression import TorchEvaluator
    from nni.compression.pruning import FPGMPruner, L1NormPruner, TaylorPruner

    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def training(model: nn.Module, optimizers: Any, step: Any, *_: Any, max_steps: Any = None, **__: Any) -> None:
        model.eval()
        for batch in batches[:max_steps]:
            optimizers.zero_grad()
            step(batch, model).backward()
            optimizers.step()

    twin = copy.deepcopy(model)
    config = [{"op_names": layers, "sparse_ratio": 0.5}]  # the ratio is not used: only the metrics are
    if kind == "taylor":
        optimizer = nni.trace(torch.optim.SGD)(twin.parameters(), lr=0.0)
        evaluator = TorchEvaluator(training, optimizer, step)
        pruner: Any = TaylorPruner(twin, config, evaluator, training_steps=len(batches))
    else:
        pruner = {"l1": L1NormPruner, "fpgm": FPGMPruner}[kind](twin, config)
    seen: list[Any] = []
    calculate = pruner._calculate_metrics
    pruner._calculate_metrics = lambda data: seen.append(calculate(data)) or seen[-1]  # gone after compress()
    pruner.compress()
    return {name: targets["weight"].flatten().detach() for name, targets in seen[0].items()}
