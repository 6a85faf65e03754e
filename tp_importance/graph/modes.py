"""What a network does in training mode only: auxiliary heads, and what else no trace in eval mode meets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..core.batches import tensors_in
from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched
from ..errors import TracingError
from .classes import strangers
from .dataflow import is_question, made_tensors
from .function_names import function_name
from .groups import PrunableGroups
from .kept_statistics import STATISTICS, CallCounter, StatisticCall
from .trace_options import TraceOptions
from .tracing import Trace, set_mode, trace

__all__ = ["TrainingPass", "training_pass"]


@dataclass(frozen=True)
class TrainingPass:
    """What a network does in training mode and not in eval mode.

    Attributes:
        trace: of the network in training mode; ``None`` if it reads nothing more there.
        added: parameters and buffers that it reads more often.
        runs: modules that are called.
        renumbered: calls that take a statistic of something else there.
    """

    trace: Trace | None = None
    added: frozenset[str] = frozenset()
    runs: frozenset[str] = frozenset()
    renumbered: frozenset[StatisticCall] = frozenset()

    def reasons(self, groups: PrunableGroups) -> dict[str, str]:
        """Why groups must stay: in training mode a mask would not do to them what removal does."""
        found = {}
        for own in groups:
            unlike = next((s.call for s in own.statistics if s.call in self.renumbered), None)
            if unlike is not None:
                found[own.name] = (
                    f"{unlike} is taken over it, but training mode calls that function for something else before, so "
                    "that a mask could not tell which is which; give what training adds a module of its own, or pass "
                    "allow_stale=True if training mode is never to run again"
                )
        for group, touched in strangers(groups, self.trace).items() if self.trace else ():
            first = next(
                (n for n in touched if n in self.added or any(f"{n}.{k}" in self.added for k in ("weight", "bias"))),
                touched[0],
            )
            if f"{first}.weight" in self.added and first not in self.runs:
                first = f"a function of {first}.weight"
            found[group] = (
                f"{first} reads it in training mode only and would keep its old width; "
                "take that out of the model, or pass allow_stale=True if it is never to run again"
            )
        return found


def training_pass(model: nn.Module, example_inputs: Any, options: TraceOptions) -> TrainingPass:
    """Run a network in training mode and compare what it reads there.

    The surgery follows a trace in eval mode. A layer that runs in training mode only would keep its old input width,
    and the first training step after pruning would fail. So the network also runs once in training mode, with batch
    norms and dropout in eval mode. If more parameters are read there, labels are followed through that pass, too, and
    say which groups touch layers that they do not touch in eval mode. Statistics over channels, which masks know by
    their numbers, must be the same in both modes. Nothing of the network is changed.

    Args:
        model: the network.
        example_inputs: tensor, tuple or dict, batch dimension first.
        options: of the trace in eval mode.

    Returns:
        what it reads in training mode only.

    Raises:
        TracingError: if the network does not run a second time in eval mode.
        ValueError: if the network does not run in training mode on the example inputs and has layers that eval mode
            does not run: what they would read is unknown then.

    Example:
        >>> from tp_importance.graph.classes import build_groups
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        ...         self.aux = nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         x = self.a(x)
        ...         y = self.c(self.b(x))
        ...         return (y, self.aux(x)) if self.training else y
        >>> net, x = Net(), torch.zeros(1, 4)
        >>> groups = build_groups(trace(net, x))
        >>> groups.names, list(training_pass(net, x, groups.options).reasons(groups))
        (['a', 'b'], ['a'])
    """
    run = options.forward_fn or call_model
    owners = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    try:
        usual = _record(model, example_inputs, run, owners, training=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TracingError(
            f"{type(model).__name__} could be traced, but does not run a second time on the same inputs: "
            f"{type(error).__name__}: {error}"
        ) from error
    renumbered: frozenset[StatisticCall] = frozenset()
    try:
        training = _record(model, example_inputs, run, owners, training=True)
        more = {key for key, count in training.reads.items() if count > usual.reads[key]}
        renumbered = frozenset(c for c, seen in usual.statistics.items() if training.statistics[c] - seen)
        if not more:
            return TrainingPass(renumbered=renumbered)
        traced = trace(model, example_inputs, options, training=True)
    except torch.OutOfMemoryError:  # says nothing about the network
        raise
    except Exception as error:
        idle = _idle(model, usual)
        if not idle:
            return TrainingPass(renumbered=renumbered)
        said = str(error).splitlines()[0][:160] if str(error) else ""
        raise ValueError(
            f"{', '.join(idle)}: eval mode does not run them, and {type(model).__name__} cannot be followed in "
            f"training mode on the example inputs ({type(error).__name__}: {said}), so that nobody knows whether they "
            f"read channels that are to be pruned. Take them out (model.{idle[0]} = None), pass a forward_fn that runs "
            "in both modes, or allow_stale=True if they are never to run again"
        ) from error
    runs = frozenset(name for name, module in model.named_modules() if module in training.called)
    return TrainingPass(traced, frozenset(owners[key] for key in more), runs, renumbered)


@dataclass
class _Pass:
    """What happens in one pass.

    Attributes:
        reads: in how many operations every parameter and buffer takes part, by id.
        statistics: the forms in which every call that takes statistics is made: axes of its tensor, other arguments.
        called: modules that are called.
    """

    reads: Counter[int] = field(default_factory=Counter)
    statistics: defaultdict[StatisticCall, set[str]] = field(default_factory=lambda: defaultdict(set))
    called: set[nn.Module] = field(default_factory=set)


class _Recorder(TorchFunctionMode):
    """Writes down which tensors functions read, and which of them take statistics.

    Args:
        owners: ids of the tensors of interest.
        into: what to write to.
    """

    def __init__(self, owners: Collection[int], into: _Pass) -> None:
        super().__init__()
        self.calls = CallCounter()
        self._into, self._owners = into, frozenset(owners)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in STATISTICS:
            form = tree_map_only(Tensor, Tensor.dim, (args, kwargs))
            self._into.statistics[self.calls.call(name)].add(str(form))
        output = func(*args, **kwargs)
        found = {id(t) for t in tensors_in((args, kwargs))} & self._owners
        if found:
            given = tensors_in((args, kwargs))
            if not is_question(name, given, made_tensors(name, given, output)):
                self._into.reads.update(found)
        return output


def _record(
    model: nn.Module,
    example_inputs: Any,
    run: Callable[[nn.Module, Any], Any],
    owners: Collection[int],
    *,
    training: bool,
) -> _Pass:
    """One pass, in which nothing of the network changes."""
    found, inputs = _Pass(), fresh_inputs(example_inputs)
    recorder = _Recorder(owners, found)
    with untouched(model), torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(lambda m, _: found.called.add(m)).remove)
        stack.callback(recorder.calls.watch(model))
        set_mode(model, training)
        with recorder:
            run(model, inputs)
    return found


def _idle(model: nn.Module, usual: _Pass) -> list[str]:
    """The outermost modules with parameters or buffers of which a pass has read nothing and called nothing."""
    idle: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in idle):
            continue
        tensors = (*module.parameters(), *module.buffers())
        if tensors and usual.called.isdisjoint(module.modules()) and not any(usual.reads[id(t)] for t in tensors):
            idle.append(name)
    return idle
