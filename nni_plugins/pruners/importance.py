"""NNI pruners around any importance, and with one of their own."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
from torch import nn

from tp_importance import Budget, BudgetPruner, GradientImportance
from tp_importance.allocation.registry import Allocator, named_allocator
from tp_importance.core.options import hand_on, split_options
from tp_importance.pruning.registry import find_importance
from tp_importance.statistics.labels import LabelFn

from ..config import Config
from ..wrappers import unwrapped
from .base import MaskingPruner

__all__ = ["ImportancePruner", "MethodPruner"]


class ImportancePruner(MaskingPruner):
    """Mask the least important channels of every coupled group, by ratio or to a budget.

    Everything else is as for :class:`~nni_plugins.pruners.base.MaskingPruner`.

    Args:
        model: the network.
        config_list: which layers, and ``sparse_ratio``; with ``budget`` it only selects layers.
        evaluator: NNI evaluator, for fusion and schedules.
        existed_wrappers: NNI's own; used by ``from_compressor``.
        loader: re-iterable of batches for the statistics.
        importance: what values the channels: an importance of :mod:`tp_importance` or of Torch-Pruning, or the name of
            a registered criterion, see :func:`tp_importance.register_method`.
        allocator: where widths under a budget come from, see :class:`tp_importance.BudgetPruner`.
        label_fn: ``label_fn(batch)`` for loaders of unusual form.
        **options: see :class:`~nni_plugins.pruners.base.MaskingPruner`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
        >>> pruner = ImportancePruner(net, config_list, loader=[torch.randn(16, 3, 8, 8)], importance="l1")
        >>> _, masks = pruner.compress()
        >>> int(masks["0"]["weight"].flatten(1).any(1).sum())
        4
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Config,
        evaluator: Any = None,
        existed_wrappers: dict[str, Any] | None = None,
        *,
        loader: Iterable[Any],
        importance: Any,
        allocator: str | Allocator | None = None,
        label_fn: LabelFn | None = None,
        **options: Any,
    ) -> None:
        made = find_importance(importance)
        named_allocator(allocator)  # checks it
        self._choice = {"loader": loader, "importance": made, "allocator": allocator, "label_fn": label_fn}
        super().__init__(model, config_list, evaluator, existed_wrappers, loader=loader, **options)

    def _check_options(self) -> None:
        target = self._target
        self._pruner = BudgetPruner(target.model, target.example_inputs, target=target, **self._choice)

    def _collect_data(self) -> dict[str, Any]:
        """Position in the order of removal per unit, shape (U,)."""
        # wrappers leave the masked tensors of the last pass on the modules; those of this pass must not stay
        modules = [wrapper.module for wrapper in self._module_wrappers.values()]
        before = [(module, dict(module._buffers)) for module in modules]
        gradients = isinstance(self._pruner.importance, GradientImportance)  # it reads those of the parameters
        try:
            with unwrapped(self.bound_model) if gradients else nullcontext():
                self._pruner.collect()
        finally:
            for module, buffers in before:
                module._buffers.update(buffers)
        ranks = {}
        for name, curve in self._pruner.curves().items():
            ranks[name] = np.empty(len(curve.order))
            ranks[name][curve.order] = np.arange(len(curve.order))
        return ranks

    def _removed(self) -> dict[str, list[int]]:
        """The goal scaled by how far a schedule has come."""
        curves, progress = self._pruner.curves(), self._progress()
        if self._budget is not None:
            self.plan = self._pruner.plan(self._budget_at(progress))
            return self.plan.removed
        removed = {}
        for g, levels in zip(self._target.groups, self._space.levels, strict=True):
            left = g.n_units - int(g.n_units * progress * self._goal[g.name])
            removed[g.name] = curves[g.name].removed(
                int(levels[min(int(np.searchsorted(levels, left)), len(levels) - 1)])
            )
        self.plan = self._pruner.plan_of(removed)
        return removed


class MethodPruner(ImportancePruner):
    """An NNI pruner with one criterion: subclasses only name its importance, whose options become theirs."""

    importance_class: ClassVar[Any]

    def __init__(
        self,
        model: nn.Module,
        config_list: Config,
        evaluator: Any = None,
        existed_wrappers: dict[str, Any] | None = None,
        *,
        loader: Iterable[Any],
        budget: Budget | None = None,
        **options: Any,
    ) -> None:
        own, rest = split_options(type(self), options, self.importance_class, ImportancePruner, leave=("importance",))
        importance = self.importance_class(**own)
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            loader=loader,
            importance=importance,
            budget=budget,
            **rest,
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "importance_class"):  # else there is a class to come
            hand_on(cls, cls.importance_class, ImportancePruner, leave=("importance",))
