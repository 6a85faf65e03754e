"""What a network costs and what it may cost after pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = ["Budget", "Cost"]

_LABELS = {"macs": "MACs"}


class Absolute(int):
    """A limit that the user gave as it is, not as a fraction."""


@dataclass(frozen=True)
class Cost:
    """What one sample costs a network.

    Attributes:
        macs: multiply-accumulates per sample; one fused multiply-add counts as one.
        params: number of parameters; shared ones count once.

    Raises:
        TypeError: if a field is not an integer.
        ValueError: if a field is negative.

    Example:
        >>> print(Cost(macs=40_551_808, params=272_474))
        40.55 M MACs, 0.27 M params
    """

    macs: int
    params: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"Cost {name}={value!r} must be an integer count, not {type(value).__name__}")
            if value < 0:
                raise ValueError(f"Cost {name}={value} is negative; costs are counts")
            object.__setattr__(self, name, int(value))

    def __str__(self) -> str:
        return ", ".join(f"{_readable(value)} {_LABELS.get(name, name)}" for name, value in self.as_dict().items())

    def as_dict(self) -> dict[str, int]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """What a network may cost after pruning; every field that is set is an upper limit.

    A ``float`` f in (0, 1] is a fraction of the *dense* cost, that of the model as given when the pruner was
    constructed: the limit is ⌊f · dense⌋. An ``int`` is the limit itself, per sample. So ``1.0`` keeps everything
    and ``1`` keeps one multiply-accumulate. NumPy scalars count as the Python numbers they stand for.

    Latency is measured, not counted, so it is noisy: pruners of channels predict it from layer times measured on this
    machine (:class:`~tp_importance.latency.model.LatencyModel`) and keep the prediction within the limit, pruners of
    layers measure.

    Attributes:
        macs: limit for :attr:`Cost.macs`.
        params: limit for :attr:`Cost.params`.
        latency: limit as a fraction of the measured latency of the dense network; a float.
        latency_ms: limit in milliseconds for the example inputs as they are.

    Raises:
        TypeError: if a field is not a number.
        ValueError: if a field is a bool, not finite, not positive or a float above 1, if ``latency`` is an int or given
            together with ``latency_ms``, or if no field is set.

    Example:
        >>> budget = Budget(macs=0.5, params=100_000)
        >>> budget.limits(Cost(macs=40_551_808, params=272_474))
        {'macs': 20275904, 'params': 100000}
        >>> Budget.from_dict(budget.to_dict()) == budget
        True
    """

    macs: float | int | None = None
    params: float | int | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name in self.fields:
            check = _milliseconds if name == "latency_ms" else _validated
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if isinstance(self.latency, int):
            raise ValueError(
                f"latency={self.latency} is an int; give a fraction, e.g. latency=0.5, or milliseconds by latency_ms="
            )
        if self.latency is not None and self.latency_ms is not None:
            raise ValueError("give latency (a fraction) or latency_ms, not both")
        if not self.fields:
            names = [f.name for f in fields(self)]
            raise ValueError(
                f"the budget is empty: set at least one of {', '.join(names)}, e.g. Budget({names[0]}=0.5)"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that are set, in order of declaration."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def limits(self, dense: Cost) -> dict[str, int]:
        """Absolute limits of what is counted; see :meth:`latency_limit` for what is measured.

        Args:
            dense: cost of the model before pruning.

        Returns:
            Per field of :class:`Cost` that is set the largest cost allowed, in its unit. It may exceed the dense cost:
            then there is nothing to remove.

        Raises:
            TypeError: if ``dense`` is not a :class:`Cost`.
        """
        return {name: int(limit) for name, limit in self.marked_limits(dense).items()}

    def marked_limits(self, dense: Cost) -> dict[str, int]:
        """:meth:`limits`, of which those that were given as numbers are :class:`Absolute`: errors explain these.

        Args:
            dense: cost of the model before pruning.
        """
        if not isinstance(dense, Cost):
            raise TypeError(f"dense must be a Cost, e.g. Cost(macs=1000, params=100), not {type(dense).__name__}")
        chosen = {name: getattr(self, name) for name in self.fields if name in dense.as_dict()}
        return {
            name: Absolute(value) if isinstance(value, int) else math.floor(value * getattr(dense, name))
            for name, value in chosen.items()
        }

    @property
    def is_measured(self) -> bool:
        """Whether a latency is limited."""
        return self.latency is not None or self.latency_ms is not None

    def require_counted(self, who: str) -> None:
        """Refuse a limited latency.

        Args:
            who: what only works with counts.

        Raises:
            ValueError: if a latency is limited.
        """
        if self.is_measured:
            raise ValueError(
                f"{who} works with counted costs only; limit macs or params rather than latency (BudgetPruner, its "
                "subclasses and ResConvPruner take a latency)"
            )

    def latency_limit(self, dense_ms: float) -> float | None:
        """Largest latency allowed in milliseconds, if one is set.

        Args:
            dense_ms: measured latency of the model before pruning.
        """
        return self.latency_ms if self.latency is None else self.latency * dense_ms

    def is_noop(self, dense: Cost) -> bool:
        """Whether the dense model already meets every limit; what is measured is never known to be met.

        Args:
            dense: cost of the model before pruning.

        Returns:
            True if all limits are at least the dense cost, and no latency is limited.
        """
        return not self.is_measured and all(limit >= getattr(dense, name) for name, limit in self.limits(dense).items())

    def to_dict(self) -> dict[str, float | int]:
        """The fields that are set, ready for JSON."""
        return {name: getattr(self, name) for name in self.fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, float | int | None]) -> Budget:
        """Rebuild a budget from :meth:`to_dict`.

        Args:
            values: limits by field name.

        Returns:
            The budget.

        Raises:
            TypeError: if ``values`` is not a mapping, or a value is not a number.
            ValueError: if a name is unknown or a value is not allowed.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a budget is read from a dict such as {{'macs': 0.5}}, not from {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown budget field {name!r}={values[name]!r}; known: {', '.join(known)}")
        return cls(**values)


def _validated(name: str, value: Any) -> float | int:
    """``value`` as ``int`` (absolute) or ``float`` (fraction)."""
    remedy = f"give a fraction in (0, 1], e.g. {name}=0.5 for half, or a positive int for an absolute limit"
    if isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value} is a bool; {remedy}")
    if not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; {remedy}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}={number} is not allowed; {remedy}")
    if isinstance(number, float) and number > 1:
        suggestion = round(number / 100, 6) if number <= 100 else round(number)
        raise ValueError(f"{name}={number} is a float above 1: did you mean {suggestion}? {remedy.capitalize()}")
    return number


def _milliseconds(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; give milliseconds, e.g. {name}=2.5")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value} is not allowed; give milliseconds above 0, e.g. {name}=2.5")
    return float(value)


def _readable(count: int) -> str:
    """Two decimals with G, M or k, changing to the larger unit early: 0.27 M, not 272.47 k."""
    for unit, size, start in (("G", 10**9, 10**9), ("M", 10**6, 10**5), ("k", 10**3, 10**3)):
        if count >= start:
            return f"{count / size:.2f} {unit}"
    return str(count)
