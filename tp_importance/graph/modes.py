"""What a network does in training mode only: auxiliary heads, and what else no trace in eval mode meets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched
from ..errors import TracingError
from .classes import strangers
from .groups import PrunableGroups
from .kept_statistics import StatisticCall
from .reads import Reads, reading, tensor_names
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


def training_pass(
    model: nn.Module, example_inputs: Any, options: TraceOptions, *, usual: Reads | None = None
) -> TrainingPass:
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
        usual: what the network reads in eval mode, if that is known: :attr:`.tracing.Trace.reads`. Default: it runs
            once more to find out.

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
    owners, first = tensor_names(model), usual is None
    usual = _usual(model, example_inputs, options) if usual is None else usual
    renumbered: frozenset[StatisticCall] = frozenset()
    try:
        training = _record(model, example_inputs, options, training=True)
        more = {key for key, count in training.counts.items() if count > usual.counts[key]}
        renumbered = frozenset(c for c, seen in usual.statistics.items() if training.statistics[c] - seen)
        if not more:
            return TrainingPass(renumbered=renumbered)
        traced = trace(model, example_inputs, options, training=True)
    except torch.OutOfMemoryError:  # says nothing about the network
        raise
    except Exception as error:
        if not first:  # whether it is the mode, or that the network runs once only
            _usual(model, example_inputs, options)
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


def _record(model: nn.Module, example_inputs: Any, options: TraceOptions, *, training: bool) -> Reads:
    """One pass, in which nothing of the network changes."""
    found, inputs = Reads(), fresh_inputs(example_inputs)
    with untouched(model), torch.no_grad(), reading(model, found) as mode:
        set_mode(model, training)
        with mode():
            (options.forward_fn or call_model)(model, inputs)
    return found


def _usual(model: nn.Module, example_inputs: Any, options: TraceOptions) -> Reads:
    """The same in eval mode."""
    try:
        return _record(model, example_inputs, options, training=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TracingError(
            f"{type(model).__name__} could be traced, but does not run a second time on the same inputs: "
            f"{type(error).__name__}: {error}"
        ) from error


def _idle(model: nn.Module, usual: Reads) -> list[str]:
    """The outermost modules with parameters or buffers of which a pass has read nothing and called nothing."""
    idle: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in idle):
            continue
        tensors = (*module.parameters(), *module.buffers())
        if tensors and usual.called.isdisjoint(module.modules()) and not any(usual.counts[id(t)] for t in tensors):
            idle.append(name)
    return idle
