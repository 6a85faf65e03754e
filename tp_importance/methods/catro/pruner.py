"""CATRO's pruner for Torch-Pruning."""

from ...pruning.pruner import MethodPruner
from .importance import CATROImportance

__all__ = ["CATROPruner"]


class CATROPruner(MethodPruner):
    """Prune a network to a budget by :class:`CATROImportance` (arXiv 2110.10921): collect, allocate, remove.

    Works in place; see :class:`~tp_importance.BudgetPruner` for ``plan``, ``step`` and what all pruners share.

    Args:
        loader: re-iterable of labelled batches; a few hundred samples suffice.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tp_importance import Budget
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)]
        >>> report = CATROPruner(net, torch.randn(1, 3, 8, 8), loader, budget=Budget(macs=0.5)).step()
        >>> net[0].out_channels, report.cost.macs <= 0.5 * report.dense.macs
        (4, True)
    """

    importance_class = CATROImportance
