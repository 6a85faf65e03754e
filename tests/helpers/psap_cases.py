"""A small network in training with PSAP, for tests."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_importance import Budget, PSAPPruner, PSAPSchedule
from tp_importance.testing import loader_for, make_network
from tp_importance.testing.cases import verified

SCHEDULE = PSAPSchedule(prune_steps=3, begin=0.1, end=0.7, pulse=3)
TOTAL = 20


@dataclass
class Run:
    """A network in training, with everything a user would have around it."""

    model: nn.Module
    x: torch.Tensor
    optimizer: torch.optim.Optimizer
    pruner: PSAPPruner
    loader: list[Any]
    done: int = 0

    def train(self, steps: int, pruning: bool = True) -> "Run":
        self.model.train()
        for _ in range(steps):
            x, y = self.loader[self.done % len(self.loader)]
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            if pruning:
                self.pruner.step()
            self.done += 1
        return self

    def out(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(self.x)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-3)


def make(name="residual", budget=Budget(macs=0.5), optimizer=sgd, total=TOTAL, start=True, **options):  # noqa: B008
    model, x = make_network(name)
    options = {"schedule": SCHEDULE, **verified(name), **options}
    pruner = PSAPPruner(model, x, budget=budget, **options)
    run = Run(model, x, optimizer(model), pruner, loader_for(x))
    if start:
        pruner.start(run.optimizer, total_steps=total)
    return run
