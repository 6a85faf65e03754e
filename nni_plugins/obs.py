"""Structured optimal brain surgeon as an NNI pruner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from tp_importance import Budget, OBSImportance

from .base import Config, ImportancePruner

__all__ = ["OBSPruner"]


class OBSPruner(ImportancePruner):
    """Channels by the loss a refit of their consumers leaves, with NNI's masks, schedules and speedup.

    Args:
        model: the network.
        config_list: which layers, and ``sparse_ratio``; with ``budget`` it only selects layers.
        evaluator: NNI evaluator, for fusion and schedules.
        existed_wrappers: NNI's own.
        loader: re-iterable of labelled batches; a few hundred samples suffice.
        budget: what the pruned network may cost.
        example_inputs: default: the first samples of the loader.
        classes: see :class:`tp_importance.OBSImportance`.
        class_weight: see :class:`tp_importance.OBSImportance`.
        positions: see :class:`tp_importance.OBSImportance`.
        ridge: see :class:`tp_importance.OBSImportance`.
        seed: see :class:`tp_importance.OBSImportance`.
        **options: see :class:`~nni_plugins.base.ImportancePruner`.

    Example:
        >>> import torch
        >>> from nni_plugins import speedup
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)]
        >>> pruner = OBSPruner(net, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], loader=loader)
        >>> _, masks = pruner.compress()
        >>> pruner.unwrap_model()
        >>> speedup(net, torch.randn(2, 3, 8, 8), masks)[0].out_channels
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
        budget: Budget | None = None,
        example_inputs: Any = None,
        classes: Sequence[int] | None = None,
        class_weight: float = 0.5,
        positions: int | None = 8,
        ridge: float = 1e-3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        importance = OBSImportance(
            classes=classes, class_weight=class_weight, positions=positions, ridge=ridge, seed=seed
        )
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            loader=loader,
            importance=importance,
            budget=budget,
            example_inputs=example_inputs,
            **options,
        )
