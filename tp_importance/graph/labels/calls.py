"""One operation of a pass with labels, and what its rule may ask of the pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from torch import Tensor

from ...core.batches import tensors_in
from .ledger import Ledger
from .reasons import ExclusionKind

__all__ = ["Call", "Layers", "Run"]

Layers = tuple[Tensor, ...]
"""Label tensors of one tensor, all of its shape."""


@dataclass(frozen=True)
class Call:
    """One operation of the pass.

    Attributes:
        name: of the operation, without namespace and trailing underscore.
        func: what ran.
        args: positional arguments.
        kwargs: keyword arguments.
        outputs: tensors it returned.
        where: module that ran, and the operation, for people.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    where: str

    @cached_property
    def inputs(self) -> list[Tensor]:
        """All tensors that it reads."""
        return tensors_in((self.args, self.kwargs))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


class Run(Protocol):
    """What a rule may ask of the pass and tell it."""

    ledger: Ledger

    def layers(self, tensor: Tensor) -> Layers:
        """Layers of labels of a tensor."""

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the inputs of the network."""

    def meet(self, a: Tensor, b: Tensor, where: str) -> Tensor:
        """Tie two layers of one shape, entry by entry; what has a label in one alone is pinned."""

    def flag(self, layer: Tensor, kind: ExclusionKind, text: str) -> None:
        """The labels of a layer must stay."""

    def combine(self, operands: Sequence[tuple[Tensor, Layers]], shape: Sequence[int], where: str) -> Layers:
        """Layers of what is computed entry by entry from tensors that are broadcast to one shape."""

    def follow(self, labels: Tensor, axis: int | None = None) -> None:
        """An axis with these labels was asked for; where an attribute gave its size, the attribute counts them.

        Args:
            labels: along the axis.
            axis: which one of the shape that the function was told; ``None``: any number among its arguments may be it.
        """

    def pieces(self, tensor: Tensor, layer: Tensor, axis: int, bounds: Sequence[tuple[int, int]], call: Call) -> None:
        """The labelled axis of a tensor is cut into pieces, given by first index and index behind the last."""

    def statistic(self, tensor: Tensor, layer: Tensor, axis: int, groups: int = 1) -> bool:
        """The function that runs takes a mean, a variance or a norm over all channels of a labelled axis.

        Returns:
            Whether these are activations, and later passes can find the call again, so that it may run over the
            channels that are kept.
        """

    def norm_groups(self, labels: Tensor, call: Call) -> None:
        """Channels are normalised in groups, labels of shape (groups, channels of one)."""

    def split_up(self, layer: Tensor, call: Call) -> Tensor:
        """A reshape has split an axis of channels; returns the labels, which vary along one factor if it is known."""

    def attend(
        self, layer: Tensor, axes: Sequence[int], where: str, *, queries: Literal["yes", "no", "perhaps"]
    ) -> bool:
        """A product of data with data reads a tensor.

        Args:
            layer: its labels.
            axes: of which one may be that of dimensions, counted from the end.
            where: for people.
            queries: whether the code divides it by the root of the number of its dimensions, as it is then.

        Returns:
            Whether some of it may go; what has to stay need not be followed.
        """
