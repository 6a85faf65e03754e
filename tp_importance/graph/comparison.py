"""Run a pruned copy beside the masked network and find every place where they differ, in one pass each.

What arrives at a layer of the copy is compared with what arrived in the masked network, and then *replaced* by it, without
the channels that are gone. So no error travels: each shows at the place where it is made, and nowhere else. An
operation that raises ends nothing, either: the groups that meet there are put back (the masked network has zeros in their
channels, and so have the inputs set right), and the smallest module around is run again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..core.batches import tensors_in
from ..core.copies import copied
from ..core.forward import fresh_inputs, layer_input, with_input
from ..core.guards import HOOKS
from ..core.untouched import untouched
from .blame import Blame, Finding
from .channel_axes import channel_dim
from .counting import CallRecorder, batch_size
from .groups import Index, PrunableGroups
from .layer_kinds import COUNTED, is_batch_norm, is_depthwise
from .masking import masked_units
from .provenance import Provenance

__all__ = ["MEMORY", "Comparison", "Outcome", "Removal", "difference", "scrambled_copy"]

Run = Callable[[nn.Module, Any], Any]
Cut = Callable[[nn.Module, Mapping[str, list[int]]], None]

PATIENCE = 3
"""How many passes' worth of layers the pruned copy may run, when parts of it are repeated after errors."""


def scrambled_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy whose batch norms do something: at their initial values a wrong surgery can look right.

    In ``dtype``, or where that is ``None`` in float32 for what is of half precision.
    """
    halves = (torch.float16, torch.bfloat16)
    twin = copied(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and (dtype is not None or parameter.dtype in halves):
                parameter.data = parameter.data.to(dtype or torch.float32)
        for buffer_owner in twin.modules():
            for key, buffer in buffer_owner.named_buffers(recurse=False):
                if buffer.is_floating_point() and (dtype is not None or buffer.dtype in halves):
                    setattr(buffer_owner, key, buffer.to(dtype or torch.float32))
            norm = is_batch_norm(buffer_owner) or isinstance(buffer_owner, nn.modules.instancenorm._InstanceNorm)
            for key, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)) if norm else ():
                value = getattr(buffer_owner, key)
                if isinstance(value, Tensor):
                    shape = value.shape
                    value.copy_(torch.rand(shape, generator=generator) * (high - low) + low)
    return twin


def difference(a: Tensor, b: Tensor, tolerance: float) -> str | None:
    """How ``b`` differs from ``a`` by more than ``tolerance`` times the largest value of ``a``, or ``None``."""
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)} after removal, {tuple(a.shape)} masked"
    if not a.is_floating_point() and not a.is_complex():  # masks, argmax
        return None if torch.equal(a, b) else f"{a.dtype} values differ"
    scale = float(a.abs().max()) if a.numel() else 0.0
    error = float((a - b).abs().max()) if a.numel() else 0.0
    if not error <= tolerance * max(scale, 1e-30):  # NaN counts as a difference
        return f"differs by {error:.2g} on a scale of {scale:.2g}"
    return None


class _StrongNeighbours(TorchFunctionMode):
    """Lets local response norms be felt: as usually set, neighbours move a channel by less than the tolerance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.local_response_norm:
            args, kwargs = args[:2], {**kwargs, "alpha": 1.0, "beta": 0.75, "k": 1.0}
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Removal:
    """Units that go, and what that leaves of the inputs of the layers.

    Attributes:
        groups: the groups.
        units: that go, by group.
        kept: positions that are left in the input of each layer that loses some.
        widths: of these inputs in the dense network.
    """

    groups: PrunableGroups
    units: Mapping[str, list[int]]
    kept: dict[str, Tensor] = field(init=False, default_factory=dict)
    widths: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        modules = dict(self.groups.trace.model.named_modules())
        gone: dict[str, list[Index]] = defaultdict(list)
        for name, units in self.units.items():
            for m in self.groups[name].members:
                if m.axis is None and m.name in modules and (m.role == "in" or is_depthwise(modules[m.name])):
                    gone[m.name].append(m.positions(units))
                    self.widths[m.name] = m.width
        for name, positions in gone.items():
            left = np.setdiff1d(np.arange(self.widths[name]), np.concatenate(positions))
            self.kept[name] = torch.as_tensor(left)

    def without(self, names: set[str]) -> Removal:
        """The same, but all units of some groups stay."""
        return Removal(self.groups, {name: units for name, units in self.units.items() if name not in names})


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a comparison has found.

    Attributes:
        findings: the places that differ, each by itself, in the order in which they came up.
        compared: the layers whose inputs were compared.
        macs: multiply-accumulates of the pruned copy per sample, if nothing differs.
        pruned: the copy.
    """

    findings: list[Finding]
    compared: set[str] = field(default_factory=set)
    macs: int = 0
    pruned: nn.Module | None = None


class Comparison:
    """A masked network, and pruned copies that are compared with it.

    Args:
        groups: groups of the model as it is now.
        original: a copy of it, which is masked.
        example_inputs: inputs to compare on.
        run: ``run(model, example_inputs)``.
        cut: prunes a copy of ``original``.
        gated: groups that say where is masked.
        tolerance: largest difference, relative to the largest value.
        blame: says which groups to put back after an error.
    """

    def __init__(
        self,
        groups: PrunableGroups,
        original: nn.Module,
        example_inputs: Any,
        run: Run,
        cut: Cut,
        gated: PrunableGroups,
        tolerance: float,
        blame: Blame | None = None,
    ) -> None:
        self.groups, self.gated, self.original = groups, gated, original
        self.example_inputs, self.run, self.cut = example_inputs, run, cut
        self.tolerance, self.blame = tolerance, blame or Blame(groups)
        self._consumers = {m.name for g in groups for m in g.consumers}

    def compare(self, units: Mapping[str, list[int]], *, resume: bool = False) -> Outcome:
        """Compare the network whose ``units`` are masked with a copy that has lost them.

        Args:
            units: that go, by group.
            resume: go on after operations that raise.
        """
        removal = Removal(self.groups, units)
        pruned = copied(self.original)
        try:
            self.cut(pruned, units)
            with torch.no_grad():
                reference = self._masked(removal)
        except MEMORY:
            raise
        except Exception as error:
            return Outcome([Finding("", f"pruning a copy fails: {_said(error)}", "surgery")])
        with torch.no_grad():
            return _Pass(self, pruned, removal, reference, resume).outcome()

    def unsteady(self, units: Mapping[str, list[int]], noise: float) -> set[str]:
        """Places where the masked network itself differs from itself by more than the tolerance under a little noise.

        Args:
            units: that are masked, by group.
            noise: standard deviation, relative to the largest value of the input of each layer.
        """
        removal = Removal(self.groups, units)
        with torch.no_grad():
            reference = self._masked(removal)
            with masked_units(self.original, self.gated, units):
                everything = removal.without({*units})
                found = _Pass(self, self.original, removal, reference, False, everything, noise).outcome()
        return {finding.where for finding in found.findings}

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The layers whose inputs are compared: convolutions, linear layers, and whatever else reads a group."""
        for name, module in model.named_modules():
            if (isinstance(module, COUNTED) or name in self._consumers) and not isinstance(module, nn.MultiheadAttention):
                yield name, module

    def _masked(self, removal: Removal) -> _Reference:
        reference = _Reference(removal)

        def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
            x = layer_input(args, kwargs)
            if not isinstance(x, Tensor):
                return None
            reference.add(name, module, x)
            planted = self.gated is not self.groups and name in removal.kept
            # so that a planted error does not travel either: the layer sees what the pruned copy will see
            return with_input(args, kwargs, reference.full(name, module, -1)) if planted else None

        with untouched(self.original), masked_units(self.original, self.gated, removal.units), ExitStack() as stack:
            self.original.eval()
            stack.enter_context(_StrongNeighbours())
            for name, module in self.layers(self.original):
                stack.enter_context(_before(module, name, note))  # after the masks, which are prepended
            output = self.run(self.original, fresh_inputs(self.example_inputs))
            reference.outputs = tensors_in(output)
        return reference


class _Reference:
    """What arrives at the layers of the masked network, without what is masked, and its outputs."""

    def __init__(self, removal: Removal) -> None:
        self.removal = removal
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: list[Tensor] = []

    def add(self, name: str, module: nn.Module, x: Tensor) -> None:
        kept = self.removal.kept.get(name)
        x = x.detach()
        x = x.clone() if kept is None else x.index_select(x.dim() + channel_dim(module), kept.to(x.device))
        self.inputs[name].append(x)

    def full(self, name: str, module: nn.Module, call: int, kept: Tensor | None = None) -> Tensor:
        """The input in one call, on the positions ``kept``, by default all; zeros where it was masked."""
        x, own = self.inputs[name][call], self.removal.kept.get(name)
        if own is None or (kept is not None and len(kept) == len(own)):
            return x.clone()  # a layer may write into it
        dim = x.dim() + channel_dim(module)
        shape = [*x.shape[:dim], self.removal.widths[name], *x.shape[dim + 1 :]]
        wide = x.new_zeros(shape).index_copy_(dim, own.to(x.device), x)
        return wide if kept is None else wide.index_select(dim, kept.to(x.device))


class _Pass:
    """One pass of a pruned copy."""

    def __init__(
        self,
        comparison: Comparison,
        model: nn.Module,
        removal: Removal,
        reference: _Reference,
        resume: bool,
        left: Removal | None = None,
        noise: float = 0.0,
    ) -> None:
        self.comparison, self.model, self.reference, self.noise = comparison, model, reference, noise
        self.removal, self.left = removal, left or removal
        self.findings: dict[tuple[str, int], Finding] = {}
        self.calls: Counter[str] = Counter()
        self.restored: set[str] = set()
        self.names = Provenance(model)
        self._resume, self._noted = resume, None
        self._left_calls = PATIENCE * sum(map(len, reference.inputs.values()))
        self._generator = torch.Generator().manual_seed(0)

    def outcome(self) -> Outcome:
        model, comparison = self.model, self.comparison
        recorder = CallRecorder(model)
        try:
            with untouched(model), ExitStack() as stack:
                model.eval()
                stack.enter_context(_StrongNeighbours())
                self._watch(stack)
                stack.enter_context(self.names)
                inputs = comparison.example_inputs

                def whole() -> Any:
                    return recorder.run(model, fresh_inputs(inputs), comparison.run)

                output = self._repeated("", whole, True, ())
        except MEMORY:
            raise
        except Exception as error:
            self._note(error, "")
        else:
            self._compare_outputs(output)
            if self.calls != {name: len(xs) for name, xs in self.reference.inputs.items()}:
                self.findings["calls", 0] = Finding("", "the pruned copy calls its layers otherwise", "calls")
        finally:
            recorder.remove()
        found = [f for f in self.findings.values() if f.kind == "error" or not self._explained(f)]
        macs = 0 if self.findings else recorder.per_sample(batch_size(comparison.example_inputs))
        return Outcome(found, set(self.reference.inputs), macs, model)

    def _explained(self, finding: Finding) -> bool:
        """Whether a group that was put back meets there: its channels have values where the masked network has zeros."""
        return bool(self.comparison.blame.meeting(finding, self.restored))

    # -- what is compared

    def _watch(self, stack: ExitStack) -> None:
        layers = dict(self.comparison.layers(self.model))
        for name, module in self.model.named_modules():
            if name in layers:
                stack.enter_context(_before(module, name, self._arrive))
            stack.callback(module.register_forward_hook(_after(name, name in layers, self.names), with_kwargs=True).remove)
            if self._resume and name:
                whole = isinstance(module, COUNTED) or not module._modules
                module.forward = self._resuming(name, module.forward, not whole)  # taken back by untouched()

    def _arrive(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x, call = layer_input(args, kwargs), self.calls[name]
        if not isinstance(x, Tensor):
            return None
        self.calls[name] += 1
        self._left_calls -= 1
        if call >= len(self.reference.inputs.get(name, ())):
            return None
        with torch._C.DisableTorchFunction():
            kept = self.left.kept.get(name)
            expected = self.reference.full(name, module, call, kept)
            self._compare(f"input of {name}", expected, x, (name, call), name, x.dim() + channel_dim(module), kept)
            if self.noise and expected.is_floating_point():
                scale = self.noise * float(expected.abs().max()) if expected.numel() else 0.0
                noise = torch.randn(expected.shape, generator=self._generator, dtype=expected.dtype)
                expected = expected + scale * noise.to(expected.device)
        self.names.assign(expected, ())
        return with_input(args, kwargs, expected)

    def _compare_outputs(self, output: Any) -> None:
        outputs = tensors_in(output)
        if len(outputs) != len(self.reference.outputs):
            problem = f"{len(outputs)} tensors after removal, {len(self.reference.outputs)} masked"
            self.findings["", -1] = Finding("output of the network", problem, "shape", sources=self.names.of(output))
            return
        for i, (a, b) in enumerate(zip(self.reference.outputs, outputs, strict=True)):
            self._compare("output of the network", a, b, ("", i), None, None, None)

    def _compare(
        self, where: str, a: Tensor, b: Tensor, key: tuple[str, int], layer: str | None, dim: int | None, kept: Any
    ) -> None:
        problem = difference(a, b, self.comparison.tolerance)
        if problem is None or key in self.findings:
            return
        same, positions = a.shape == b.shape, None
        if same and dim is not None and a.is_floating_point():
            far = ~((a - b).abs() <= self.comparison.tolerance * a.abs().max().clamp(min=1e-30))
            at = far.transpose(0, dim).flatten(1).any(1).nonzero().flatten().cpu()
            positions = (at if kept is None else kept[at]).numpy()
        kind = "value" if same else "shape"
        self.findings[key] = Finding(where, problem, kind, layer, positions, self.names.of(b))

    # -- what raises

    def _resuming(self, name: str, forward: Any, again: bool) -> Any:
        def resumed(*args: Any, **kwargs: Any) -> Any:
            return self._repeated(name, lambda: forward(*args, **kwargs), again, (args, kwargs))

        return resumed

    def _repeated(self, name: str, forward: Callable[[], Any], again: bool, given: Any) -> Any:
        """Run a module, once more whenever that raises and groups were put back since."""
        before = [(t, t._version) for t in tensors_in(given) if not t.is_inference()] if self._resume else []
        calls = Counter(self.calls)
        while True:
            restored = len(self.restored)
            try:
                return forward()
            except MEMORY:
                raise
            except Exception as error:
                self._note(error, name)
                spoilt = any(t._version != version for t, version in before)  # in place
                if not again or spoilt or len(self.restored) == restored or self._left_calls < 0:
                    raise
                self.calls = Counter(calls)

    def _note(self, error: Exception, name: str) -> None:
        """Write down what raised, once, and put the groups back that meet there."""
        if error is self._noted:
            return
        self._noted = error
        where = f"{self.names.operation} in {name}" if name else self.names.operation
        problem = f"fails with {_said(error)}"
        finding = Finding(where, problem, "error", name, None, self.names.read)
        self.findings["error", len(self.findings)] = finding
        if self._resume:
            suspects = self.comparison.blame.first(finding, {*self.left.units})
            if suspects:
                self._restore({*suspects})

    def _restore(self, names: set[str]) -> None:
        """Take over everything from a copy in which some groups have all their units."""
        self.restored |= names
        self.left = self.left.without(names)
        wider = copied(self.comparison.original)
        with torch._C.DisableTorchFunction():
            self.comparison.cut(wider, self.left.units)
        for module, twin in zip(self.model.modules(), wider.modules(), strict=True):
            module._parameters, module._buffers = twin._parameters, twin._buffers
            for key, value in vars(twin).items():
                if key not in _OWN and not any(isinstance(v, nn.Module) for v in tree_leaves(value)):
                    vars(module)[key] = value
        self.names.know(self.model)


MEMORY = (torch.OutOfMemoryError, MemoryError)
"""Says nothing about the groups."""

_OWN = {*HOOKS, "_modules", "_parameters", "_buffers", "forward", "_forward_hooks_always_called"}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def _before(module: nn.Module, name: str, hook: Callable[..., Any]) -> AbstractContextManager[None]:
    stack = ExitStack()

    def call(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return hook(name, module, args, kwargs)

    stack.callback(module.register_forward_pre_hook(call, with_kwargs=True).remove)
    return stack


def _after(name: str, restart: bool, names: Provenance) -> Callable[..., None]:
    """What a module returns is made of it alone if its input was set right; and if nobody saw how it was made."""

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if restart:
            names.assign(output, {name})
            return
        for tensor in tensors_in(output):
            if not names.knows(tensor):
                names.assign(tensor, names.of((args, kwargs)) | {name})

    return hook
