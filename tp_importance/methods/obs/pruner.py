"""The pruner of structured optimal brain surgeon for Torch-Pruning."""

from ...pruning.pruner import MethodPruner
from .importance import OBSImportance

__all__ = ["OBSPruner"]


class OBSPruner(MethodPruner):
    """Prune a network to a budget by :class:`OBSImportance`: collect, allocate, remove.

    Works in place; see :class:`~tp_importance.BudgetPruner` for ``plan``, ``step`` and what all pruners share.

    Args:
        loader: re-iterable of batches; a few hundred samples suffice, and labels are needed with ``classes`` or another
            ``class_weight`` only.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tp_importance import Budget
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> loader = [torch.randn(16, 3, 8, 8)]
        >>> report = OBSPruner(net, torch.randn(1, 3, 8, 8), loader, budget=Budget(macs=0.5)).step(refit=True)
        >>> net[0].out_channels, report.cost.macs <= 0.5 * report.dense.macs
        (4, True)
    """

    importance_class = OBSImportance
