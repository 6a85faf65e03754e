"""Networks traced once, and what the contracts ask of them and of Torch-Pruning."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.classes import build_groups
from ..graph.discovery import prunable_groups
from ..graph.groups import PrunableGroups
from ..graph.tracing import trace
from .networks import make_network

__all__ = ["SEVERAL", "Case", "host_group", "permuted", "topology", "verified"]

SEVERAL = ("residual", "concat", "grouped", "split", "flatten", "padded_shortcut", "transformer_mlp")
"""Networks that between them couple channels in every way the others do."""


@dataclass(frozen=True)
class Case:
    """A network, its inputs and its verified groups; shared between tests, so never to be changed: take a copy."""

    model: nn.Module
    x: Tensor
    groups: PrunableGroups

    def copy(self) -> Case:
        """The same with a network of its own, which may be pruned."""
        model = copy.deepcopy(self.model)
        return Case(model, self.x, self.groups_of(model, self.x))

    def groups_of(self, model: nn.Module, x: Tensor) -> PrunableGroups:
        """Groups of a network of the same structure; nothing is verified again."""
        fresh = build_groups(trace(model, x))
        return fresh.exclude({n: "" for n in fresh.names if n not in self.groups.names})


@cache
def topology(name: str) -> Case:
    """A network of :data:`.networks.TOPOLOGIES`; the same object whenever it is asked for."""
    model, x = make_network(name)
    return Case(model, x, prunable_groups(model, x))


def verified(name: str) -> dict[str, Any]:
    """What a pruner of this network is given so that it does not verify it again, which is most of its making.

    Returns:
        The option ``verify``: a function that knows which groups the verification has refused, and why.
    """
    unsafe = {e.name: e.reason for e in topology(name).groups.excluded}
    return {"verify": lambda groups, _: {n: reason for n, reason in unsafe.items() if n in groups.names}}


def permuted(case: Case, name: str, order: Tensor) -> nn.Module:
    """A copy of a network with the units of one group in another order; it computes the same.

    Args:
        case: the network and its groups.
        name: of the group.
        order: shape (units,); unit u of the copy is what unit ``order[u]`` was.
    """
    model = copy.deepcopy(case.model)
    for member in case.groups[name].members:
        module = model.get_submodule(member.name)
        source = torch.arange(member.width)
        for unit in range(case.groups[name].n_units):
            source[member.positions([unit])] = torch.from_numpy(member.positions([int(order[unit])]))
        depthwise = getattr(module, "groups", 1) > 1
        if depthwise and member.role == "in":
            continue  # one dimension, already moved
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim() == 0:
                continue
            is_in = member.role == "in" and tensor.dim() > 1
            if member.role == "in" and tensor.dim() == 1 and member.kind == "consumer":
                continue  # the consumer's bias belongs to its outputs
            dim = int(is_in) if not getattr(module, "transposed", False) or tensor.dim() == 1 else int(not is_in)
            moved = tensor.detach().index_select(dim, source)
            with torch.no_grad():
                getattr(module, key).copy_(moved)
    return model


def host_group(graph: Any, module: nn.Module, role: str = "out", channels: Iterable[int] | None = None) -> Any:
    """The ``tp.Group`` that removes channels of a layer, all by default, at its outputs or its inputs ("in")."""
    pruner = graph.get_pruner_of_module(module)
    out = role == "out"
    fn, width = (
        (pruner.prune_out_channels, graph.get_out_channels(module))
        if out
        else (pruner.prune_in_channels, graph.get_in_channels(module))
    )
    return graph.get_pruning_group(module, fn, list(range(width) if channels is None else map(int, channels)))
