"""What one pass reads and calls, to be compared with a pass in another mode."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..core.batches import tensors_in
from .dataflow import is_question, made_tensors
from .function_names import function_name
from .kept_statistics import STATISTICS, CallCounter, StatisticCall

__all__ = ["Reads", "reading", "tensor_names"]


@dataclass
class Reads:
    """What happens in one pass.

    Attributes:
        counts: in how many operations every parameter and buffer takes part, by id.
        statistics: the forms in which every call that takes statistics is made: axes of its tensor, other arguments.
        called: modules that are called.
    """

    counts: Counter[int] = field(default_factory=Counter)
    statistics: defaultdict[StatisticCall, set[str]] = field(default_factory=lambda: defaultdict(set))
    called: set[nn.Module] = field(default_factory=set)


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Names of parameters and buffers by their ids."""
    return {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}


@contextmanager
def reading(model: nn.Module, into: Reads) -> Iterator[Callable[[], TorchFunctionMode]]:
    """Inside the block modules that are called are written down.

    Args:
        model: the network.
        into: what to write to.

    Yields:
        makes a mode, to be active while the network runs, that writes down what its functions read.
    """
    names, calls = frozenset(tensor_names(model)), CallCounter()
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(lambda m, _: into.called.add(m)).remove)
        stack.callback(calls.watch(model))
        yield lambda: _Recorder(names, into, calls)


class _Recorder(TorchFunctionMode):
    """Writes down which tensors functions read, and which of them take statistics.

    Args:
        owners: ids of the tensors of interest.
        into: what to write to.
        calls: names the calls.
    """

    def __init__(self, owners: frozenset[int], into: Reads, calls: CallCounter) -> None:
        super().__init__()
        self._calls, self._into, self._owners = calls, into, owners

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in STATISTICS:
            form = tree_map_only(Tensor, Tensor.dim, (args, kwargs))
            self._into.statistics[self._calls.call(name)].add(str(form))
        given = tensors_in((args, kwargs))
        output = func(*args, **kwargs)
        found = self._owners.intersection(map(id, given))
        if found and not is_question(name, given, made_tensors(name, given, output)):
            self._into.counts.update(found)
        return output
