"""ITPruner's pruner for Torch-Pruning."""

from ...pruning.pruner import MethodPruner
from .importance import ITPrunerImportance

__all__ = ["ITPruner"]


class ITPruner(MethodPruner):
    """Prune a network to a budget by ITPruner (arXiv 2108.08532): collect once, solve for any budget, remove.

    Works in place; see :class:`~tp_importance.BudgetPruner` for ``plan``, ``step`` and what all pruners share.
    ``plan().certificate`` is what the program proves, see
    :class:`~tp_importance.allocation.program.ProgramAllocator`; ``sweep([0.8, 0.5])`` solves for many budgets.

    Args:
        loader: re-iterable of batches; one of 100 images is what the paper takes. A last batch of fewer images than
            the estimator needs (2, unbiased 4) is taken together with the one before it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tp_importance import Budget
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> pruner = ITPruner(net, torch.randn(1, 3, 12, 12), [torch.randn(16, 3, 12, 12)], budget=Budget(macs=0.5))
        >>> [plan.cost.macs <= f * plan.dense.macs for f, plan in zip((0.8, 0.5), pruner.sweep([0.8, 0.5]))]
        [True, True]
        >>> pruner.step().cost.macs <= 0.5 * pruner.dense.macs
        True
    """

    importance_class = ITPrunerImportance
