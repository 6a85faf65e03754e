"""How a network is called and read when it is traced, and the error if that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..core.batches import tensors_in
from ..core.devices import misplaced
from ..errors import TracingError
from .labels.attention import Attention

__all__ = ["TraceOptions", "failed_trace", "output_tensors"]


@dataclass(frozen=True)
class TraceOptions:
    """What is needed to trace unusual networks; the first five fields have Torch-Pruning's names and meaning.

    Attributes:
        choices: answers to what one pass leaves open, see :class:`~tp_importance.graph.labels.ledger.Question`.
        attention: what a unit of attention is.
        with_heads: layers of which the user has told the number of heads, by qualified name.
        count_attention: whether costs contain the multiply-accumulates of data with data, as QKᵀ.
    """

    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    output_transform: Callable[[Any], Any] | None = None
    unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None
    customized_pruners: Mapping[Any, Any] | None = None
    ignored_params: Sequence[nn.Parameter] = ()
    choices: tuple[int, ...] = ()
    attention: Attention = "heads"
    with_heads: tuple[str, ...] = ()
    count_attention: bool = True

    def on_copy(self, model: nn.Module, copy: nn.Module) -> TraceOptions:
        """The same options, with every module and parameter of ``model`` replaced by its twin in ``copy``."""
        modules: dict[Any, Any] = dict(zip(model.modules(), copy.modules(), strict=True))
        given = self.customized_pruners or {}
        types = {type(module): type(twin) for module, twin in modules.items()}  # parametrised layers have their own
        pruners = {modules.get(k, types.get(k, k)): v for k, v in given.items()} or None
        renamed = self.renamed({p: name for name, p in model.named_parameters()}, copy)
        return replace(renamed, customized_pruners=pruners)

    def renamed(self, names: Mapping[Any, str], model: nn.Module) -> TraceOptions:
        """The same options, with every parameter replaced by the one that has its name in ``model`` now.

        Args:
            names: names of the parameters, those that surgery has replaced among them.
            model: the network.
        """
        now = dict(model.named_parameters())

        def twin(p: nn.Parameter) -> nn.Parameter:
            return now.get(names.get(p, ""), p)

        return replace(
            self,
            unwrapped_parameters=[(twin(p), dim) for p, dim in self.unwrapped_parameters or ()] or None,
            ignored_params=[twin(p) for p in self.ignored_params],
        )


def output_tensors(value: Any, transform: Callable[[Any], Any] | None = None) -> list[Tensor]:
    """The tensors among what a network returns.

    Args:
        value: what it returns.
        transform: applied to it first.

    Raises:
        TypeError: if there are none.

    Example:
        >>> import torch
        >>> [tuple(out.shape) for out in output_tensors({"logits": torch.zeros(1, 10), "loss": None})]
        [(1, 10)]
    """
    taken = value if transform is None else transform(value)
    found = tensors_in(taken)
    if not found and transform is None:
        raise TypeError(f"the network returns no tensor, but {type(value).__name__}; give output_transform")
    if not found:
        raise TypeError(f"output_transform returns no tensor, but {type(taken).__name__}")
    return found


def failed_trace(model: nn.Module, example_inputs: Any, error: Exception) -> TracingError:
    """The error for a network that could not be traced: what went wrong, and what to do about it.

    Args:
        model: the network.
        example_inputs: what it was called with.
        error: what the trace raised.
    """
    remedy = misplaced(model, example_inputs) or (
        "Check that the model runs on example_inputs (device, dtype, shape); give forward_fn or output_transform for "
        "unusual signatures"
    )
    return TracingError(f"could not trace {type(model).__name__}: {type(error).__name__}: {error}. {remedy}")
