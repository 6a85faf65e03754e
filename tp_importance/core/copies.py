"""Deep copies of networks, also of those that ``copy.deepcopy`` refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

__all__ = ["copied", "copied_with", "copy_memo"]

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, *, shared: Iterable[nn.Parameter] = ()) -> Model:
    """A deep copy of a network, also after a forward pass with gradients left a tensor with a graph in it.

    Args:
        model: the network; tensors inside of it that are not leaves of the autograd graph, such as the weight under the
            older ``torch.nn.utils.weight_norm`` or a cached activation, are copied without their graph.
        shared: parameters whose values the copy is to share: they are other objects, but lie in the same memory.
            For copies whose values nobody writes to.

    Example:
        >>> import torch
        >>> net = torch.nn.utils.weight_norm(nn.Linear(2, 2))
        >>> twin = copied(net)
        >>> net.weight.is_leaf, twin.weight.is_leaf
        (False, True)
    """
    # others (tensors of inference mode, subclasses) are better left to themselves
    alike = [p for p in shared if type(p) is nn.Parameter and p.is_leaf and not p.is_inference()]
    return copied_with(model, None, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in alike})[0]


def copied_with(model: Model, others: Any, memo: dict[int, Any] | None = None) -> tuple[Model, Any]:
    """The same, and a copy of ``others``, in which the layers of the network are those of its copy.

    Args:
        model: the network.
        others: what else is copied.
        memo: what :func:`copy.deepcopy` is to take for some objects, by id.
    """
    twin, options = copy.deepcopy((model, others), copy_memo(model) | (memo or {}))
    for module in twin.modules():
        if is_parametrized(module):  # copies share a class, and removing a parametrization changes the class
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    return twin, options


def copy_memo(model: nn.Module) -> dict[int, Any]:
    """What :func:`copy.deepcopy` is to take for the tensors of ``model`` that it refuses; see :func:`copied`."""
    # most modules hold little else than empty dicts
    filled = ([v for v in vars(module).values() if type(v) is not dict or v] for module in model.modules())
    held = (value for values in filled for value in tree_leaves(values))
    return {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
