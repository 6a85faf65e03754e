"""Structured optimal brain surgeon: channels ordered by the loss that is left after the consumers are refitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor

from ...allocation.curves import Curve
from ...core.forward import ForwardFn
from ...core.progress import track
from ...core.types import Floats
from ...graph.groups import ChannelGroup, PrunableGroups
from ...maths.elimination import RIDGE, ReadUnits, eliminate_with_refit
from ...maths.moments import NEGLIGIBLE, Moments
from ...pruning.importance import StatisticalImportance
from ...statistics.consumers import ConsumerStatistics, check_reading
from ...statistics.group_weights import summed_l1_norms
from ...statistics.observe import Watch

__all__ = ["OBSImportance"]


class OBSImportance(StatisticalImportance):
    r"""Loss of removing channels *together with* the refit of whoever reads them.

    A removed set R of channels costs what least squares on the kept channels cannot make up,

    .. math:: L(R) = \sum_r \frac{1}{E_r} \operatorname{tr}\bigl(G_r W_R [(\hat P_r^{-1})_{RR}]^{-1} W_R^\top\bigr)

    over the consumers r, with :math:`\hat P_r` the covariance of a consumer's unfolded input plus a ridge,
    :math:`G_r` the squared gains of the batch norm behind it and :math:`E_r` the energy of what its error disturbs:
    of its output, or of the residual sum that this is added to. Channels go one at a time, least loss first
    (:mod:`tp_importance.maths.elimination`). It pays if the consumers are refitted afterwards. Ours; optimal brain
    surgeon (Hassibi and Stork 1993), structured in ZipLM (arXiv 2302.04089).

    Args:
        classes: labels of a classification subtask; samples of other classes are not counted.
        class_weight: θ in [0, 1], ½ without labels: what the refit leaves is measured in
            :math:`2(\theta S_b + (1 - \theta) S_w)` of the consumer's input instead of its covariance, which is θ = ½;
            the refit itself is the same. Ours.
        positions: output positions per sample at which consumers are watched, ``None`` for all.
        ridge: relative to the mean variance of a consumer's features, > 0.
        seed: of the sampled positions.

    Attributes:
        consumer_statistics: the moments of all consumers, ``None`` before :meth:`collect`; whoever refits may use them.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)]
        >>> importance = OBSImportance().collect(net.eval(), torch.randn(1, 3, 8, 8), loader)
        >>> sorted(importance.curves()["0"].order.tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
        self,
        *,
        classes: Sequence[int] | None = None,
        class_weight: float = 0.5,
        positions: int | None = 8,
        ridge: float = RIDGE,
        seed: int = 0,
    ) -> None:
        super().__init__(classes=classes)
        check_reading(class_weight, positions)
        if not ridge > 0:
            raise ValueError(f"ridge={ridge!r} must be above 0, e.g. {RIDGE}")
        self.class_weight, self.positions, self.ridge, self.seed = class_weight, positions, ridge, seed
        self.needs_labels = class_weight != 0.5 or classes is not None
        self.consumer_statistics: ConsumerStatistics | None = None
        self._collecting: ConsumerStatistics | None = None

    def watches(self, groups: PrunableGroups) -> list[Watch]:
        """See :meth:`~tp_importance.StatisticalImportance.watches`."""
        self._collecting = ConsumerStatistics(groups, positions=self.positions, seed=self.seed)
        return self._collecting.watches()

    def alongside(self, groups: PrunableGroups, forward_fn: ForwardFn | None) -> AbstractContextManager[None]:
        """See :meth:`~tp_importance.StatisticalImportance.alongside`."""
        assert self._collecting is not None
        return self._collecting.sums(groups.trace.example_inputs, forward_fn)

    def before_batch(self, labels: Tensor) -> None:
        """See :meth:`~tp_importance.StatisticalImportance.before_batch`."""
        assert self._collecting is not None
        self._collecting.labels = labels

    def value(self, groups: PrunableGroups) -> dict[str, Curve]:
        """See :meth:`~tp_importance.StatisticalImportance.value`."""
        statistics = self._collecting
        assert statistics is not None
        curves = {g.name: self._curve(statistics, groups, g) for g in track(groups, "ordering channels", unit="group")}
        self.consumer_statistics = statistics  # not before: a failed pass leaves the old ones
        return curves

    def _curve(self, statistics: ConsumerStatistics, groups: PrunableGroups, group: ChannelGroup) -> Curve:
        norms = summed_l1_norms(groups, group)
        reads, energy = [], np.zeros(group.n_units)
        for member, (p, metric, weight, gain, units) in zip(
            group.consumers, self._reads(statistics, group), strict=True
        ):
            scaled = weight.to(p) * gain.to(p).unsqueeze(2)
            energy += _unit_energy(p, scaled, units, group.n_units)
            factor = statistics.relative(member.name)
            if bool((units == units[0]).all()):
                reads.append(ReadUnits(p, scaled, units[0], factor, metric))
                continue
            for i, block in enumerate(zip(p, scaled, units, strict=True)):  # conv groups with units of their own
                reads.append(ReadUnits(*block, factor, None if metric is None else metric[i]))
        constant = np.flatnonzero(energy <= NEGLIGIBLE * max(energy.max(initial=0.0), 1e-300))
        first = constant[np.argsort(norms[constant], kind="stable")].tolist()
        try:
            found = eliminate_with_refit(reads, group.n_units, ridge=self.ridge, first=first, tie_break=norms)
        except ValueError as error:
            raise ValueError(f"group {group.name}: {error}") from error
        return Curve(found.loss, found.order, constant=constant)

    def _reads(
        self, statistics: ConsumerStatistics, group: ChannelGroup
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]]:
        """Covariance, metric if it is another, weight, gain and units of every consumer."""
        totals = statistics.reads(group, Moments.total)
        if self.class_weight == 0.5:
            for p, weight, gain, units in totals:
                yield p, None, weight, gain, units
            return
        blends = statistics.reads(group, statistics.blend(self.class_weight))
        for (p, weight, gain, units), (metric, *_) in zip(totals, blends, strict=True):
            yield p, metric, weight, gain, units


def _unit_energy(p: Tensor, weight: Tensor, units: Tensor, n_units: int) -> Floats:
    """Variances of the features of every unit, weighted by who reads them: zero only if the unit cannot matter."""
    values = (p.diagonal(dim1=1, dim2=2).clamp_min(0.0) * weight.square().sum(1)).cpu().numpy().ravel()
    owner = units.cpu().numpy().ravel()
    return np.bincount(owner[owner >= 0], values[owner >= 0], n_units).astype(np.float64)
