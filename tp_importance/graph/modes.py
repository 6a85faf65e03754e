"""What a network does in training mode only: auxiliary heads and other layers that no trace in eval mode meets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.batches import tensors_in
from ..core.forward import call_model, fresh_inputs
from ..core.untouched import untouched
from .dataflow import function_name, is_question, made_tensors
from .groups import ChannelGroup, PrunableGroups
from .tracing import Trace, trace

__all__ = ["read_in_training_only"]

# Batch norms that normalise by the batch refuse a single value per channel, and dropout only draws random numbers.
_ALWAYS_EVAL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def read_in_training_only(groups: PrunableGroups, example_inputs: Any) -> dict[str, str]:
    """Find the groups whose channels are read, in training mode, by layers that eval mode does not run on them.

    The surgery follows a trace in eval mode. A layer that runs in training mode only would keep its old input width,
    and the first training step after pruning would fail. So the network also runs once in training mode, with batch
    norms and dropout in eval mode. If more parameters are read there, the dependency graph is built from that
    pass, too, and says which groups have members that the graph in eval mode lacks. Nothing of the network is changed.

    Args:
        groups: groups from a trace in eval mode.
        example_inputs: tensor, tuple or dict, batch dimension first.

    Returns:
        Reason per group, naming the layer; empty if all groups are the same in both modes.

    Raises:
        ValueError: if the network does not run in training mode on the example inputs and has layers that eval mode
            does not run: what they would read is unknown then.

    Example:
        >>> from tp_importance.graph.host_groups import build_groups
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        ...         self.aux = nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         x = self.a(x)
        ...         y = self.c(self.b(x))
        ...         return (y, self.aux(x)) if self.training else y
        >>> groups = build_groups(trace(Net(), torch.zeros(1, 4)))
        >>> groups.names, list(read_in_training_only(groups, torch.zeros(1, 4)))
        (['a', 'b'], ['a'])
    """
    model, run = groups.trace.model, groups.options.forward_fn or call_model
    owners = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    usual, called = _reads(model, example_inputs, run, owners, training=False)
    try:
        training, _ = _reads(model, example_inputs, run, owners, training=True)
        more = {key for key, count in training.items() if count > usual[key]}
        if not more:
            return {}
        traced = _training_trace(groups, example_inputs, owners, more)
    except torch.OutOfMemoryError:  # says nothing about the network
        raise
    except Exception as error:
        idle = _idle(model, usual, called)
        if not idle:
            return {}
        said = str(error).splitlines()[0][:160] if str(error) else ""
        raise ValueError(
            f"{', '.join(idle)}: eval mode does not run them, and {type(model).__name__} cannot be followed in "
            f"training mode on the example inputs ({type(error).__name__}: {said}), so that nobody knows whether they "
            f"read channels that are to be pruned. Take them out (model.{idle[0]} = None), pass a forward_fn that runs "
            "in both modes, or allow_stale=True if they are never to run again"
        ) from error
    added = [owners[key] for key in sorted(more, key=lambda key: owners[key])]
    layers = {*added, *(name.rpartition(".")[0] for name in added)}
    reasons = {}
    for group in groups:
        try:
            strangers = _members(traced, group) - {(m.name, m.role) for m in group.members}
        except Exception as error:  # whatever Torch-Pruning's search raises
            reasons[group.name] = f"its consumers in training mode cannot be found ({type(error).__name__}: {error})"
            continue
        if strangers:
            name = min(strangers, key=lambda found: (not found[0], found[0] not in layers, found))[0]
            consumers = name or f"an output, or a function of {', '.join(added[:3])}"
            reasons[group.name] = (
                f"{consumers} reads it in training mode only and would keep its old width; take that out of the model, "
                "or pass allow_stale=True if it is never to run again"
            )
    return reasons


class _Reads(TorchFunctionMode):
    """Count in how many operations every tensor of interest takes part; keep what those of ``kept`` ones give."""

    def __init__(self, owners: Collection[int], kept: Collection[int] = ()) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.made: list[Tensor] = []
        self._owners, self._kept = owners, kept

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        found = {id(t) for t in tensors_in((args, kwargs))} & set(self._owners)
        if found:
            name, given = function_name(func), tensors_in((args, kwargs))
            if not is_question(name, given, made := made_tensors(name, given, output)):
                self.counts.update(found)
                if found & set(self._kept):
                    self.made += made
        return output


def _reads(
    model: nn.Module,
    example_inputs: Any,
    run: Callable[[nn.Module, Any], Any],
    owners: Collection[int],
    *,
    training: bool,
) -> tuple[Counter[int], set[nn.Module]]:
    """How often every parameter and buffer is read in one pass, and which modules are called."""
    called: set[nn.Module] = set()
    inputs, mode = fresh_inputs(example_inputs), _Reads(owners)
    with untouched(model), torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(lambda m, _: called.add(m)).remove)
        _set_mode(model, training)
        with mode:
            run(model, inputs)
    return mode.counts, called


def _set_mode(model: nn.Module, training: bool) -> None:
    model.eval()
    if training:
        for module in model.modules():
            module.training = not isinstance(module, _ALWAYS_EVAL)


def _training_trace(
    groups: PrunableGroups, example_inputs: Any, owners: Collection[int], more: Collection[int]
) -> Trace:
    """The dependency graph of the pass in training mode, with everything that the layers in question give."""
    run, transform = groups.options.forward_fn or call_model, groups.options.output_transform
    made: list[Tensor] = []

    def in_training(model: nn.Module, inputs: Any) -> Any:
        _set_mode(model, True)
        with _Reads(owners, more) as mode:
            output = run(model, inputs)
        made.extend(mode.made)
        return output

    def roots(output: Any) -> list[Tensor]:
        found = tensors_in(output)
        if not found and transform is not None:  # an object of its own class
            found = tensors_in(transform(output))
        return [t for t in (*found, *made) if t.grad_fn is not None]

    options = replace(groups.options, forward_fn=in_training, output_transform=roots)
    return trace(groups.trace.model, example_inputs, options)


def _members(traced: Trace, group: ChannelGroup) -> set[tuple[str, str]]:
    """Which sides of which layers lose channels with ``group``, by another trace of the network.

    An output of the network has no name. So has a function that reads the weight of a layer: Torch-Pruning takes that
    for an operation that hands the channels on.
    """
    graph = traced.graph
    places = [(*group.root, group.root_channels.tolist())]
    places += [(m.name, m.role, sorted(set(m.channels.tolist()))) for m in group.members if m.kind != "passthrough"]
    modules = dict(traced.model.named_modules())
    for name, role, channels in places:
        module = modules.get(name)
        if module not in graph.module2node:
            continue
        pruner = graph.get_pruner_of_module(module)
        fn = pruner.prune_out_channels if role == "out" else pruner.prune_in_channels
        found = set()
        for item in graph.get_pruning_group(module, fn, channels):
            node, side = item.dep.target, "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            if node.module in traced.names:
                found.add((traced.names[node.module], side))
            if side == "out" and not node.outputs:
                found.add(("", side))
        return found
    return set()


def _idle(model: nn.Module, usual: Counter[int], called: set[nn.Module]) -> list[str]:
    """The outermost modules with parameters or buffers of which a pass has read nothing and called nothing."""
    idle: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in idle):
            continue
        tensors = (*module.parameters(), *module.buffers())
        if tensors and called.isdisjoint(module.modules()) and not any(usual[id(t)] for t in tensors):
            idle.append(name)
    return idle
