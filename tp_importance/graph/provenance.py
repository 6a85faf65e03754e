"""Which layers and parameters every tensor of a running forward pass is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.batches import tensors_in
from .function_names import function_name

__all__ = ["Provenance"]

_NOTHING = frozenset[str]()


class Provenance(TorchFunctionMode):
    """Follow the names of parameters and layers through all functions of torch, as long as the block runs.

    Names go with the *memory* that a tensor lies in, so views, slices and what is written in place need no care, and no
    tensor is kept alive. Memory that is used again forgets when it is filled by a function; what is made out of sight,
    by a script or a kernel of somebody's own, can bear stale names.

    Attributes:
        read: the names behind the arguments of the function that ran last.
        raised: what a function has raised last, the name of that function, and the names behind its arguments.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with torch.no_grad(), Provenance(net) as names:
        ...     y = net(torch.zeros(1, 2))
        >>> sorted(names.of(y))
        ['0.bias', '0.weight']
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read = _NOTHING
        self.raised: tuple[Exception, str, frozenset[str]] | None = None
        self._names: dict[int, frozenset[str]] = {}
        self.know(model)

    def know(self, model: nn.Module) -> None:
        """Learn where the parameters and buffers of ``model`` lie; again after they were replaced."""
        found: dict[int, set[str]] = defaultdict(set)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if place := _place(tensor):
                found[place].add(name)
        self._names.update((place, frozenset(names)) for place, names in found.items())

    def of(self, value: Any) -> frozenset[str]:
        """The names behind all tensors in ``value``."""
        return _NOTHING.union(*(self._names.get(p, _NOTHING) for p in map(_place, tensors_in(value))))

    def knows(self, tensor: Tensor) -> bool:
        """Whether a function that was seen has made ``tensor``."""
        return _place(tensor) in self._names

    def assign(self, value: Any, names: Iterable[str]) -> None:
        """Let all tensors in ``value`` be made of ``names``, whatever they were made of."""
        names = frozenset(names)
        self._names.update((p, names) for p in map(_place, tensors_in(value)) if p)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        with torch._C.DisableTorchFunction():  # other modes need not see what is asked of the tensors
            given = _places((args, kwargs))
        read = _NOTHING.union(*(self._names.get(p, _NOTHING) for p in given))
        self.read = read
        try:
            output = func(*args, **kwargs)
        except Exception as error:
            self.raised = (error, name, read)
            raise
        with torch._C.DisableTorchFunction():
            made = _places(args[:1] if name == "setitem" else output)
        for place in made:
            # shared with what it has read: a view, or written in place
            self._names[place] = read | self._names.get(place, _NOTHING) if place in given else read
        return output


def _place(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, say
        return 0


def _places(value: Any) -> set[int]:
    """The same of all tensors among arguments or results of a function of torch."""
    found, left = set(), [value]
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            found.add(_place(item))
        elif isinstance(item, (tuple, list)):
            left += item
        elif isinstance(item, dict):
            left += item.values()
    found.discard(0)
    return found
