"""Train a pruned network to give what the dense one gives, on the samples that are there anyway; no labels."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import checked_model, require_writable
from ..core.batches import FlatBatch, joined, sample_count, tensors_in
from ..core.chunks import Chunks
from ..core.copies import copied
from ..core.devices import reference_tensor
from ..core.forward import ForwardFn, run_batch
from ..core.guards import preserved, written
from ..core.positions import counted_positions
from ..core.progress import LOGGER, phase, shown
from ..statistics.running_statistics import is_calibrated
from .augment import shifted_and_flipped
from .features import common_features, feature_losses, output_loss, recorded
from .settings import Recovery

__all__ = ["RecoveryReport", "recover"]

LOOKS = 10
"""How often the held-out samples are looked at."""
LEAST = 10
"""Samples that choose at least."""
FEW = 100
"""With fewer samples all of them train and all choose."""
NORMED = 8
"""Samples of a batch from which on batch norms normalise by it."""
CLIPPED = 1.0
"""Largest norm of a gradient."""


@dataclass(frozen=True)
class RecoveryReport:
    """What a recovery did.

    Attributes:
        before: distillation loss on the samples that choose, before.
        after: the same after; at most ``before``, for the best state is kept.
        epochs: passes over the samples, the last one perhaps in part.
        samples: how many there are.
        seconds: how long it took.
        features: modules inside the network that were compared, by name.
        stopped: why it ended early; empty if it did not.
    """

    before: float
    after: float
    epochs: float
    samples: int
    seconds: float
    features: list[str] = field(default_factory=list)
    stopped: str = ""

    def __str__(self) -> str:
        gained = f"distillation loss {self.before:.4g} → {self.after:.4g}"
        if self.after >= self.before:
            gained = f"nothing gained (distillation loss {self.before:.4g}), the network is as before"
        early = f", {self.stopped}" if self.stopped else ""
        return f"recovered: {self.epochs:.3g} epochs of {self.samples} samples, {self.seconds:.0f} s{early}: {gained}"


def recover(
    model: nn.Module,
    dense: nn.Module,
    loader: Iterable[Any],
    settings: Recovery | bool | float = True,
    *,
    forward_fn: ForwardFn | None = None,
    progress: bool | None = None,
) -> RecoveryReport:
    r"""Train a pruned network, in place, to give what the dense one gives on the loader's samples.

    With the outputs :math:`z` of the pruned and :math:`\bar z` of the dense network, and their features :math:`f_l`
    and :math:`\bar f_l` inside, where their shapes agree,

    .. math:: L = \sum_z \Bigl( \frac{\lVert z - \bar z \rVert^2}{\lVert \bar z \rVert^2}
              + T^2 \operatorname{KL}(\bar z, z) \Bigr)
              + \frac{\lambda}{n} \sum_{l=1}^n \frac{\lVert f_l - \bar f_l \rVert^2}{\lVert \bar f_l \rVert^2}

    (KL where an output may be logits) is minimised by AdamW. Features are found by themselves: outputs of blocks, of
    single layers where there are no blocks. Some of the samples are held out; the state with the least loss on them is
    kept, so that the network is never worse by that measure than before. No labels are used.

    Batch norms normalise by the batch and their statistics follow, in batches of at least 8 samples; everything else
    is in eval mode. Frozen parameters stay. Modes, flags, hooks and formats of the network are as before afterwards,
    and after any exception, Ctrl-C included, its values as well.

    Args:
        model: the pruned network.
        dense: the network before pruning (a copy made then; ``OneShot.pruner`` has one); is not changed.
        loader: iterable of batches; read once, and all kept in memory.
        settings: a :class:`Recovery`, ``True`` for the defaults, or a number of minutes.
        forward_fn: ``forward_fn(model, batch)``.
        progress: show a progress bar; by default in a terminal.

    Returns:
        The :class:`RecoveryReport`.

    Raises:
        TypeError: if a network is none, compiled or wrapped, or the loader is none.
        ValueError: if nothing can be trained or compared, if the outputs of the networks have different shapes, for a
            loader without batches, and for samples on which the dense network gives values that are not finite.

    Example:
        >>> import copy
        >>> from tp_importance import Budget, Recovery, prune, recover
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> conv = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        >>> net = nn.Sequential(*conv, nn.Flatten(), nn.Linear(128, 4))
        >>> dense, loader = copy.deepcopy(net), [torch.randn(32, 3, 8, 8) for _ in range(4)]
        >>> _ = prune(net, torch.randn(1, 3, 8, 8), loader, budget=Budget(macs=0.5))
        >>> report = recover(net, dense, loader, Recovery(epochs=20))
        >>> report.after < report.before
        True

    References:
        Hinton et al. 2015 (arXiv 1503.02531) and Romero et al. 2015 (arXiv 1412.6550) for the losses; the recipe for
        a few hundred samples is ours, after MiR (arXiv 2201.02620) and PRACTISE (arXiv 2202.07861).
    """
    how = Recovery.of(settings)
    if how is None:
        raise TypeError(f"settings={settings!r} recovers nothing; give a Recovery, a number of minutes or True")
    checked_model(model)
    checked_model(dense, "dense")
    if dense is model:
        raise ValueError("model and dense are the same network: pass a copy of the network made before pruning")
    require_writable(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("all parameters are frozen: set requires_grad of those that may be trained")
    teacher = copied(dense).eval().requires_grad_(False)
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        with preserved(model), written((*model.parameters(), *model.buffers())), shown(progress):
            return _Training(model, teacher, loader, how, forward_fn).run()
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


class _Training:
    def __init__(
        self, model: nn.Module, teacher: nn.Module, loader: Iterable[Any], how: Recovery, forward_fn: ForwardFn | None
    ) -> None:
        self._model, self._teacher, self._how, self._forward_fn = model, teacher, how, forward_fn
        self._chunks = Chunks(loader, how.batch_size)
        self._generator = torch.Generator().manual_seed(how.seed)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._norms = [m for m in model.modules() if is_calibrated(m)]
        self._autocast = how.autocast is True
        self._features: dict[str, Tensor | None] = {}

    def run(self) -> RecoveryReport:
        start, how, model = time.perf_counter(), self._how, self._model
        model.eval()
        batches = list(self._chunks)
        if not batches:
            raise ValueError("the loader gave no batch; a re-iterable of batches is needed")
        train, choose = self._divided(batches)
        samples = sum(_size(b) for b in batches)
        few = _first(batches[0], 8)
        self._features = common_features(self._teacher, model, lambda m: run_batch(m, few, self._forward_fn))
        best = before = self._loss_on(choose)
        if not math.isfinite(before):
            raise ValueError(
                f"the distillation loss is {before} before the first step: check the batches and the networks"
            )
        state, stopped = self._state(), ""
        epochs = how.epochs_of(sum(map(_size, train)))
        per_epoch = self._steps(train)
        steps = epochs * per_epoch
        limit = math.inf if how.minutes is None else start + 60 * how.minutes
        optimizer = torch.optim.AdamW(self._trained, lr=how.lr)
        with phase("recovering", steps, unit="step", samples=samples) as running:
            if how.autocast == "auto":
                self._autocast = self._faster(train[0])
            done, looks, began = 0, 0, time.perf_counter()
            for batch in self._stream(train, epochs):
                now = time.perf_counter()
                share = max(done / steps, (now - began) / max(limit - began, 1e-9))
                if share >= 1:
                    stopped = f"stopped after {how.minutes:g} minutes" if how.minutes is not None else ""
                    break
                if share * LOOKS >= looks + 1:
                    looks = int(share * LOOKS)
                    best, state = self._better(choose, best, state)
                for group in optimizer.param_groups:
                    group["lr"] = how.lr * 0.5 * (1 + math.cos(math.pi * share))
                if not self._step(batch, optimizer):
                    stopped = "stopped because the loss was not finite"
                    break
                done += 1
                running.advance()
            best, state = self._better(choose, best, state)
            self._restore(state)
            running.note(loss=f"{before:.4g} to {best:.4g}")
        report = RecoveryReport(
            before, best, done / per_epoch, samples, time.perf_counter() - start, list(self._features), stopped
        )
        if best >= before:
            LOGGER.warning("%s", report)
        return report

    # -- data

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

    def _steps(self, train: list[Any]) -> int:
        return sum(max(1, math.ceil(_size(b) / self._how.batch_size)) for b in train)

    def _stream(self, train: list[Any], epochs: int) -> Iterator[Any]:
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
                    yield batch if augment is None else augment(batch, self._generator)

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
        device = reference_tensor(self._model)
        kind = "cpu" if device is None else device.device.type
        return torch.autocast(kind, torch.bfloat16) if self._autocast else nullcontext()

    def _step(self, batch: Any, optimizer: torch.optim.Optimizer) -> bool:
        normed = _size(batch) >= NORMED
        for norm in self._norms:
            norm.train(normed)
        try:
            with torch.enable_grad():
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
            for norm in self._norms:
                norm.eval()
        return True

    @torch.no_grad()
    def _loss_on(self, batches: list[Any]) -> float:
        total = count = 0.0
        for batch in batches:
            n = _size(batch)
            total, count = total + n * float(self._loss(batch)), count + n
        return total / count

    def _better(self, choose: list[Any], best: float, state: list[Tensor]) -> tuple[float, list[Tensor]]:
        loss = self._loss_on(choose)
        LOGGER.debug("held-out loss %.5g", loss)
        return (loss, self._state()) if loss < best else (best, state)

    def _faster(self, batch: Any) -> bool:
        """Whether a step is faster in bfloat16; the network is as before."""
        part, times = _first(batch, self._how.batch_size), {}
        for self._autocast in (False, True, False, True):
            start = time.perf_counter()
            with torch.enable_grad():
                torch.autograd.grad(self._loss(part), self._trained, allow_unused=True)
            times[self._autocast] = time.perf_counter() - start
        return times[True] < 0.9 * times[False]

    # -- state

    def _tensors(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]

    def _state(self) -> list[Tensor]:
        return [t.detach().clone() for t in self._tensors()]

    @torch.no_grad()
    def _restore(self, state: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors(), state, strict=True):
            tensor.copy_(value)


def _size(batch: Any) -> int:
    return sample_count(tensors_in(batch)) or 1


def _first(batch: Any, samples: int) -> Any:
    flat = FlatBatch.of(batch)
    return batch if flat is None else joined([flat.part(0, samples)])


def _pieces(flat: FlatBatch, samples: int) -> list[FlatBatch]:
    return [flat.part(i, i + samples) for i in range(0, flat.samples, samples)]
