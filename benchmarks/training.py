"""The one training loop: plain, with a teacher, or with something done before and after every optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``loss(output, x, y)``."""


@dataclass
class Training:
    """SGD with momentum 0.9, the learning rate falling to 0 by a half cosine; networks may be exchanged on the way.

    Attributes:
        model: the network.
        batches: what to train on.
        total: optimizer steps in all.
        lr: largest learning rate.
        groups: parameter groups; default: all parameters.
        weight_decay: of SGD.
        nesterov: of SGD.
        warmup: fraction of the steps in which the learning rate rises linearly.
        loss: default: cross-entropy.
        freeze_bn: batch norms stay in eval mode.
        bfloat16: forward passes and the loss run under autocast.
        iteration: optimizer steps so far.
    """

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    total: int
    lr: float
    groups: list[dict[str, Any]] | None = None
    weight_decay: float = 5e-4
    nesterov: bool = False
    warmup: float = 0.0
    loss: Loss = lambda output, x, y: F.cross_entropy(output, y)
    freeze_bn: bool = False
    bfloat16: bool = False
    iteration: int = 0
    optimizer: Any = None

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """A new optimizer, as after a surgery that knows none."""
        parameters = self.groups or [{"params": list(self.model.parameters())}]
        options = {"momentum": 0.9, "weight_decay": self.weight_decay, "nesterov": self.nesterov}
        self.optimizer = torch.optim.SGD(parameters, self.lr, **options)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def left(self) -> int:
        return self.total - self.iteration

    @property
    def factor(self) -> float:
        """Of the learning rate, now."""
        rising = round(self.warmup * self.total)
        if self.iteration < rising:
            return (self.iteration + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (self.iteration - rising) / (self.total - rising)))

    def run(
        self,
        steps: int | None = None,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> nn.Module:
        """Train, default: to the end; ``before`` and ``after`` every optimizer step something may be done."""
        self.model.train()
        for m in self.model.modules() if self.freeze_bn else ():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        for _ in range(self.left if steps is None else steps):
            x, y = next(self.batches, (None, None))
            if x is None:  # of the last image alone no batch is made
                break
            for group in self.optimizer.param_groups:
                group["lr"] = group.get("initial_lr", self.lr) * self.factor
            self.optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
                value = self.loss(self.model(x), x, y)
            value.backward()
            if before is not None:
                before()
            self.optimizer.step()
            self.iteration += 1
            if after is not None:
                after()
        return self.model


def train(task: Any, model: nn.Module, images: int, *, seed: int, batch_size: int = 128, **options: Any) -> Training:
    """A training on ``images`` images of a task, ready to :meth:`~Training.run`."""
    model.to(task.device, memory_format=task.layout)
    return Training(model, task.stream(seed, images, batch_size), task.steps(images, batch_size), **options)
