"""A training in pieces: what it starts from, what acts in it, and a state on disk between two pieces."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.arms import Arm, prune
from benchmarks.tasks import Task
from benchmarks.training import Training
from tp_importance import (
    Budget,
    Distiller,
    PSAPPruner,
    ResConvPruner,
    convert_to_resconv,
    fuse,
    load_pruned,
    save_pruned,
)
from tp_importance.core.files import written_at_once

BATCH = 128


class Start:
    """A network that is only trained: the dense one, or one that was pruned before.

    Args:
        task: network and images.
        folder: of this run.
        arm: ``"dense"``, or one of :mod:`benchmarks.arms`.
        budget: fraction of the MACs that is kept.
        seed: draw of the images that are pruned by.
        fresh: makes the network before pruning.
        options: of the subclass.
    """

    groups: list[dict[str, Any]] | None = None
    after: Callable[[], None] | None = None

    def __init__(
        self,
        task: Task,
        folder: Path,
        arm: str,
        budget: float,
        seed: int,
        fresh: Callable[[], nn.Module],
        **options: Any,
    ) -> None:
        self.task, self.folder, self.arm, self.budget, self.seed, self.fresh = task, folder, arm, budget, seed, fresh
        self.options = options
        self.folder.mkdir(parents=True, exist_ok=True)
        self.saved = torch.load(self.file, weights_only=True) if self.file.exists() else None
        self.model = self.begun()

    @property
    def file(self) -> Path:
        """Of the state."""
        return self.folder / "state.pt"

    @property
    def network(self) -> Path:
        """Where a network of another structure than the dense one is."""
        return self.folder / "network.pt"

    def begun(self) -> nn.Module:
        """The network that training starts from, or goes on with."""
        if self.arm == "dense":
            return self.fresh()
        if not self.network.exists():
            batches = self.task.draw(self.seed, 500)
            save_pruned(prune(self.task, Arm.parse(self.arm), batches, self.budget)[0], self.network)
        return load_pruned(self.fresh, self.network)

    def ready(self, job: Training, pieces: int) -> None:
        """Once there is an optimizer."""

    def before_piece(self, job: Training, piece: int, pieces: int) -> bool:
        """Between two pieces, before the next; whether that has changed the network."""
        return False

    def state(self) -> Any:
        """What is to be saved beside network and optimizer."""

    def load(self, state: Any) -> None:
        """Take it up again."""

    def finished(self) -> nn.Module:
        """The network in the end."""
        return self.model


class WhileTraining(Start):
    """PSAP: masks move while the network trains."""

    def begun(self) -> nn.Module:
        model = self.fresh()
        found = {"verify": self.task.verified, "ignored_layers": self.task.kept_in(model)}
        self._pruner = PSAPPruner(model, self.task.inputs, budget=Budget(macs=self.budget), **found)
        return model

    def ready(self, job: Training, pieces: int) -> None:
        self._pruner.start(job.optimizer, total_steps=job.total)
        self.after = self._pruner.step

    def state(self) -> Any:
        return self._pruner.state_dict()

    def load(self, state: Any) -> None:
        self._pruner.load_state_dict(state)

    def finished(self) -> nn.Module:
        self._pruner.finish()
        return self.model


class Shallower(Start):
    """ResConv as in the paper: L1 on the factors of the layers in the first half of the training, then layers go.

    Options: ``reg``, ``s``, ``a`` and ``scalar_lr`` of the training.
    """

    def begun(self) -> nn.Module:
        self._gone = self.saved is not None and self.saved["extra"]["gone"]
        model = load_pruned(self._converted, self.network) if self._gone else self._converted()
        batches = self.task.draw(self.seed, 500)
        reg, budget = self.options["reg"], Budget(macs=self.budget)
        self._pruner = ResConvPruner(model, self.task.inputs, batches, budget=budget, reg=reg)
        self.groups = self._pruner.parameter_groups(weight_decay=5e-4, lr=self.options["scalar_lr"])
        return model

    def _converted(self) -> nn.Module:
        model = self.fresh()
        return convert_to_resconv(model, self.task.inputs, s=self.options["s"], a=self.options["a"])

    def ready(self, job: Training, pieces: int) -> None:
        if not self._gone:
            self.after = lambda: self._pruner.regularize(job.optimizer)

    def before_piece(self, job: Training, piece: int, pieces: int) -> bool:
        if piece < pieces // 2 or self._gone:
            return False
        self._pruner.step(fuse=False, refit=True)
        self.after = None
        job.groups = self._pruner.parameter_groups(weight_decay=5e-4, lr=self.options["scalar_lr"])
        job.renew()
        save_pruned(self.model, self.network)  # before the state that says so
        self._gone = True
        return True

    def state(self) -> Any:
        return {"gone": self._gone}

    def finished(self) -> nn.Module:
        return fuse(self.model.eval())


def trained(
    start: Start, pieces: int, piece: int, *, seed: int, distil: bool, going: Callable[[], bool], **options: Any
) -> nn.Module | None:
    """The network after its training, or ``None`` if time is up; the next call goes on.

    Args:
        start: what is trained.
        pieces: how many there are.
        piece: images between two states on disk.
        seed: of the order and augmentation.
        distil: whether the unpruned network teaches.
        going: whether there is time for another piece.
        **options: of :class:`~benchmarks.training.Training`.
    """
    task, saved = start.task, start.saved
    steps = task.steps(piece, BATCH)
    start.model.to(task.device, memory_format=task.layout)
    job = Training(start.model, iter(()), pieces * steps, groups=start.groups, **options)
    inside = {"features": task.stages, "feature_weight": 100.0} if task.stages else {}
    teacher = Distiller(task.model, temperature=4.0, weight=0.9, **inside) if distil else None
    if teacher is not None:
        job.loss = teacher
    begin = 0
    if saved is not None:
        begin, job.iteration = saved["piece"], saved["piece"] * steps
        start.load(saved["extra"])
    start.ready(job, pieces)
    if saved is not None:
        start.model.load_state_dict(saved["model"])
        job.optimizer.load_state_dict(saved["optimizer"])
    for number in range(begin, pieces):
        if not going():
            return None
        if start.before_piece(job, number, pieces):
            _save(number, start, job)
        job.batches = task.stream(100_003 * seed + number, piece, BATCH)
        with teacher.watching(start.model) if teacher is not None and inside else nullcontext():
            job.run(steps, after=start.after)
        _save(number + 1, start, job)
    return start.finished()


def _save(piece: int, start: Start, job: Training) -> None:
    state = {"piece": piece, "model": start.model.state_dict(), "optimizer": job.optimizer.state_dict()}
    buffer = io.BytesIO()
    torch.save({**state, "extra": start.state()}, buffer)
    with written_at_once(start.file) as file:
        file.write(buffer.getvalue())
