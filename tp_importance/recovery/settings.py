"""What ``recover=`` takes, wherever a pruned network can be brought back towards the dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Augment", "Recovery"]

Augment = Callable[[Any, Any], Any]
"""``augment(batch, generator)`` gives a batch of the same form."""

VISITS = 80_000
"""Samples in all that ``epochs="auto"`` trains on, repeats included."""
EPOCHS = (4, 1600)
"""Epochs at least and at most then."""


@dataclass(frozen=True)
class Recovery:
    r"""How a pruned network is trained to give what the dense one gives, on samples without labels.

    Args:
        epochs: passes over the samples; ``"auto"``: as many as make 80,000 samples, repeats included, 4 to 1,600.
        minutes: stop there; the learning rate has fallen to zero by then. ``None``: no limit. With a limit the result
            depends on the speed of the machine.
        lr: largest learning rate of AdamW; it falls to zero along a cosine.
        batch_size: samples per step.
        temperature: softens logits, see :func:`~tp_importance.maths.distillation.distillation_loss`.
        feature_weight: of the mean relative squared error of features inside the network.
        augment: ``"auto"``: images are shifted by up to an eighth, the border reflected, and every second one is
            flipped; other data stay as they are. ``None``: nothing. Or ``augment(batch, generator)``.
        held_out: fraction of the samples that choose the best state, at least 10 of them; with fewer than 100 samples
            all train and all choose.
        autocast: bfloat16; ``"auto"``: if the device has units for it and the weights are float32.
        seed: of the order and of the augmentation.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> Recovery.of(True) == Recovery()
        True
        >>> Recovery().epochs_of(500), Recovery().epochs_of(50), Recovery(epochs=3).epochs_of(50)
        (160, 1600, 3)
    """

    epochs: int | Literal["auto"] = "auto"
    minutes: float | None = None
    lr: float = 2e-3
    batch_size: int = 50
    temperature: float = 4.0
    feature_weight: float = 100.0
    augment: Augment | Literal["auto"] | None = "auto"
    held_out: float = 0.1
    autocast: bool | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        whole = (("epochs", self.epochs, 1), ("batch_size", self.batch_size, 1))
        for name, number, least in whole:
            auto = name == "epochs" and number == "auto"
            if not auto and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise ValueError(f"{name}={number!r} must be an integer of at least {least}")
        positive = (("lr", self.lr), ("temperature", self.temperature))
        for name, value in (*positive, *((("minutes", self.minutes),) if self.minutes is not None else ())):
            if not _number(value) or not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a positive number")
        if not _number(self.feature_weight) or not 0 <= self.feature_weight < float("inf"):
            raise ValueError(f"feature_weight={self.feature_weight!r} must be finite and at least 0, e.g. 100")
        if not _number(self.held_out) or not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out!r} must be a fraction between 0 and 1, e.g. 0.1")
        if self.autocast not in (True, False, "auto"):
            raise ValueError(f"autocast={self.autocast!r} must be True, False or 'auto'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer, e.g. 0")
        if self.augment not in ("auto", None) and not callable(self.augment):
            raise ValueError(
                f"augment={self.augment!r} must be 'auto', None, or a function (batch, generator) -> batch"
            )

    def epochs_of(self, samples: int) -> int:
        """``epochs`` with ``"auto"`` resolved.

        Args:
            samples: how many there are.
        """
        if self.epochs != "auto":
            return self.epochs
        return min(max(round(VISITS / max(samples, 1)), EPOCHS[0]), EPOCHS[1])

    def require_data(self, loader: Any) -> None:
        """Refuse a recovery without samples.

        Args:
            loader: what there is, ``None`` for nothing.

        Raises:
            ValueError: if there is nothing.
        """
        if loader is None:
            raise ValueError("recover= needs images: pass a loader, a re-iterable of batches")

    @classmethod
    def of(cls, value: Recovery | bool | float | None) -> Recovery | None:
        """Read what ``recover=`` arguments take: settings, ``True`` for the defaults, a number of minutes, or nothing.

        Args:
            value: what was given.

        Raises:
            TypeError: for anything else.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, (int, float)):
            return cls(minutes=value)
        raise TypeError(f"recover={value!r} must be a Recovery, a number of minutes, True or None")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
