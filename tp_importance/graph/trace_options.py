"""How a network is called and read when it is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

__all__ = ["TraceOptions"]


@dataclass(frozen=True)
class TraceOptions:
    """What is needed to trace unusual networks; the fields but the last have Torch-Pruning's names and meaning.

    Attributes:
        choices: answers to what one pass leaves open, see :class:`~tp_importance.graph.labels.ledger.Question`.
    """

    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    output_transform: Callable[[Any], Any] | None = None
    unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None
    customized_pruners: Mapping[Any, Any] | None = None
    ignored_params: Sequence[nn.Parameter] = ()
    choices: tuple[int, ...] = ()

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
