"""What a recovery did."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RecoveryReport"]


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
