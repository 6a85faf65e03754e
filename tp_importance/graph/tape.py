"""One forward pass as a list of operations on tensors, of which any part can run again; :mod:`.recorder` makes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ..core.batches import tensors_in

__all__ = ["Mark", "NotReplayable", "Note", "Step", "Tape", "Value", "Values"]

Values = dict[int, Tensor]
"""Tensors by their number."""


class NotReplayable(Exception):
    """Running the operations again would not be the same as running the network again; says why."""


@dataclass(frozen=True)
class Value:
    """Stands for a tensor among recorded arguments."""

    id: int


@dataclass(frozen=True)
class Note:
    """What is known of a tensor: the first one in its memory, whether it fills that, and its size."""

    root: int
    dense: bool
    bytes: int


@dataclass(frozen=True)
class Mark:
    """Where a layer is about to run.

    Attributes:
        step: its first step.
        number: the tensor that it gets.
        shape: of what it gives.
    """

    step: int
    number: int
    shape: tuple[int, ...] = ()


@dataclass(slots=True)
class Step:
    """One operation: of torch, or the call of a whole module if ``unit`` is its name.

    Without a ``form``, the leaves are its positional arguments.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    run: Any = None
    leaves: list[Any] = field(default_factory=list)
    form: Any = None
    unit: str = ""
    stride: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    dead: tuple[int, ...] = ()

    def __call__(self, values: Values, units: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Run it: what it makes is added to ``values``, and what nobody needs any more goes."""
        if self.unit:
            values[self.outputs[0]] = _laid_out(units[self.unit](values[self.inputs[0]]), self.stride)
        else:
            leaves = [values[x.id] if type(x) is Value else x for x in self.leaves]
            if self.form is None:
                output = self.run(*leaves)
            else:
                args, kwargs = tree_unflatten(leaves, self.form)
                output = self.run(*args, **kwargs)
            made = [output] if isinstance(output, Tensor) else tensors_in(output)
            values.update(zip(self.outputs, made, strict=True))
        for number in self.dead:
            del values[number]


class Tape:
    """The operations of one pass, in order.

    Attributes:
        first: for every module that was followed and called, the step of its first call.
        cuts: steps among them before which a run can be interrupted and taken up again, any number of times.
        end: how many steps there are.
        marks: for every module that was marked and called, where that was.
        named: numbers of tensors that were given a name.
    """

    def __init__(
        self,
        steps: list[Step],
        notes: list[Note],
        inputs: list[int],
        output: int,
        marks: dict[str, Mark] | None = None,
        named: dict[Hashable, int] | None = None,
    ) -> None:
        self._steps, self._notes, self._inputs, self._output = steps, notes, inputs, output
        self.end, self.marks, self.named = len(steps), marks or {}, named or {}
        self.first: dict[str, int] = {}
        last, born = [-1] * len(notes), [-1] * len(notes)
        last_write: dict[int, int] = {}
        for i, step in enumerate(steps):
            if step.unit:
                self.first.setdefault(step.unit, i)
            for number in (*step.inputs, *step.outputs):
                last[number] = i
            for number in step.outputs:
                born[number] = i if born[number] < 0 and number not in inputs else born[number]
            for number in step.written:
                last_write[notes[number].root] = i
        last[output] = len(steps)
        for number, i in enumerate(last):
            if 0 <= i < len(steps):
                steps[i].dead += (number,)
        self._born, self._last, self._last_write = born, last, last_write
        self.cuts = [i for i in sorted(set(self.first.values())) if self.can_stop(i)]

    def can_stop(self, cut: int) -> bool:
        """Whether what is written later can be copied: it shares its memory with nothing else that is needed."""
        roots = [self._notes[number].root for number in self.live(cut)]
        copied = [self._notes[number] for number in self._copied(cut)]
        return all(roots.count(note.root) == 1 and note.dense for note in copied)

    def live(self, cut: int) -> list[int]:
        """The tensors made before a step and needed from there on."""
        return [number for number, born in enumerate(self._born) if born < cut <= self._last[number]]

    def _copied(self, cut: int) -> list[int]:
        return [number for number in self.live(cut) if self._last_write.get(self._notes[number].root, -1) >= cut]

    def kept_bytes(self, cuts: Collection[int]) -> int:
        """Memory of what :meth:`play` keeps at some cuts."""
        copied = {cut: set(self._copied(cut)) for cut in cuts}
        kept = {(number, cut if number in copied[cut] else -1) for cut in cuts for number in self.live(cut)}
        return sum(self._notes[number].bytes for number, _ in kept)

    def live_bytes(self, cut: int) -> int:
        """Memory of what a run that stands before a step holds."""
        roots = {self._notes[number].root for number in self.live(cut)}
        return sum(self._notes[root].bytes for root in roots)

    def copy(self, values: Values, cut: int) -> Values:
        """What a run can go on with from a step that it has to go on from again later."""
        copied = set(self._copied(cut))
        return {n: x.clone() if n in copied else x for n, x in values.items()}

    def advance(self, values: Values, start: int, stop: int) -> None:
        """Run the steps from ``start`` to ``stop``; ``values`` then is what is needed from there on."""
        for step in self._steps[start:stop]:
            step(values, {})

    def output(self, values: Values) -> Tensor:
        """The output, after the last step."""
        return values[self._output]

    def start(self, inputs: list[Tensor]) -> Values:
        """What a run from the first step on begins with: copies of the input tensors."""
        return {n: x.clone() for n, x in zip(self._inputs, inputs, strict=True) if self._last[n] >= 0}

    def play(
        self,
        units: Mapping[str, Callable[[Tensor], Tensor]],
        values: Values,
        start: int = 0,
        *,
        keep: Collection[int] = (),
        kept: dict[int, Values] | None = None,
        until: int | None = None,
    ) -> Tensor:
        """Run the steps from ``start`` on.

        Args:
            units: what to call for the modules that were followed, by name.
            values: what is kept at ``start``, or :meth:`start`; is not changed.
            start: first step.
            keep: cuts at which to keep the tensors that are needed from there on.
            kept: where to keep them.
            until: keep nothing behind this step.

        Returns:
            The output.
        """
        values, end = self.copy(values, start) if start else dict(values), self.end if until is None else until
        for i in range(start, self.end):
            if kept is not None and i in keep and start < i <= end and i not in kept:
                kept[i] = self.copy(values, i)
            self._steps[i](values, units)
        return values[self._output]


def _laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor as the network lays it out in memory, for views of it."""
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
