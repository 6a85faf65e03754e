"""One pass of a pruned copy in which every place shows that differs from the masked network.

What arrives at a layer is compared with what arrived in the masked network, and then *replaced* by it, without the
channels that are gone. So no error travels: it shows where it is made, and nowhere else. What raises does not end the
pass, either: the groups that meet there are put back, and the smallest module around is run again. (The masked
network has zeros in their channels, and so have the inputs that are set right: all else stays comparable.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..core.batches import tensors_in
from ..core.forward import layer_input, with_input
from ..core.guards import HOOKS
from ..core.untouched import generators_restored
from .blame import Blame, Finding
from .channel_axes import channel_dim
from .comparison import StrongNeighbours, difference
from .counting import CallRecorder
from .layer_kinds import COUNTED
from .provenance import Provenance
from .reference import MEMORY, Reference, Removal

__all__ = ["PrunedPass", "said"]

PATIENCE = 3
"""How many passes' worth of layers may run, when parts are repeated."""

_OWN = {*HOOKS, "_modules", "_parameters", "_buffers", "forward"}
"""What a module keeps when it takes over what surgery has made of its twin."""


class PrunedPass:
    """Runs a pruned copy beside a :class:`.reference.Reference`.

    Args:
        model: the copy; what the pass leaves in it stays there.
        reference: of the masked network.
        run: runs the network.
        blame: knows which groups meet where.
        tolerance: largest difference, relative to the largest value.
        cut: makes another copy that has lost these units only; ``None``: what raises ends the pass.
        left: what ``model`` has lost; default: what is masked.
        noise: added to what the layers read: standard deviation, relative to its largest value.

    Attributes:
        findings: what differs, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        run: Callable[[nn.Module], Any],
        blame: Blame,
        tolerance: float,
        *,
        cut: Callable[[Removal], nn.Module] | None = None,
        left: Removal | None = None,
        noise: float = 0.0,
    ) -> None:
        self.model, self._reference, self._run = model, reference, run
        self._blame, self._tolerance, self._cut, self._noise = blame, tolerance, cut, noise
        self._left = left or reference.removal
        self._found: dict[tuple[str, int], Finding] = {}
        self._calls: Counter[str] = Counter()
        self._restored: set[str] = set()
        self._noted: Exception | None = None
        self._patience = PATIENCE * sum(map(len, reference.inputs.values()))
        self._generator = torch.Generator().manual_seed(0)
        self._names = Provenance(model)
        self._recorder = CallRecorder(model)
        try:
            self._pass()
        finally:
            self._recorder.remove()
        self.findings = [f for f in self._found.values() if f.kind == "error" or not self._explained(f)]

    def macs(self, samples: int, *, attention: bool = True) -> int:
        """Multiply-accumulates of one sample of a batch of ``samples``, if the pass was never interrupted.

        Args:
            samples: in the batch.
            attention: with products of data with data.
        """
        return self._recorder.per_sample(samples, attention=attention)

    def _pass(self) -> None:
        with generators_restored(self.model), StrongNeighbours(), ExitStack() as stack:
            self.model.eval()
            for name, module in self.model.named_modules():
                self._watch(stack, name, module)
            stack.enter_context(self._names)
            try:
                output = self._repeated("", partial(self._recorder.run, self.model, None, self._whole), None)
            except MEMORY:
                raise
            except Exception as error:
                self._note(error, "")
                return
            self._compare_outputs(tensors_in(output))
            if self._calls != {name: len(inputs) for name, inputs in self._reference.inputs.items()}:
                self._found["calls", 0] = Finding("", "the pruned copy calls its layers otherwise", "calls")

    def _whole(self, model: nn.Module, _inputs: Any) -> Any:
        return self._run(model)

    def _explained(self, finding: Finding) -> bool:
        """Whether a group that was put back meets there: it has values where the masked network has zeros."""
        return bool(self._restored and self._blame.meeting(finding, self._restored))

    # -- what differs

    def _watch(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        read = name in self._reference.inputs
        if read:
            arrive = partial(self._arrive, name)
            stack.callback(module.register_forward_pre_hook(arrive, with_kwargs=True).remove)
        leave = partial(self._leave, name, read)
        stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        if name:
            whole = self._cut is None or isinstance(module, COUNTED) or not module._modules
            wrap = self._noting if whole else self._repeating
            vars(module)["forward"] = wrap(name, module.forward)
            stack.callback(vars(module).pop, "forward")  # a cycle would keep the copy alive

    def _arrive(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x, call = layer_input(args, kwargs), self._calls[name]
        if not isinstance(x, Tensor):
            return None
        self._calls[name] += 1
        self._patience -= 1
        if call >= len(self._reference.inputs[name]):
            return None
        with torch._C.DisableTorchFunction():
            kept = self._left.kept.get((name, "in"))
            expected = self._reference.input(name, module, call, kept)
            finding = self._difference(f"input of {name}", expected, x, name, kept, channel_dim(module))
            if finding is not None:
                self._found.setdefault((name, call), finding)
            if self._noise and expected.numel() and expected.is_floating_point():
                noise = torch.randn(expected.shape, generator=self._generator, dtype=expected.dtype, device="cpu")
                expected = expected + self._noise * expected.abs().max() * noise.to(expected.device)
        self._names.assign(expected, ())
        return with_input(args, kwargs, expected)

    def _leave(self, name: str, read: bool, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """What a module returns is made by it alone if its input was set right; and if nobody saw how it was made."""
        if read:
            self._names.assign(output, {name})
            return
        for tensor in tensors_in(output):
            if not self._names.knows(tensor):
                self._names.assign(tensor, self._names.of((args, kwargs)) | {name})

    def _compare_outputs(self, outputs: list[Tensor]) -> None:
        where, expected = "output of the network", self._reference.outputs
        if len(outputs) != len(expected):
            problem = f"{len(outputs)} tensors after removal, {len(expected)} masked"
            self._found["", 0] = Finding(where, problem, "shape", sources=self._names.of(outputs))
            return
        for i, (a, b) in enumerate(zip(expected, outputs, strict=True)):
            finding = self._difference(where, a, b)
            if finding is not None:
                self._found["", i] = finding

    def _difference(
        self, where: str, a: Tensor, b: Tensor, layer: str | None = None, kept: Tensor | None = None, dim: int = 0
    ) -> Finding | None:
        problem = difference(a, b, self._tolerance)
        if problem is None:
            return None
        same, positions = a.shape == b.shape, None
        if same and layer is not None and a.is_floating_point():
            far = ~((a - b).abs() <= self._tolerance * a.abs().max().clamp(min=1e-30))
            at = far.movedim(dim, 0).flatten(1).any(1).nonzero().flatten().cpu()
            positions = (at if kept is None else kept[at]).numpy()
        return Finding(where, problem, "value" if same else "shape", layer, positions, self._names.of(b))

    # -- what raises

    def _noting(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except MEMORY:
                raise
            except Exception as error:
                self._note(error, name)
                raise

        return noting

    def _repeating(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._repeated(name, partial(forward, *args, **kwargs), (args, kwargs))

    def _repeated(self, name: str, forward: Callable[[], Any], given: Any) -> Any:
        """Run a module, and again whenever it raises and groups were put back since it began."""
        before = [(t, t._version) for t in tensors_in(given) if not t.is_inference()]
        calls = Counter(self._calls)
        while True:
            restored = len(self._restored)
            try:
                return forward()
            except MEMORY:
                raise
            except Exception as error:
                self._note(error, name)
                spoilt = any(t._version != version for t, version in before)  # by something in place
                if spoilt or len(self._restored) == restored or self._patience < 0:
                    raise
                self._calls = Counter(calls)

    def _note(self, error: Exception, name: str) -> None:
        """Write down what raised, once, and put the groups back that meet there."""
        if error is self._noted:
            return
        self._noted = error
        operation, read, raised = "", self._names.read, self._names.raised
        if raised is not None and raised[0] is error:  # not in Python code of the network
            operation, read = f" at {raised[1]}", raised[2]
        where = f"pruning a copy fails{operation} in {name or 'the network'}"
        finding = Finding(where, said(error), "error", name, None, read)
        self._found["error", len(self._found)] = finding
        suspects = self._blame.first(finding, self._left.units)
        if self._cut is not None and suspects:
            self._restored.update(suspects)
            self._left = self._left.without(suspects)
            self._take_over(self._cut(self._left))

    def _take_over(self, other: nn.Module) -> None:
        for module, twin in zip(self.model.modules(), other.modules(), strict=True):
            module._parameters, module._buffers = twin._parameters, twin._buffers
            for key, value in vars(twin).items():
                if key not in _OWN and not any(isinstance(v, nn.Module) for v in tree_leaves(value)):
                    vars(module)[key] = value
        self._names.know(self.model)


def said(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
