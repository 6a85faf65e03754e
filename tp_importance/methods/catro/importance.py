"""CATRO: class-aware channel selection (arXiv 2110.10921)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...allocation.curves import Curve
from ...core.progress import track
from ...core.types import Floats, Ints
from ...graph.groups import ChannelGroup, PrunableGroups
from ...graph.layer_kinds import CONV
from ...maths.moments import NEGLIGIBLE, Moments, eliminate
from ...pruning.importance import StatisticalImportance
from ...statistics.consumers import ConsumerStatistics, check_reading
from ...statistics.group_weights import summed_l1_norms
from ...statistics.observe import Watch, WatchFn
from .trace_ratio import ClassScatter, select, top_d_values

__all__ = ["CATROImportance"]

Space = Literal["consumer", "channel"]


class CATROImportance(StatisticalImportance):
    r"""Class-aware trace-ratio importance (CATRO, arXiv 2110.10921).

    ``space="consumer"`` (default, ours): scatter is measured where the next layer reads the channels,

    .. math:: S_{ij} = \sum_o g_o^2 \, \overline{\tilde c_{i,o}\, \tilde c_{j,o}}, \qquad
              S = 2\,(\theta S_b + (1 - \theta) S_w)

    with :math:`c_{i,o}` channel i's contribution to output o of the consumer, g the gain of the batch norm behind it
    and θ = ``class_weight``; a set R of channels loses :math:`1_R^\top S 1_R`, over :math:`(1^\top S 1)^{3/4}`, the
    energy of the whole group there. Channels go by backward elimination; θ = ½ is the total scatter
    :math:`S_t = S_b + S_w`.

    ``space="channel"`` (the literal form): :math:`b_i, w_i` per channel and the set of d channels with the largest
    :math:`\sum b / \sum w`. On real networks it is at the level of random pruning (docs/benchmarks.md).

    Args:
        space: ``"consumer"`` or ``"channel"``.
        classes: labels of a classification subtask; samples of other classes are not counted.
        class_weight: θ in [0, 1]; only ``"consumer"``.
        positions: output positions per sample at which consumers are watched, ``None`` for all; only ``"consumer"``.
        pool: average a channel over its positions (p = 1) instead of taking the map (p = H·W); only ``"channel"``.
        ratio: λ of the gain b − λw: ``"min"`` (the smallest b/w, gains ≥ 0) or ``"full"`` (λ of all channels).
        seed: of the sampled positions.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)]
        >>> importance = CATROImportance().collect(net.eval(), torch.randn(1, 3, 8, 8), loader)
        >>> tp.pruner.BasePruner(net, torch.randn(1, 3, 8, 8), importance, pruning_ratio=0.5,
        ...                      ignored_layers=[net[-1]]).step()
        >>> net[0].out_channels
        4
    """

    def __init__(
        self,
        *,
        space: Space = "consumer",
        classes: Sequence[int] | None = None,
        class_weight: float = 0.5,
        positions: int | None = 8,
        pool: bool = True,
        ratio: Literal["min", "full"] = "min",
        seed: int = 0,
    ) -> None:
        super().__init__(classes=classes)
        if space not in ("consumer", "channel"):
            raise ValueError(f"space={space!r} is unknown; choose 'consumer' or 'channel'")
        if ratio not in ("min", "full"):
            raise ValueError(f"ratio={ratio!r} is unknown; choose 'min' or 'full'")
        check_reading(class_weight, positions)
        self.space, self.class_weight, self.positions, self.pool = space, class_weight, positions, pool
        self.ratio, self.seed = ratio, seed
        self._consumers: ConsumerStatistics | None = None
        self._scatter: dict[str, ClassScatter] = {}

    @property
    def consumer_statistics(self) -> ConsumerStatistics | None:
        """What the consumers received when the statistics were collected; spares a refit its own pass."""
        return self._consumers

    def watches(self, groups: PrunableGroups) -> list[Watch]:
        """See :meth:`~tp_importance.StatisticalImportance.watches`."""
        if self.space == "consumer":
            self._consumers = ConsumerStatistics(groups, positions=self.positions, seed=self.seed)
            return self._consumers.watches()
        return _channel_watches(groups, self._scatter, self.pool)

    def value(self, groups: PrunableGroups) -> dict[str, Curve]:
        """See :meth:`~tp_importance.StatisticalImportance.value`."""
        if self.space == "consumer":
            assert self._consumers is not None
            consumers = self._consumers
            return {g.name: self._consumer_curve(consumers, groups, g) for g in _each(groups)}
        _require_finite(self._scatter)
        return {
            g.name: _channel_curve(groups, g, self._scatter[g.consumers[0].name], self.ratio) for g in _each(groups)
        }

    def _consumer_curve(self, consumers: ConsumerStatistics, groups: PrunableGroups, group: ChannelGroup) -> Curve:
        total = consumers.scatter(group, Moments.total)
        energy = total.diagonal().cpu().numpy()
        constant = np.flatnonzero(energy <= NEGLIGIBLE * max(energy.max(initial=0.0), 1e-300))
        scatter = total if self.class_weight == 0.5 else consumers.scatter(group, consumers.blend(self.class_weight))
        elimination = eliminate(scatter, summed_l1_norms(groups, group))
        return Curve(elimination.loss, elimination.order, constant=constant)


def _each(groups: PrunableGroups) -> Iterator[ChannelGroup]:
    return track(groups, "ordering channels", unit="group")


def _channel_curve(
    groups: PrunableGroups, group: ChannelGroup, statistics: ClassScatter, ratio: Literal["min", "full"]
) -> Curve:
    b, w = (_per_unit(group, v.cpu().numpy()) for v in statistics.scatter())
    total = b + w
    constant = np.flatnonzero(total <= NEGLIGIBLE * max(total.max(initial=0.0), 1e-300))
    alive = np.setdiff1d(np.arange(len(b)), constant)
    norms = summed_l1_norms(groups, group)
    if not len(alive):  # the whole group is constant: it loses nothing at any width
        return Curve(np.zeros(len(b) + 1), np.argsort(norms, kind="stable"), constant=constant)
    ratios = b[alive] / np.maximum(w[alive], 1e-300)
    factor = float(ratios.min() if ratio == "min" else b[alive].sum() / max(w[alive].sum(), 1e-300))
    value = b - factor * w
    value[constant] = -np.inf
    gain = top_d_values(b[alive], w[alive], factor)
    gain = gain / gain.max() if gain.max() > 0 else np.linspace(0.0, 1.0, len(gain))
    gain = np.pad(gain, (0, len(constant)), mode="edge")
    return Curve(gain.max() - gain, np.lexsort((norms, value)), _BestSets(b, w, alive), constant)


class _BestSets(Mapping[int, Ints]):
    """Units of the best set per width, found when asked for: optimal sets are not nested."""

    def __init__(self, b: Floats, w: Floats, alive: Ints) -> None:
        self._b, self._w, self._alive = b[alive], w[alive], alive

    def __getitem__(self, width: int) -> Ints:
        if not 1 <= width < len(self._alive):
            raise KeyError(width)
        return self._alive[select(self._b, self._w, width).chosen]

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self._alive)))

    def __len__(self) -> int:
        return max(len(self._alive) - 1, 0)

    def __contains__(self, width: object) -> bool:
        return isinstance(width, int) and 1 <= width < len(self._alive)


def _per_unit(group: ChannelGroup, values: Floats) -> Floats:
    """Sum of the channels of every unit at the group's first consumer."""
    member = group.consumers[0]
    return np.bincount(member.units, values[member.channels], group.n_units).astype(np.float64)


def _channel_watches(groups: PrunableGroups, store: dict[str, ClassScatter], pool: bool) -> list[Watch]:
    """Watch what the first consumer of every group receives."""
    store.clear()
    for group in groups:
        store[group.consumers[0].name] = ClassScatter()
    modules = {name: groups.trace.model.get_submodule(name) for name in store}
    return [Watch(name, modules[name], _feed(modules[name], store[name], pool)) for name in store]


def _require_finite(store: Mapping[str, ClassScatter]) -> None:
    """Refuse sums over values that were not finite: so are the sums, whatever came after."""
    for name, statistics in store.items():
        if statistics.squares is not None and not torch.isfinite(statistics.squares).all():
            raise ValueError(f"the input of layer {name} is not finite; check the data and the model")


def _feed(module: nn.Module, statistics: ClassScatter, pool: bool) -> WatchFn:
    def fn(x: Tensor, _out: Tensor, labels: Tensor) -> None:
        if isinstance(module, CONV):
            x = x.flatten(2)
        else:
            x = x.unsqueeze(2) if x.dim() == 2 else x.flatten(1, -2).transpose(1, 2)
        x = x.mean(2, keepdim=True) if pool else x
        keep = labels >= 0
        statistics.update(x[keep], labels[keep])

    return fn
