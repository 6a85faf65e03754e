"""The training of a recovery: samples that train, samples that choose, and the best state."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..core.chunks import Chunks
from ..core.devices import reference_tensor
from ..core.forward import ForwardFn, run_batch
from ..core.guards import writable
from ..core.positions import counted_positions
from ..core.progress import LOGGER, Phase, phase
from ..statistics.running_statistics import is_calibrated
from .augment import shifted_and_flipped
from .descent import Descent
from .features import common_features, feature_losses, output_loss, recorded
from .report import RecoveryReport
from .samples import divided, first, mixed, size, steps
from .settings import Recovery
from .speed import bfloat16_is_faster, channels_last

__all__ = ["Training"]

LOOKS = 10
"""How often the held-out samples are looked at."""
NORMED = 8
"""Samples of a batch from which on batch norms normalise by it."""
FITTING = 10.0
"""How far the loss may rise where batch norms normalise by the batch; else their statistics are not those of data."""


class Training:
    """One training of a pruned network by a dense one; :meth:`run` it once.

    Args:
        model: the pruned network, in any mode; changed in place.
        teacher: the dense network, in eval mode.
        loader: iterable of batches.
        how: settings.
        forward_fn: ``forward_fn(model, batch)``.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, loader: Iterable[Any], how: Recovery, forward_fn: ForwardFn | None
    ) -> None:
        self._model, self._teacher, self._how, self._forward_fn = model, teacher, how, forward_fn
        self._chunks = Chunks(loader, how.batch_size)
        self._generator = torch.Generator().manual_seed(how.seed)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._norms = [m for m in model.modules() if is_calibrated(m) and not _frozen(m)]
        like = reference_tensor(model)
        self._device = torch.device("cpu") if like is None else like.device
        dtype = None if like is None else like.dtype
        if how.autocast is True and dtype == torch.float16:
            raise ValueError(
                f"autocast=True is for float32 weights, and those of {type(model).__name__} are float16: leave it out"
            )
        whole = dtype == torch.float32
        self._autocast = bfloat16_is_faster(self._device) and whole if how.autocast == "auto" else how.autocast
        self._layout, self._normed = _as_it_is, False
        self._features: dict[str, Tensor | None] = {}

    def run(self) -> RecoveryReport:
        """Train, and leave the network in its best state; a caller's autocast does not count."""
        kind = self._device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return self._run()

    def _run(self) -> RecoveryReport:
        start = time.perf_counter()
        self._model.eval()
        batches = list(self._chunks)
        if not batches:
            raise ValueError("the loader gave no batch; a re-iterable of batches is needed")
        torch.manual_seed(self._how.seed)  # for networks that draw random numbers in eval mode, too
        train, choose = divided(batches, self._how.held_out, self._how.batch_size, self._generator)
        few = first(batches[0], 8)
        self._check(few)
        self._features = common_features(self._teacher, self._model, lambda m: run_batch(m, few, self._forward_fn))
        before = self._loss_on(choose)
        if not math.isfinite(before):
            raise ValueError(
                f"the distillation loss is {before} before the first step: check the batches and the networks"
            )
        best = _Best(self._model, before)
        self._normed = self._norms_fit(first(train[0], self._how.batch_size))
        best.restore()
        length = sum(steps(b, self._how.batch_size) for b in train)
        epochs, samples = self._how.epochs_of(sum(map(size, train))), sum(map(size, batches))
        done, stopped = 0, "stopped as it gives what the dense network gives"
        with phase("recovering", epochs * length, unit="step", samples=samples) as running:
            if before > 0:
                done, stopped = self._train(train, choose, epochs, epochs * length, best, start, running)
                best.offered(self._loss_on(choose))
            best.restore()
            self._leave(few)
            running.note(loss=f"{before:.4g} to {best.loss:.4g}")
        spent = time.perf_counter() - start
        report = RecoveryReport(before, best.loss, done / length, samples, spent, list(self._features), stopped)
        if best.loss >= before > 0:
            LOGGER.warning("%s", report)
        return report

    def _train(
        self,
        train: Sequence[Any],
        choose: Sequence[Any],
        epochs: int,
        steps: int,
        best: _Best,
        start: float,
        running: Phase,
    ) -> tuple[int, str]:
        """Steps that were made, and why they ended early."""
        minutes, lr = self._how.minutes, self._how.lr
        descent = Descent(self._trained, lr)
        done, looks, began = 0, 0, time.perf_counter()
        left = math.inf if minutes is None else max(start + 60 * minutes - began, 1e-9)
        for batch in self._stream(train, epochs):
            share = max(done / steps, (time.perf_counter() - began) / left)
            if share >= 1:
                return done, f"stopped after {minutes:g} minutes"
            if share * LOOKS >= looks + 1:
                looks = int(share * LOOKS)
                best.offered(self._loss_on(choose))
            if not self._step(batch, descent, lr * 0.5 * (1 + math.cos(math.pi * share))):
                return done, "stopped because the loss was not finite"
            done += 1
            running.advance()
        return done, ""

    # -- data

    @torch.no_grad()
    def _check(self, batch: Any) -> None:
        """Run both networks, and find out whether they take images in the faster memory format."""
        run_batch(self._model, batch, self._forward_fn)
        try:
            run_batch(self._teacher, batch, self._forward_fn)
        except Exception as error:
            error.add_note(
                f"raised by the dense network, a {type(self._teacher).__name__}: it must take the loader's batches, as "
                "the pruned one does; pass the network that was pruned, as it was before"
            )
            raise
        if any(isinstance(m, nn.Conv2d) for m in self._model.modules()):
            try:
                for network in (self._model, self._teacher):
                    run_batch(network, channels_last(batch), self._forward_fn)
            except RuntimeError:  # it views activations as if they were stored in the usual order
                return
            self._layout = channels_last

    def _stream(self, train: Sequence[Any], epochs: int) -> Iterator[Any]:
        """Batches in a new order in every epoch, augmented."""
        augment = shifted_and_flipped if self._how.augment == "auto" else self._how.augment
        for _ in range(epochs):
            for i in torch.randperm(len(train), generator=self._generator, device="cpu").tolist():
                for batch in mixed(train[i], self._how.batch_size, self._generator):
                    yield self._layout(batch if augment is None else augment(batch, self._generator))

    # -- steps

    def _loss(self, batch: Any) -> Tensor:
        names, ours, theirs = list(self._features), dict[str, Tensor](), dict[str, Tensor]()
        with recorded(self._teacher, names, theirs), recorded(self._model, names, ours):
            with self._cast(), torch.no_grad():
                wanted = run_batch(self._teacher, batch, self._forward_fn)
            with self._cast():
                given = run_batch(self._model, batch, self._forward_fn)
            marks = counted_positions(batch, self._forward_fn)
            features = feature_losses(ours, theirs, self._features, marks)
        loss = output_loss(given, wanted, self._how.temperature, marks)
        return loss + self._how.feature_weight * features.to(loss.device)

    def _cast(self) -> Any:
        return torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext()

    @contextmanager
    def _normalising(self, on: bool) -> Iterator[None]:
        """Inside, batch norms normalise by the batch."""
        for norm in self._norms:
            norm.train(on)
        try:
            yield
        finally:
            for norm in self._norms:
                norm.eval()

    @torch.no_grad()
    def _norms_fit(self, batch: Any) -> bool:
        """Whether normalising by a batch does about what the statistics do; moves them."""
        if size(batch) < NORMED:
            return False
        still = self._loss_on([batch])
        with self._normalising(True):
            return self._loss_on([batch]) <= FITTING * still

    def _step(self, batch: Any, descent: Descent, lr: float) -> bool:
        with torch.enable_grad(), self._normalising(self._normed and size(batch) >= NORMED):
            return descent.step(self._loss(batch), lr)

    @torch.no_grad()
    def _leave(self, batch: Any) -> None:
        """Weights that hooks compute, and what the network keeps of a forward pass, are then of the final state."""
        run_batch(self._model, self._layout(batch), self._forward_fn)

    @torch.no_grad()
    def _loss_on(self, batches: Sequence[Any]) -> float:
        total = count = 0.0
        for batch in batches:
            n = size(batch)
            total, count = total + n * float(self._loss(self._layout(batch))), count + n
        return total / count


class _Best:
    """The state with the least loss so far."""

    def __init__(self, model: nn.Module, loss: float) -> None:
        self._tensors = [t for t in (*model.parameters(), *model.buffers()) if writable(t)]
        self.loss, self._state = loss, self._copies()

    def offered(self, loss: float) -> None:
        """Take note of the state the network is in now."""
        LOGGER.debug("held-out loss %.5g", loss)
        if loss < self.loss:
            self.loss, self._state = loss, self._copies()

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in zip(self._tensors, self._state, strict=True):
            tensor.copy_(value)

    def _copies(self) -> list[Tensor]:
        return [t.detach().clone() for t in self._tensors]


def _as_it_is(batch: Any) -> Any:
    return batch


def _frozen(norm: nn.Module) -> bool:
    """Whether somebody has frozen a batch norm: then its statistics stay as well."""
    parameters = list(norm.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
