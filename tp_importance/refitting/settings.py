"""What ``refit=`` takes, wherever a pruned network can be repaired without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["Mode", "Refit", "Ridge"]

Ridge = float | Literal["auto"]
Mode = Literal["sequential", "parallel", "batchnorm"]

_POSITIONS = {"sequential": 32, "parallel": 8, "batchnorm": None}


@dataclass(frozen=True)
class Refit:
    """How a network is repaired after channels went: new weights by least squares, and batch norms that follow.

    Args:
        mode: ``"sequential"`` (measured best, docs/benchmarks.md): one consumer after the other, to its inputs in the
            network pruned so far, with the dense network's outputs as targets. ``"parallel"``: every consumer by
            itself, to the inputs it has in the dense network; one pass. ``"batchnorm"``: no new weights, only the batch
            norm statistics follow.
        ridge: pull towards the old weights, as a fraction of the mean second moment of the kept features; ``"auto"``
            chooses it for every consumer by generalised cross-validation (:mod:`tp_importance.maths.ridge`): the fewer
            samples there are for its features, the larger it is.
        positions: output positions per sample, ``None`` for all; ``"auto"`` is 8 in parallel mode, as for the
            importances that share their pass, and 32 in sequential mode.
        downstream: in sequential mode, refit all layers behind the first removed channel, the classifier and depthwise
            convolutions among them, as their inputs have changed; else only those that lose inputs.
        residual: in sequential mode, where the output of a layer is added to a tensor that is there already, let it
            make up for the error of that tensor, too.
        seed: of the positions.
        memory_limit: bytes that ``"sequential"`` may keep of the samples and their activations between two layers.
            Where they do not fit, as at the first layers for many large images, the network runs again from the last
            layer at which they did, and from the loader's batches at the worst; the result is the same.
        recalibrate: move the batch norm statistics by the change of the network on the loader, see
            :func:`~tp_importance.recalibrate_batchnorm`: as it goes in sequential mode, where that is of use; else
            after the surgery.

    Raises:
        ValueError: for an argument out of its range, or settings that do nothing.

    Example:
        >>> Refit.of("sequential") == Refit.of(True) == Refit()
        True
        >>> Refit.of(None) is None
        True
    """

    mode: Mode = "sequential"
    ridge: Ridge = "auto"
    positions: int | Literal["auto"] | None = "auto"
    downstream: bool = True
    residual: bool = True
    seed: int = 0
    memory_limit: int = 4 << 30
    recalibrate: bool = True

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is unknown; choose 'sequential', 'parallel' or 'batchnorm'")
        number = isinstance(self.ridge, (int, float)) and not isinstance(self.ridge, bool) and 0 <= self.ridge < 1e6
        if self.ridge != "auto" and not number:
            raise ValueError(f"ridge={self.ridge!r} must be 'auto', or a fraction, at least 0, e.g. ridge=1e-3")
        n = self.positions
        if n is not None and n != "auto" and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise ValueError(f"positions={n!r} must be a positive integer, None for all, or 'auto'")
        if self.mode == "batchnorm" and not self.recalibrate:
            raise ValueError("mode='batchnorm' with recalibrate=False does nothing; give refit=None for that")

    @property
    def solves(self) -> bool:
        """Whether layers get new weights."""
        return self.mode != "batchnorm"

    @property
    def follows(self) -> bool:
        """Whether batch norms follow after the surgery, by a pass of their own."""
        return self.recalibrate and self.mode != "sequential"

    def require_data(self, loader: Any) -> None:
        """Refuse a repair without images.

        Args:
            loader: what there is, ``None`` for nothing.

        Raises:
            ValueError: if there is nothing.
        """
        if loader is None:
            raise ValueError(f"refit={self.mode!r} needs data: pass loader=")

    @property
    def sampled(self) -> int | None:
        """``positions`` with ``"auto"`` resolved."""
        return _POSITIONS[self.mode] if self.positions == "auto" else self.positions

    @classmethod
    def of(cls, value: Refit | str | bool | None, argument: str = "refit") -> Refit | None:
        """Read what ``refit=`` arguments take: settings, a mode, ``True`` for the defaults; ``None`` if off.

        Args:
            value: what was given.
            argument: how the user calls it.

        Raises:
            TypeError: for anything else.
            ValueError: for an unknown mode.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, str):
            if value not in get_args(Mode):
                raise ValueError(f"{argument}={value!r} is unknown; choose 'sequential', 'parallel' or 'batchnorm'")
            return cls(mode=value)  # type: ignore[arg-type]
        if isinstance(value, cls):
            return value
        raise TypeError(f"{argument}={value!r} must be a Refit, 'sequential', 'parallel', 'batchnorm', True or None")

    @classmethod
    def of_weights(cls, value: Refit | str | bool | None) -> Refit:
        """The same where only new weights make sense.

        Raises:
            TypeError: also for ``None``.
            ValueError: also for ``"batchnorm"``.
        """
        settings = cls.of(value)
        if settings is None:
            raise TypeError(f"refit={value!r} refits nothing; give a Refit, 'sequential' or 'parallel'")
        if not settings.solves:
            raise ValueError(
                "refit='batchnorm' gives no layer new weights: choose 'sequential' or 'parallel', or call "
                "tp_importance.recalibrate_batchnorm"
            )
        return settings
