"""The training of a recovery: samples that train, samples that choose, and the best state."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import FlatBatch, joined, sample_count, tensors_in
from ..core.chunks import Chunks
from ..core.devices import reference_tensor
from ..core.forward import ForwardFn, run_batch
from ..core.positions import counted_positions
from ..core.progress import LOGGER, Phase, phase
from ..statistics.running_statistics import is_calibrated
from .augment import shifted_and_flipped
from .features import common_features, feature_losses, output_loss, recorded
from .report import RecoveryReport
from .settings import Recovery
from .speed import bfloat16_is_faster, channels_last

__all__ = ["Training"]

LOOKS = 10
"""How often the held-out samples are looked at."""
LEAST = 10
"""Samples that choose at least."""
FEW = 100
"""With fewer samples all of them train and all choose."""
NORMED = 8
"""Samples of a batch from which on batch norms normalise by it."""
FITTING = 10.0
"""How far the loss may rise where batch norms normalise by the batch; else their statistics are not those of data."""
CLIPPED = 1.0
"""Largest norm of a gradient."""


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
        self._norms = [m for m in model.modules() if is_calibrated(m)]
        like = reference_tensor(model)
        self._device = torch.device("cpu") if like is None else like.device
        whole = like is not None and like.dtype == torch.float32
        self._autocast = bfloat16_is_faster(self._device) and whole if how.autocast == "auto" else how.autocast
        self._layout, self._normed = _as_it_is, False
        self._features: dict[str, Tensor | None] = {}

    def run(self) -> RecoveryReport:
        """Train, and leave the network in its best state."""
        start = time.perf_counter()
        self._model.eval()
        batches = list(self._chunks)
        if not batches:
            raise ValueError("the loader gave no batch; a re-iterable of batches is needed")
        train, choose = self._divided(batches)
        few = _first(batches[0], 8)
        self._check(few)
        self._features = common_features(self._teacher, self._model, lambda m: run_batch(m, few, self._forward_fn))
        before = self._loss_on(choose)
        if not math.isfinite(before):
            raise ValueError(
                f"the distillation loss is {before} before the first step: check the batches and the networks"
            )
        best = _Best(self._model, before)
        self._normed = self._norms_fit(_first(train[0], self._how.batch_size))
        best.restore()
        steps = sum(max(1, math.ceil(_size(b) / self._how.batch_size)) for b in train)
        epochs, samples = self._how.epochs_of(sum(map(_size, train))), sum(map(_size, batches))
        with phase("recovering", epochs * steps, unit="step", samples=samples) as running:
            done, stopped = self._train(train, choose, epochs, epochs * steps, best, start, running)
            best.offered(self._loss_on(choose))
            best.restore()
            running.note(loss=f"{before:.4g} to {best.loss:.4g}")
        spent = time.perf_counter() - start
        report = RecoveryReport(before, best.loss, done / steps, samples, spent, list(self._features), stopped)
        if best.loss >= before:
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
        optimizer = torch.optim.AdamW(self._trained, lr=lr)
        done, looks, began = 0, 0, time.perf_counter()
        left = math.inf if minutes is None else max(start + 60 * minutes - began, 1e-9)
        for batch in self._stream(train, epochs):
            share = max(done / steps, (time.perf_counter() - began) / left)
            if share >= 1:
                return done, f"stopped after {minutes:g} minutes"
            if share * LOOKS >= looks + 1:
                looks = int(share * LOOKS)
                best.offered(self._loss_on(choose))
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * share))
            if not self._step(batch, optimizer):
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

    def _divided(self, batches: list[Any]) -> tuple[list[Any], list[Any]]:
        """Batches that train, and those that choose."""
        samples = sum(map(_size, batches))
        flat = [FlatBatch.of(b) for b in batches]
        if samples < FEW or any(f is None for f in flat):
            return batches, batches
        wanted = max(LEAST, round(self._how.held_out * samples))
        whole = joined(flat)
        if whole is None:
            return batches, batches
        parts = FlatBatch.of(whole)
        assert parts is not None
        order = torch.randperm(samples, generator=self._generator, device="cpu")
        chosen, rest = (FlatBatch([t[i] for t in parts.tensors], parts.form) for i in (order[:wanted], order[wanted:]))
        return [joined([rest])], [joined([p]) for p in _pieces(chosen, 2 * self._how.batch_size)]

    def _stream(self, train: Sequence[Any], epochs: int) -> Iterator[Any]:
        """Batches in a new order in every epoch, augmented."""
        augment = shifted_and_flipped if self._how.augment == "auto" else self._how.augment
        for _ in range(epochs):
            for i in torch.randperm(len(train), generator=self._generator, device="cpu").tolist():
                flat = FlatBatch.of(train[i])
                parts = [train[i]]
                if flat is not None and flat.samples > self._how.batch_size:
                    order = torch.randperm(flat.samples, generator=self._generator, device="cpu")
                    mixed = FlatBatch([t[order] for t in flat.tensors], flat.form)
                    parts = [joined([p]) for p in _pieces(mixed, self._how.batch_size)]
                for batch in parts:
                    yield self._layout(batch if augment is None else augment(batch, self._generator))

    # -- steps

    def _loss(self, batch: Any) -> Tensor:
        names, ours, theirs = list(self._features), dict[str, Tensor](), dict[str, Tensor]()
        with recorded(self._teacher, names, theirs), recorded(self._model, names, ours):
            with self._cast(), torch.no_grad():
                wanted = run_batch(self._teacher, batch, self._forward_fn)
            with self._cast():
                given = run_batch(self._model, batch, self._forward_fn)
            features = feature_losses(ours, theirs, self._features)
        positions = counted_positions(batch, self._forward_fn)
        marks = None if positions is None else positions.bool()
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
        still = self._loss_on([batch])
        with self._normalising(True):
            return self._loss_on([batch]) <= FITTING * still

    def _step(self, batch: Any, optimizer: torch.optim.Optimizer) -> bool:
        try:
            with torch.enable_grad(), self._normalising(self._normed and _size(batch) >= NORMED):
                loss = self._loss(batch)
                if not torch.isfinite(loss):
                    return False
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            if not torch.isfinite(nn.utils.clip_grad_norm_(self._trained, CLIPPED)):
                return False
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)
        return True

    @torch.no_grad()
    def _loss_on(self, batches: Sequence[Any]) -> float:
        total = count = 0.0
        for batch in batches:
            n = _size(batch)
            total, count = total + n * float(self._loss(self._layout(batch))), count + n
        return total / count


class _Best:
    """The state with the least loss so far."""

    def __init__(self, model: nn.Module, loss: float) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
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


def _size(batch: Any) -> int:
    return sample_count(tensors_in(batch)) or 1


def _first(batch: Any, samples: int) -> Any:
    flat = FlatBatch.of(batch)
    return batch if flat is None else joined([flat.part(0, samples)])


def _pieces(flat: FlatBatch, samples: int) -> list[FlatBatch]:
    return [flat.part(i, i + samples) for i in range(0, flat.samples, samples)]
