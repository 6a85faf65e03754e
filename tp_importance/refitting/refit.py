"""Refit the consumers to what stays, before any host removes the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..core.arguments import require_writable
from ..core.forward import ForwardFn
from ..core.guards import written
from ..core.processes import warned_once
from ..core.progress import shown, track
from ..graph.discovery import prunable_groups
from ..graph.groups import PrunableGroups
from ..refitting.report import RefitReport, RefitRow
from ..statistics.consumers import ConsumerStatistics
from ..statistics.labels import LabelFn
from ..statistics.observe import observe
from .layers import LayerRefit, refittable, touched
from .sequential import SequentialRefit
from .settings import Refit, Ridge
from .solving import refitted_by_moments

__all__ = ["refit_consumers"]


@warned_once()
def refit_consumers(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    removed: Mapping[str, Sequence[int]],
    refit: Refit | str = "sequential",
    *,
    groups: PrunableGroups | None = None,
    statistics: ConsumerStatistics | None = None,
    leave: Mapping[str, str] | None = None,
    classes: Sequence[int] | None = None,
    forward_fn: ForwardFn | None = None,
    label_fn: LabelFn | None = None,
    progress: bool | None = None,
) -> RefitReport:
    r"""Refit all consumers to the removal of units that is about to take place; the shapes stay.

    With :math:`P` the covariance of a consumer's unfolded inputs, k the features that stay and r those that go
    (of all groups it reads),

    .. math:: W'_k = W_k + (P_{kk} + \epsilon I)^{-1} P_{kr} W_r, \qquad W'_r = 0,

    and what the mean output has changed goes into the bias (b' = b + Wᵀm − W'ᵀm) or, without one, into the running
    mean of the batch norm behind. Without either, P is the uncentred second moment. The groups are such that removing
    is masking, and a channel that no consumer weighs is as good as masked; so any host may remove the units afterwards.

    Args:
        model: the network, of the shape before surgery; weights and running means are changed in place.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: re-iterable of batches; labels are needed only with ``classes``.
        removed: units to be removed, per group name.
        refit: settings, or a mode. With ``recalibrate``, sequential mode moves the statistics of every batch norm by
            the change of its input as soon as that is final, but for those behind a refitted layer: least squares has
            set their means, and rescaling would enlarge its errors. After a parallel refit and the surgery call
            :func:`~tp_importance.recalibrate_batchnorm`.
        groups: groups of the model, if they are at hand.
        statistics: what the consumers of these groups receive, if it was collected already; spares the pass.
        leave: consumers that are not to be refitted, and why.
        classes: only samples of these labels count.
        forward_fn: ``forward_fn(model, batch)``.
        label_fn: ``label_fn(batch)``.
        progress: show a progress bar; by default in a terminal.

    Returns:
        The :class:`~tp_importance.refitting.report.RefitReport`.

    Raises:
        ValueError: for settings that give no new weights, unknown groups or units, bad data, or weights that are not
            finite; the model is then as before.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> x = torch.randn(16, 3, 12, 12)
        >>> report = refit_consumers(net, x[:2], [x], {"0": [1, 5]})
        >>> [(r.name, r.kept, r.removed, r.after < r.before) for r in report.rows]
        [('2', 54, 18, True), ('4', 36, 0, True)]
        >>> int((net[2].weight == 0).flatten(2).all(2).all(0).sum())  # ready for the surgery
        2
    """
    settings = Refit.of_weights(refit)
    require_writable(model)
    if groups is None:
        groups = prunable_groups(model, example_inputs, forward_fn=forward_fn, progress=progress)
    elif groups.trace.model is not model:
        raise ValueError(f"the groups are of another {type(groups.trace.model).__name__} than the model")
    downstream = settings.mode == "sequential" and settings.downstream
    refits, rows = refittable(groups, removed, leave, downstream=downstream)
    passes = 0
    if refits and settings.mode == "sequential":
        sequence = SequentialRefit(
            groups,
            removed,
            refits,
            settings,
            example_inputs,
            classes=classes,
            forward_fn=forward_fn,
            label_fn=label_fn,
        )
        with written((*model.parameters(), *model.buffers())), shown(progress):
            rows += sequence.run(loader)
        passes = sequence.passes
    elif refits:
        if statistics is None:
            statistics = ConsumerStatistics(touched(groups, removed), positions=settings.sampled, seed=settings.seed)
            observe(
                model,
                loader,
                statistics.watches(),
                classes=classes,
                forward_fn=forward_fn,
                label_fn=label_fn,
                need_labels=classes is not None,
                progress=progress,
            )
            passes = 1
        with shown(progress):
            rows += _in_parallel(refits, statistics, settings.ridge)
    order = groups.trace.first_call()
    return RefitReport(settings.mode, passes, sorted(rows, key=lambda r: order.get(r.name, len(order))))


def _in_parallel(refits: Sequence[LayerRefit], statistics: ConsumerStatistics, ridge: Ridge) -> list[RefitRow]:
    rows = []
    with written(t for r in refits for t in r.tensors()):
        for r in track(refits, "refitting", unit="layer"):
            rows.append(refitted_by_moments(r, statistics.moments(r.name), ridge))
    return rows
