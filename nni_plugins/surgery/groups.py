"""Remove masked channels by our own surgery: as units of the coupled groups of the network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_importance.graph.discovery import prunable_groups
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.surgery import remove_units
from tp_importance.graph.verify import masked_equals_removed

from .units import masked_axes, units_to_remove

__all__ = ["remove_groups"]


def remove_groups(
    trial: nn.Module, inputs: inspect.BoundArguments, masks: Mapping[str, Mapping[str, Tensor]]
) -> tuple[PrunableGroups, dict[str, list[int]]]:
    """Remove the units whose channels are masked.

    The removal itself is verified beforehand: on copies, at the input of every layer and at the output.

    Args:
        trial: the copy, with the weights as they are, not masked.
        inputs: of :func:`.trial.bound_inputs`.
        masks: of :func:`.masks.checked_masks`.

    Returns:
        The groups that lose units, as they were, and the units.

    Raises:
        RuntimeError: if there are no such groups, or the masks are not those of whole units.
    """
    leaves, structure = tree_flatten((inputs.args, inputs.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        given = dict(zip(places, tensors, strict=True))
        args, kwargs = tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
        return model(*args, **kwargs)

    tensors = tuple(leaves[i] for i in places)
    try:
        groups = prunable_groups(trial, tensors, forward_fn=forward, verify=False)
        removed = units_to_remove(groups, masked_axes(trial, masks))
        rest = groups.exclude(dict.fromkeys(set(groups.names) - removed.keys(), "keeps all its channels"))
        problem = masked_equals_removed(rest, tensors, removed)
        if problem is not None:
            raise RuntimeError(f"removal is not masking: {problem}")
        remove_units(rest, removed)
        return rest, removed
    except torch.OutOfMemoryError:  # says nothing about the network
        raise
    except Exception as error:  # whatever discovery raises
        raise RuntimeError(f"{error}" if type(error) in (RuntimeError, ValueError) else f"{error!r}") from error
