"""PSAP's criterion for one-shot use: filter norms, with protection for what the loss would open again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ...allocation.curves import Curve, curve_from_scores
from ...core.types import Bools
from ...graph.gates import ChannelGates
from ...graph.groups import PrunableGroups
from ...pruning.importance import StatisticalImportance
from ...statistics.gradients import LossFn, checked_loss_fn, loss_of
from ...statistics.group_weights import GroupWeights
from ...statistics.observe import Watch
from .sparsity import outliers, relative_norms, select_masked

__all__ = ["PSAPImportance"]


class PSAPImportance(StatisticalImportance):
    r"""L2 norms relative to the layer, except that filters under protection come last.

    One pulse without training: in every group the filters of least norm are masked, |∂L/∂gate| is averaged over the
    batches of a loader in eval mode, and the outliers among the masked
    (:func:`~tp_importance.methods.psap.sparsity.outliers`) are protected: they score above all others of their group.

    Args:
        ratio: fraction of every group that is masked during the pulse.
        loss_fn: ``loss_fn(output, labels)``, with the output of the network itself; default: cross entropy.

    Attributes:
        protected: units under protection, per group that has any; after :meth:`collect`.

    Raises:
        ValueError: for a ratio outside (0, 1).

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> x, loader = torch.randn(1, 3, 8, 8), [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)]
        >>> importance = PSAPImportance().collect(net, x, loader)
        >>> tp.pruner.BasePruner(net, x, importance, pruning_ratio=0.5, ignored_layers=[net[-1]]).step()
        >>> net[0].out_channels
        4

    Source: arXiv 2303.11881 for the idea; this one-shot form is ours.
    """

    needs_gradients = True
    default_allocator = "uniform"  # norms relative to the layer do not compare across layers

    def __init__(self, *, ratio: float = 0.5, loss_fn: LossFn | None = None) -> None:
        super().__init__()
        if isinstance(ratio, bool) or not 0.0 < ratio < 1.0:
            raise ValueError(f"ratio={ratio!r} must be a fraction in (0, 1)")
        self.ratio = ratio
        self.loss_fn = nn.functional.cross_entropy if loss_fn is None else checked_loss_fn(loss_fn)
        self.protected: dict[str, list[int]] = {}
        self._gates: ChannelGates | None = None
        self._masked: dict[str, Bools] = {}
        self._sum = torch.zeros(0, device="cpu")
        self._norms: dict[str, Any] = {}

    def collect(self, model: nn.Module, example_inputs: Any, loader: Iterable[Any], **options: Any) -> Self:
        """Run the pulse over ``loader``; the model is not changed. Options as for the base class."""
        try:
            with torch.inference_mode(False):
                return super().collect(model, example_inputs, loader, **options)
        finally:
            if self._gates is not None:
                self._gates.remove()
                self._gates = None

    def watches(self, groups: PrunableGroups) -> list[Watch]:
        """See :meth:`~tp_importance.StatisticalImportance.watches`."""
        weights = GroupWeights(groups)
        self._norms = {g.name: relative_norms(weights.filters(g), g.n_units) for g in groups}
        self._masked = {}
        for g in groups:
            none = np.zeros(g.n_units, bool)
            count = min(int(self.ratio * g.n_units), g.n_units - g.min_units)
            self._masked[g.name] = select_masked(self._norms[g.name], none, none, count)
        self._gates = gates = ChannelGates(groups)
        gates.set(self._masked)
        gates.watch(True)
        self._sum = torch.zeros(len(gates.values) - 1, dtype=torch.float64, device="cpu")

        def pulse(_x: Tensor, output: Tensor, labels: Tensor) -> None:
            (gradient,) = torch.autograd.grad(loss_of(self.loss_fn, output, labels), gates.values)
            if not torch.isfinite(gradient).all():
                raise ValueError("the gradient of the loss is not finite; check the data and the model")
            self._sum += gradient[:-1].abs().double().cpu() * len(labels)

        return [Watch("the model", groups.trace.model, pulse)]

    def value(self, groups: PrunableGroups) -> dict[str, Curve]:
        """See :meth:`~tp_importance.StatisticalImportance.value`."""
        assert self._gates is not None
        curves, protected = {}, {}
        for name, gradients in self._gates.split(self._sum.numpy()).items():
            kept = outliers(gradients, self._masked[name])
            score = self._norms[name].copy()
            if len(kept):
                protected[name] = sorted(kept.tolist())
                score[kept] += score.max()
            curves[name] = curve_from_scores(score)
        self.protected = protected
        return curves
