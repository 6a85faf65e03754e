"""What goes into one layer after the other, in the dense network and in the one pruned and refitted so far.

:class:`ReplayedPasses` run both networks piece by piece: all samples up to a layer, then, once it has its new weights,
on to the next. :class:`WholePasses` run them from the start for every layer, cut off there; that serves any network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.batches import FlatBatch, tensors_in
from ..core.chunks import Chunks
from ..core.forward import ForwardFn, fresh_inputs, run_batch
from ..core.precision import at_least_float, undisturbed
from ..errors import TracingError
from ..graph.activations import watch_activations
from ..graph.comparison import difference
from ..graph.dataflow import Flow
from ..graph.recorder import Recorder
from ..graph.tape import NotReplayable, Tape, Values
from .hooks import after_layer, run_until_cut

__all__ = ["Networks", "Passes", "ReplayedPasses", "Seen", "Stop", "WholePasses"]

TOLERANCE = 1e-3
"""Largest difference of outputs between the network and its replay, relative to the largest output."""


@dataclass(frozen=True)
class Stop:
    """A layer that is looked at.

    Attributes:
        name: of the layer.
        added: number of a tensor of the recorded network that is wanted, too, if any.
        repeated: whether it runs more than once per pass.
    """

    name: str
    added: int | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Seen:
    """A layer is about to run.

    Attributes:
        x: its input, float32 if it is of half precision.
        shape: of its output.
        added: the other tensor that is wanted.
    """

    x: Tensor
    shape: tuple[int, ...]
    added: Tensor | None = None


Both = tuple[list[Seen], list[Seen]]
"""All calls of a layer on one batch, in the dense and in the pruned network."""


class Passes(Protocol):
    """Two networks on the same batches.

    Attributes:
        stops: layers that run, in their order.
        count: passes over the data that all of them take, cut-off ones included.
    """

    stops: list[Stop]
    count: int

    def at(self, stop: Stop) -> Iterator[tuple[Any, Both]]:
        """Per batch, what was noted of it, and what a layer is about to get in either network.

        Layers come in the order in which they run, and what comes before one is final.
        """
        ...


@dataclass(frozen=True)
class Networks:
    """Two networks, what is looked at in them, and on which batches.

    Attributes:
        dense: a copy of the network.
        pruned: the network, masked; its layers may get new weights, in place.
        stops: layers to be looked at, in the order in which they first run.
        flow: operations of the network, if tensors inside of it are wanted.
        chunks: re-iterable batches.
        note: what to remember of a batch.
        forward_fn: ``forward_fn(model, batch)``.
    """

    dense: nn.Module
    pruned: nn.Module
    stops: Sequence[Stop]
    flow: Flow | None
    chunks: Chunks
    note: Callable[[Any], Any]
    forward_fn: ForwardFn | None = None


class WholePasses:
    """Two passes for every layer, cut off there.

    Args:
        given: the networks.

    Raises:
        ValueError: in a pass in which ``given.flow`` does not hold.
    """

    def __init__(self, given: Networks) -> None:
        self._given, self.stops, self.count = given, list(given.stops), 2 * len(given.stops)

    def at(self, stop: Stop) -> Iterator[tuple[Any, Both]]:
        """See :class:`Passes`."""
        dense, pruned = self._given.dense, self._given.pruned
        for chunk in self._given.chunks:
            yield self._given.note(chunk), (self._seen(dense, stop, chunk), self._seen(pruned, stop, chunk))

    def _seen(self, model: nn.Module, stop: Stop, chunk: Any) -> list[Seen]:
        calls: list[Seen] = []
        added: list[Tensor] = []

        def see(x: Tensor, out: Tensor) -> None:
            calls.append(Seen(x.clone(), tuple(out.shape), added[-1] if added else None))

        with ExitStack() as stack:
            stack.callback(after_layer(model.get_submodule(stop.name), see, not stop.repeated))
            if stop.added is not None and self._given.flow is not None:
                watches = {stop.added: lambda x: added.append(at_least_float(x).clone())}
                stack.enter_context(watch_activations(model, self._given.flow, watches))
            try:
                run_until_cut(model, chunk, self._given.forward_fn)
            except TracingError as error:
                raise ValueError(
                    f"{error}: its control flow depends on the data; pass Refit(residual=False)"
                ) from error
        return calls


@dataclass
class _Chunk:
    """One batch: the recorded operations of both networks, what was noted of it, and if it is what was recorded."""

    tapes: tuple[Tape, Tape]
    note: Any
    own: bool = True


class ReplayedPasses:
    """Both networks as recorded operations, which are run from layer to layer; see :class:`Passes`.

    What has to be known of all samples to go on is kept where it fits into memory. Until it does, at the first layers
    of a network for large images, the pieces begin where it did last, or with the batches themselves.

    Args:
        given: the networks, in which no stop is repeated.
        limit: bytes that may be kept.

    Raises:
        NotReplayable: where that is not the same as running the networks.
        ValueError: if there is no batch.
    """

    def __init__(self, given: Networks, limit: int) -> None:
        self._given, self.stops = given, list(given.stops)
        self._known: dict[Any, tuple[Tape, Tape]] = {}
        self._order: list[str] | None = None
        self._chunks = [self._chunk(batch) for batch in given.chunks]
        if not self._chunks:
            raise ValueError(
                "the loader gave no batch; a re-iterable of batches is needed (a generator runs only once)"
            )
        order: list[str] = self._order or []
        self.stops = sorted((s for s in self.stops if s.name in order), key=lambda s: order.index(s.name))
        self._keeps = self._kept_at(limit)
        self.count = 2 * (len(self._keeps) - sum(self._keeps))
        self._state: list[tuple[_Chunk, Values, Values]] | None = None  # at the stop `_at`
        self._at = -1

    # -- recording

    def _chunk(self, batch: Any) -> _Chunk:
        flat = FlatBatch.of(batch)
        form = None if flat is None else (str(flat.form), *((tuple(t.shape), t.dtype, t.device) for t in flat.tensors))
        if form is None:
            return _Chunk(self._recorded(batch, False), self._given.note(batch))
        if form in self._known:
            return _Chunk(self._known[form], self._given.note(batch), False)
        try:
            self._known[form] = self._recorded(batch, True)
        except NotReplayable:  # Python looks at the batch: operations are those of this one only
            return _Chunk(self._recorded(batch, False), self._given.note(batch))
        return _Chunk(self._known[form], self._given.note(batch))

    def _recorded(self, batch: Any, others: bool) -> tuple[Tape, Tape]:
        dense, pruned = (self._record(network, batch, others) for network in (self._given.dense, self._given.pruned))
        for tape in (dense, pruned):
            order = sorted(tape.marks, key=lambda name: tape.marks[name].step)
            self._order = order if self._order is None else self._order
            if order != self._order:
                raise NotReplayable("batches go through the layers in different orders")
            for stop in self.stops:
                mark = tape.marks.get(stop.name)
                if mark and stop.added is not None and tape.named.get(stop.added, -1) not in tape.live(mark.step):
                    raise NotReplayable(f"what {stop.name} is added to is not there when it runs")
        return dense, pruned

    def _record(self, model: nn.Module, batch: Any, others: bool) -> Tape:
        batch = fresh_inputs(batch)
        torch.clear_autocast_cache()  # a weight that is cast only once would not be cast anew
        recorder = Recorder(tensors_in(batch), others)
        wanted = {stop.added for stop in self.stops if stop.added is not None}
        try:
            with ExitStack() as stack:
                if wanted and self._given.flow is not None:
                    watches = {value: partial(recorder.name, value) for value in wanted}
                    stack.enter_context(watch_activations(model, self._given.flow, watches))
                for stop in self.stops:
                    recorder.mark(stack, stop.name, model.get_submodule(stop.name))
                stack.enter_context(recorder)
                output = run_batch(model, batch, self._given.forward_fn)
        except NotReplayable:
            raise
        except Exception as error:  # if it is the network's own, it comes again without the recording
            raise NotReplayable(f"recording raised {type(error).__name__}: {error}") from error
        return recorder.tape(output)[0]

    def _kept_at(self, limit: int) -> list[bool]:
        """Whether what has to be known is kept at every stop."""
        fits, whole = list[bool](), list[bool]()
        for stop in self.stops:
            tapes = [(tape, tape.marks[stop.name].step) for c in self._chunks for tape in c.tapes]
            needed = {(id(tape), step): (tape.live_bytes(step), tape.can_stop(step)) for tape, step in set(tapes)}
            fits.append(sum(needed[id(tape), step][0] for tape, step in tapes) <= limit)
            whole.append(all(can_stop for _, can_stop in needed.values()))
        keeps = [False] * len(fits)
        for k in reversed(range(len(fits) - 1)):  # what cannot be copied must be taken over as it is
            keeps[k] = fits[k] and (whole[k] or keeps[k + 1] or k + 2 == len(fits))
        return keeps

    # -- running

    def at(self, stop: Stop) -> Iterator[tuple[Any, Both]]:
        """See :class:`Passes`."""
        k = self.stops.index(stop)
        state: list[tuple[_Chunk, Values, Values]] = []
        for chunk, *values in self._begun(self._keeps[k] or k + 1 == len(self.stops)):
            seen = []
            for tape, mine in zip(chunk.tapes, values, strict=True):
                mark = tape.marks[stop.name]
                self._advance(tape, mine, self._step(tape, self._at), mark.step)
                added = None if stop.added is None else at_least_float(mine[tape.named[stop.added]])
                seen.append([Seen(at_least_float(mine[mark.number]), mark.shape, added)])
            yield chunk.note, (seen[0], seen[1])
            if self._keeps[k]:
                state.append((chunk, values[0], values[1]))
        if self._keeps[k]:
            self._state, self._at = state, k

    def check(self) -> None:
        """Compare the pruned network, as it is now, with what was recorded.

        Raises:
            NotReplayable: if they differ: the network does something out of sight of torch.
        """
        last, chosen = None, None
        for batch, chunk in self._started():  # one that was not recorded tells more
            if chosen is None or chosen.own or not chunk.own:
                last, chosen = batch, chunk
            if not chosen.own:
                break
        if chosen is None:
            raise NotReplayable("the loader gives no batches any more")
        tape = chosen.tapes[1]
        values = tape.start(tensors_in(fresh_inputs(last)))
        self._advance(tape, values, 0, tape.end)
        output = run_batch(self._given.pruned, last, self._given.forward_fn)
        if reason := difference(tensors_in(output)[0], tape.output(values), TOLERANCE):
            raise NotReplayable(f"the replayed output {reason}")

    def _started(self) -> Iterator[tuple[Any, _Chunk]]:
        """All batches; where they come from the loader again, it may have shuffled them."""
        if self._given.chunks.kept is not None:
            yield from zip(self._given.chunks.kept, self._chunks, strict=True)
        else:
            yield from ((batch, self._chunk(batch)) for batch in self._given.chunks)

    def _begun(self, moves: bool) -> Iterator[tuple[_Chunk, Values, Values]]:
        """Both networks, per chunk, where they can be taken up."""
        if self._state is None:
            for batch, chunk in self._started():
                dense, pruned = (tape.start(tensors_in(fresh_inputs(batch))) for tape in chunk.tapes)
                yield chunk, dense, pruned
            return
        state = self._state[::-1]
        if moves:
            self._state = []
        while state:
            chunk, dense, pruned = state.pop()
            if not moves:
                both = zip(chunk.tapes, (dense, pruned), strict=True)
                dense, pruned = (tape.copy(values, self._step(tape, self._at)) for tape, values in both)
            yield chunk, dense, pruned

    def _step(self, tape: Tape, k: int) -> int:
        return 0 if k < 0 else tape.marks[self.stops[k].name].step

    def _advance(self, tape: Tape, values: Values, start: int, stop: int) -> None:
        device = next(iter(values.values())).device if values else torch.device("cpu")
        try:
            with undisturbed(device):  # casts are among the operations
                tape.advance(values, start, stop)
        except Exception as error:
            raise NotReplayable(f"replaying raised {type(error).__name__}: {error}") from error
