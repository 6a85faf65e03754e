"""Criteria of Torch-Pruning that read gradients, with the gradients collected for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn import functional as F

from ..allocation.curves import Curve, value_curves
from ..allocation.registry import default_allocator
from ..core.arguments import checked_importance
from ..core.forward import ForwardFn
from ..graph.groups import PrunableGroups
from ..statistics.gradients import LossFn, checked_loss_fn, loss_gradients
from ..statistics.labels import LabelFn
from ..statistics.observe import Observed, Watch
from .importance import StatisticalImportance

__all__ = ["GradientImportance"]


class GradientImportance(StatisticalImportance):
    r"""A ``tp.importance.Importance`` that reads ``weight.grad``, valued once over a loader.

    Before it is asked, every parameter gets :math:`\sum_b \partial L_b / \partial \theta`, the gradient of the mean
    losses of all batches in eval mode; afterwards gradients are what they were.

    Args:
        importance: a first-order criterion, ``tp.importance.TaylorImportance()`` say. Those that need per-sample
            gradients (Hessian, OBDC) collect them in loops of their own.
        loss_fn: ``loss_fn(output, labels)``, with the output of the network itself.

    Raises:
        TypeError: if ``importance`` cannot value channels, or the loss is no function.

    Example:
        >>> import torch, torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)]
        >>> taylor = GradientImportance(tp.importance.TaylorImportance())
        >>> len(taylor.collect(net, torch.randn(1, 3, 8, 8), loader).curves()["0"].order), net[0].weight.grad is None
        (8, True)
    """

    needs_gradients = True

    def __init__(self, importance: Any, *, loss_fn: LossFn = F.cross_entropy) -> None:
        super().__init__()
        self.importance = checked_importance(importance)
        self.loss_fn = checked_loss_fn(loss_fn)
        self.default_allocator = default_allocator(importance)

    @property
    def name(self) -> str:
        """That of the criterion."""
        return type(self.importance).__name__

    def watches(self, groups: PrunableGroups) -> list[Watch]:
        """None: gradients come with the backward pass."""
        return []

    def value(self, groups: PrunableGroups) -> dict[str, Curve]:
        """Curves from the gradients that are there now."""
        return value_curves(self.importance, groups)

    def _run(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        groups: PrunableGroups,
        forward_fn: ForwardFn | None,
        label_fn: LabelFn | None,
    ) -> tuple[Observed | None, dict[str, Curve]]:
        with loss_gradients(model, loader, self.loss_fn, forward_fn=forward_fn, label_fn=label_fn):
            return None, self.value(groups)
