"""Which layers and parameters every tensor of a running forward pass is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.batches import tensors_in

__all__ = ["Provenance"]


class Provenance(TorchFunctionMode):
    """Follow the names of parameters and layers through all functions of torch, as long as the block runs.

    Names go with the *memory* that a tensor lies in, so views, slices and what is written in place need no care, and no
    tensor is kept alive. Memory that is used again forgets when it is filled by a function; what is made out of sight,
    by a script or a kernel of somebody's own, can bear stale names.

    Attributes:
        operation: name of the function that ran last, or raised.
        read: the names behind its arguments.

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
        self.operation, self.read = "", frozenset[str]()
        self._names: dict[int, frozenset[str]] = {}
        self.know(model)

    def know(self, model: nn.Module) -> None:
        """Learn where the parameters and buffers of ``model`` lie; again after they were replaced."""
        found: dict[int, set[str]] = defaultdict(set)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if (place := _place(tensor)) is not None:
                found[place].add(name)
        self._names.update((place, frozenset(names)) for place, names in found.items())

    def of(self, value: Any) -> frozenset[str]:
        """The names behind all tensors in ``value``."""
        places = {_place(t) for t in tensors_in(value)}
        return frozenset().union(*(self._names.get(p, frozenset()) for p in places if p is not None))

    def knows(self, tensor: Tensor) -> bool:
        """Whether a function that was seen has made ``tensor``."""
        return _place(tensor) in self._names

    def assign(self, value: Any, names: Iterable[str]) -> None:
        """Let all tensors in ``value`` be made of ``names``, whatever they were made of."""
        names = frozenset(names)
        self._names.update((p, names) for p in map(_place, tensors_in(value)) if p is not None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        self.operation, self.read = getattr(func, "__name__", str(func)).strip("_"), self.of(given)
        read = self.read
        output = func(*args, **kwargs)
        made = tensors_in(output)
        if not made and self.operation == "setitem":
            made = given[:1]
        if made:
            shared = {_place(t) for t in given}  # by views, and by what is written in place
            for tensor in made:
                place = _place(tensor)
                if place is not None:
                    self._names[place] = read | self._names.get(place, frozenset()) if place in shared else read
        return output


def _place(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass without memory of its own
        return None
