"""What a refit did, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RefitReport", "RefitRow"]


@dataclass(frozen=True)
class RefitRow:
    """One consumer in a :class:`RefitReport`.

    Attributes:
        name: the layer.
        kept: input features (channels × taps) that stay.
        removed: input features that go.
        before: mean squared error of its outputs without them, as a fraction of the outputs' own energy.
        after: the same after the refit.
        skipped: why it was not refitted; empty if it was.
        ridge: pull towards the old weights that the refit took; ``None`` if there was nothing to make up for.
    """

    name: str
    kept: int
    removed: int
    before: float | None = None
    after: float | None = None
    skipped: str = ""
    ridge: float | None = None

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"not refitted: {self.name}: {self.skipped}"
        left = f"{self.kept} of {self.kept + self.removed} features" if self.removed else "inputs changed"
        pull = "" if self.ridge is None else f", ridge {self.ridge:g}"
        return f"refitted: {self.name} ({left}{pull}): output error {self.before:.4f} → {self.after:.4f}"


@dataclass(frozen=True)
class RefitReport:
    """What a refit of the consumers did.

    Attributes:
        mode: ``"parallel"`` or ``"sequential"``.
        passes: forward passes over the data, cut-off ones included.
        rows: one per consumer that loses features, in execution order.
    """

    mode: str
    passes: int
    rows: list[RefitRow]

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RefitReport:
        """Rebuild a report from plain data."""
        return cls(data["mode"], data["passes"], [RefitRow(**row) for row in data["rows"]])
