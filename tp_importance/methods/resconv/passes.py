"""What the network's output loses with one layer more, for as little of the network run as possible."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...core.batches import tensors_in
from ...core.forward import ForwardFn, fresh_inputs, run_batch
from ...core.loaders import iterate
from ...core.progress import phase, track
from ...graph.comparison import difference
from ...graph.recorder import record_tape
from ...graph.tape import NotReplayable, Tape, Values
from .block import ResConv2d

__all__ = ["Passes", "ReplayedPasses", "WholePasses", "passes_of"]

KEPT_BYTES = 1 << 30
"""Memory for batches and for activations from which passes are taken up again."""
TOLERANCE = 1e-3
"""Largest difference of outputs between the network and its replay, relative to the largest output."""

Unit = Callable[[Tensor], Tensor]


class Passes(Protocol):
    """A network from which layers go one by one.

    Attributes:
        sizes: per batch the squared output of the network, summed.
        samples: per batch how many there are.
    """

    sizes: list[float]
    samples: list[int]

    def changes(self, name: str, start: int = 0) -> Generator[float]:
        """Per batch, from ``start`` on, the squared change of the output if one layer more goes.

        The network is as before once the generator is closed.
        """
        ...

    def remove(self, name: str) -> None:
        """Leave out a layer for good."""
        ...


def passes_of(
    model: nn.Module,
    layers: Mapping[str, ResConv2d],
    controls: Mapping[str, float],
    batches: Iterable[Any],
    run: ForwardFn | None,
) -> Passes:
    """Replayed passes where they are right, else whole ones; the log says which, and why.

    The caller sees to it that the network is in eval mode, without gradients, and as before at the end.

    Args:
        model: the network.
        layers: its residual convolutions by name.
        controls: what each hands on once it is removed.
        batches: re-iterable, in a fixed order.
        run: ``forward_fn(model, batch)``.
    """
    with phase("recording the network", length_hint(batches) or None, unit="batch") as running:
        on_cpu = all(p.device.type == "cpu" for layer in layers.values() for p in layer.parameters())
        for channels_last in (True, False) if on_cpu else (False,):
            try:
                return ReplayedPasses(model, layers, controls, batches, run, channels_last, running.advance)
            except NotReplayable as error:
                reason = error
        running.note(whole_passes=f"because {reason}")
    return WholePasses(model, layers, controls, batches, run)


class WholePasses:
    """Runs the network as it is; see :func:`passes_of`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, ResConv2d],
        controls: Mapping[str, float],
        batches: Iterable[Any],
        run: ForwardFn | None,
    ) -> None:
        self._model, self._layers, self._controls = model, layers, controls
        self._batches, self._run = batches, run
        self._dense: list[Tensor] = []
        self.samples = list[int]()
        for batch in track(iterate(batches), "running the network", length_hint(batches) or None, unit="batch"):
            self._dense.append(_first(run_batch(model, batch, run)))
            self.samples.append(_length(self._dense[-1]))
        self.sizes = [float(y.square().sum()) for y in self._dense]

    def changes(self, name: str, start: int = 0) -> Generator[float]:
        """See :class:`Passes`."""
        layer = self._layers[name]
        s, a = layer.s.item(), layer.a.item()
        self.remove(name)
        try:
            pairs = zip(iterate(self._batches), self._dense, strict=True)
            for batch, dense in islice(pairs, start, None):
                yield float((_first(run_batch(self._model, batch, self._run)) - dense).square().sum())
        finally:
            set_factors(layer, s, a)

    def remove(self, name: str) -> None:
        """See :class:`Passes`."""
        set_factors(self._layers[name], 0.0, self._controls[name])


@dataclass
class _Batch:
    """One batch: its operations, its tensors unless the loader is asked again, and activations to go on from."""

    tape: Tape
    inputs: list[Tensor] | None
    recorded: Tensor | None
    keep: set[int] = field(default_factory=set)
    kept: dict[int, Values] = field(default_factory=dict)
    dense: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))

    def output(self, units: Mapping[str, Unit], changed: str, inputs: list[Tensor]) -> Tensor:
        """The output; a layer that may differ from the last call's is run anew, with all that comes after it."""
        first = self.tape.first.get(changed, self.tape.end)
        start = max((cut for cut in self.kept if cut <= first), default=0)
        values = self.kept[start] if start else self.tape.start(inputs)
        return self.tape.play(units, values, start, keep=self.keep, kept=self.kept, until=first)

    def forget(self, changed: str) -> None:
        """Activations behind a layer are others now."""
        first = self.tape.first.get(changed, self.tape.end)
        self.kept = {cut: values for cut, values in self.kept.items() if cut <= first}


class ReplayedPasses:
    """Runs the recorded operations from the first layer on that differs; see :func:`passes_of`.

    Layers that stay are fused for it, and those that are gone are one multiplication. Images can be laid out with the
    channels last, which makes narrow convolutions on a CPU a fifth faster.

    Raises:
        NotReplayable: where that is not the same as running the network.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, ResConv2d],
        controls: Mapping[str, float],
        batches: Iterable[Any],
        run: ForwardFn | None,
        channels_last: bool,
        advance: Callable[[], None],
    ) -> None:
        self._loader, self._channels_last = batches, channels_last
        self._gone = {n: _multiplied(layer.a.new_tensor(controls[n]).item()) for n, layer in layers.items()}
        layout = torch.channels_last if channels_last else torch.preserve_format
        try:
            self._units: dict[str, Unit] = {n: layer.fused().to(memory_format=layout) for n, layer in layers.items()}
        except ValueError as error:
            raise NotReplayable(str(error)) from error
        self._batches: list[_Batch] = []
        left = KEPT_BYTES
        for batch in iterate(batches):
            fresh = self._laid_out(batch)
            inputs, again = tensors_in(fresh), partial(run_batch, model, fresh, run)
            tape, recorded = _recorded(again, inputs, layers)
            left -= sum(x.numel() * x.element_size() for x in inputs)
            self._batches.append(_Batch(tape, inputs if left >= 0 else None, recorded))
            if len(self._batches) == 1:
                self._check(layers, controls, again, inputs)
            advance()
        self._keep_activations(left)
        self.sizes, self.samples = list[float](), list[int]()
        for b, inputs in self._with_inputs():
            output = _replayed(b, self._units, "", inputs)
            if b.recorded is None or (reason := difference(b.recorded, output, TOLERANCE)):
                raise NotReplayable(f"the replayed output {reason}")
            b.dense, b.recorded = output.double(), None
            self.sizes.append(float(b.dense.square().sum()))
            self.samples.append(_length(b.dense))

    def changes(self, name: str, start: int = 0) -> Generator[float]:
        """See :class:`Passes`."""
        units = {**self._units, name: self._gone[name]}
        for b, inputs in islice(self._with_inputs(), start, None):
            yield float((b.output(units, name, inputs).double() - b.dense).square().sum())

    def remove(self, name: str) -> None:
        """See :class:`Passes`."""
        self._units[name] = self._gone[name]
        for b in self._batches:
            b.forget(name)

    def _with_inputs(self) -> Iterator[tuple[_Batch, list[Tensor]]]:
        if all(b.inputs is not None for b in self._batches):
            yield from ((b, b.inputs or []) for b in self._batches)
        else:
            for batch, b in zip(iterate(self._loader), self._batches, strict=True):
                yield b, tensors_in(self._laid_out(batch))

    def _laid_out(self, batch: Any) -> Any:
        fresh = fresh_inputs(batch)
        if not self._channels_last:
            return fresh

        def last(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

        return tree_map_only(Tensor, last, fresh)

    def _keep_activations(self, left: int) -> None:
        """Choose the cuts, evenly, as many as there is memory for."""
        if left < 0:  # not even the batches fit: the loader is asked for them every time
            for b in self._batches:
                b.inputs = None
            return
        for step in range(1, 1 + max((len(b.tape.cuts) for b in self._batches), default=0)):
            if sum(b.tape.kept_bytes(b.tape.cuts[::step]) for b in self._batches) <= left:
                for b in self._batches:
                    b.keep = set(b.tape.cuts[::step])
                return

    def _check(
        self,
        layers: Mapping[str, ResConv2d],
        controls: Mapping[str, float],
        run: Callable[[], Any],
        inputs: list[Tensor],
    ) -> None:
        """Compare with the network, every other layer left out: what torch does not see may depend on them."""
        b, names = self._batches[0], list(layers)[::2]
        before = {name: (layers[name].s.item(), layers[name].a.item()) for name in names}
        try:
            for name in names:
                set_factors(layers[name], 0.0, controls[name])
            expected = tensors_in(run())[0]
        finally:
            for name, factors in before.items():
                set_factors(layers[name], *factors)
        last, units = names[-1], {**self._units, **{name: self._gone[name] for name in names[:-1]}}
        first = b.tape.first.get(last, b.tape.end)
        b.keep = {max((cut for cut in b.tape.cuts if cut <= first), default=0)}
        _replayed(b, units, "", inputs)
        reason = difference(expected, _replayed(b, {**units, last: self._gone[last]}, last, inputs), TOLERANCE)
        b.keep, b.kept = set(), {}
        if reason:
            raise NotReplayable(f"the replayed output without {len(names)} layers {reason}")


@torch.no_grad()  # also in a generator that is closed elsewhere
def set_factors(layer: ResConv2d, s: float, a: float) -> None:
    """Give a layer other factors, in place."""
    layer.s.fill_(s)
    layer.a.fill_(a)


def _recorded(run: Callable[[], Any], inputs: list[Tensor], layers: Mapping[str, ResConv2d]) -> tuple[Tape, Tensor]:
    try:
        return record_tape(run, inputs, layers)
    except NotReplayable:
        raise
    except Exception as error:  # if it is the network's own, it comes again without the recording
        raise NotReplayable(f"recording raised {type(error).__name__}: {error}") from error


def _replayed(b: _Batch, units: Mapping[str, Unit], changed: str, inputs: list[Tensor]) -> Tensor:
    try:
        return b.output(units, changed, inputs)
    except Exception as error:
        raise NotReplayable(f"replaying raised {type(error).__name__}: {error}") from error


def _multiplied(factor: float) -> Unit:
    return lambda x: x * factor


def _first(output: Any) -> Tensor:
    return tensors_in(output)[0].double()


def _length(output: Tensor) -> int:
    return len(output) if output.dim() else 1
