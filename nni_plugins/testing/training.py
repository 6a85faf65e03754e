"""A training loop for NNI's evaluator, and what was seen in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tp_importance.budget import Cost

from .. import ImportancePruner
from .._compat import import_nni
from .cases import hooks, removed_filters

__all__ = ["TrainingLog", "make_evaluator", "training_step"]


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    """Cross-entropy of a batch of inputs and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class TrainingLog:
    """What was seen after every optimizer step.

    Attributes:
        losses: of the batches.
        hooks: on all modules.
        costs: of the pruner's plan, if it has one yet; only with ``pruner``.
        masked: filters that are masked; only with ``pruner``.
        pruner: to be watched; set once it is built.
    """

    losses: list[float] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)
    costs: list[Cost | None] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    pruner: ImportancePruner | None = None


def make_evaluator(model: nn.Module, loader: Iterable[Any], log: TrainingLog) -> Any:
    """A ``TorchEvaluator`` with a training loop as a user writes it, which also fills ``log``."""
    nni, compression = import_nni(), import_nni("nni.compression")

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Any,
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        steps = 0
        for _ in range(max_epochs or 100):
            for batch in loader:
                if max_steps is not None and steps >= max_steps:
                    return
                optimizer.zero_grad()
                loss = training_step(batch, model)
                loss.backward()
                optimizer.step()
                steps += 1
                log.losses.append(float(loss.detach()))
                log.hooks.append(hooks(model))
                if log.pruner is not None:
                    log.costs.append(None if log.pruner.plan is None else log.pruner.plan.cost)
                    masks = log.pruner.get_masks()
                    log.masked.append(sum(removed_filters(masks, g.name) for g in log.pruner._target.groups))

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)
    return compression.TorchEvaluator(train, optimizer, training_step)
