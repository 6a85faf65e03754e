"""See tensors of a forward pass that are no module's output, also in passes over other inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.batches import tensors_in
from ..core.forward import ForwardFn
from ..errors import TracingError
from .dataflow import Flow, is_question, made_tensors, record, watched_modules
from .function_names import function_name

__all__ = ["recording", "watch_activations"]


def recording(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None, *, known: Flow | None = None
) -> Flow | None:
    """Operations of the call of ``model`` that a pass makes; ``None`` if later passes could not be compared with it.

    That is so if the forward function does not call the model exactly once, or if something in it is scripted.

    Args:
        model: the network.
        example_inputs: what it is called with.
        forward_fn: ``forward_fn(model, example_inputs)``.
        known: of a pass over the same inputs; without ``forward_fn`` it need not be made again.
    """
    flow = known if forward_fn is None else None
    flow = record(model, example_inputs, forward_fn=forward_fn, within=True) if flow is None else flow
    return flow if flow.calls_of_model == 1 and all(op.seen for op in flow.ops) else None


@contextmanager
def watch_activations(
    model: nn.Module,
    flow: Flow,
    watches: Mapping[int, Callable[[Tensor], None]],
    *,
    otherwise: Callable[[TracingError], None] | None = None,
) -> Iterator[None]:
    """Show tensors of a recorded call of the model while it is called again, on other inputs; none is kept.

    The calls must run the same operations as the recorded one. Nothing is seen inside of layers.

    Args:
        model: the network that was recorded, in eval mode.
        flow: its recording, with the default ``layers`` and without ``forward_fn``.
        watches: what to call, per tensor of ``flow``, as soon as it is made.
        otherwise: called instead of raising the ``TracingError``; the rest of the call goes unseen.

    Raises:
        ValueError: if a tensor is not made by an operation of ``flow``.
        TracingError: in a call that runs other operations.

    Example:
        >>> import torch
        >>> from tp_importance.graph.dataflow import record
        >>> net, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
        >>> flow = record(net, torch.zeros(1, 2))
        >>> with watch_activations(net, flow, {flow.outputs[0]: lambda x: seen.append(x.shape)}):
        ...     _ = net(torch.zeros(5, 2))
        >>> seen
        [torch.Size([5, 3])]
    """
    wanted: dict[int, list[tuple[int, Callable[[Tensor], None]]]] = {}
    for value, fn in watches.items():
        made = [(i, op.outputs.index(value)) for i, op in enumerate(flow.ops) if value in op.outputs]
        if len(made) != 1:
            raise ValueError(f"tensor {value} is made by no operation of the recording")
        wanted.setdefault(made[0][0], []).append((made[0][1], fn))
    counter = _Counter(flow, wanted, otherwise)
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(counter.start, prepend=True).remove)
        stack.callback(model.register_forward_hook(counter.stop).remove)
        for name, module, kind in watched_modules(model, {}):
            if kind is not None:
                counter.watch(stack, name, module)
        stack.enter_context(counter)
        yield


class _Counter(TorchFunctionMode):
    """Counts operations as the recorder does, without keeping their tensors."""

    def __init__(
        self,
        flow: Flow,
        wanted: Mapping[int, list[tuple[int, Callable[[Tensor], None]]]],
        otherwise: Callable[[TracingError], None] | None,
    ) -> None:
        super().__init__()
        self._flow, self._wanted, self._otherwise = flow, wanted, otherwise
        self._next = self._depth = 0
        self._running = False

    def start(self, *_: Any) -> None:
        self._next, self._depth, self._running = 0, 0, True

    def stop(self, *_: Any) -> None:
        self._running = False

    def watch(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, _args: Any) -> None:
            self._depth += 1

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._depth -= 1
            self._count(name, tensors_in(output))

        stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
        stack.callback(module.register_forward_hook(after).remove)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._depth or not self._running:
            return output
        given, name = tensors_in((args, kwargs or {})), function_name(func)
        made = made_tensors(name, given, output)
        if not is_question(name, given, made):
            self._count(name, made)
        return output

    def _count(self, name: str, made: list[Tensor]) -> None:
        if not self._running:
            return
        index, self._next = self._next, self._next + 1
        if index >= len(self._flow.ops) or self._flow.ops[index].name != name:
            there = self._flow.ops[index].name if index < len(self._flow.ops) else "the end"
            error = TracingError(f"operation {index} of the network was {there} when it was recorded and is {name} now")
            self._running = False
            if self._otherwise is None:
                raise error
            self._otherwise(error)
            return
        self._running = False  # what the callbacks compute is none of the network's operations
        for position, fn in self._wanted.get(index, ()):
            fn(made[position])
        self._running = True
