"""Refit for NNI's masks: refit the layers that read masked channels, before ``speedup`` removes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tp_importance import Refit, prunable_groups
from tp_importance.core.forward import ForwardFn
from tp_importance.graph.classes import build_groups
from tp_importance.graph.groups import PrunableGroups
from tp_importance.refitted_step import Removal
from tp_importance.refitting.refit import refit_consumers
from tp_importance.refitting.report import RefitReport
from tp_importance.statistics.labels import LabelFn

from .surgery.masks import checked_masks
from .surgery.units import dead_units, made_in_part, masked_axes
from .wrappers import require_unwrapped

__all__ = ["refit_masks"]


def refit_masks(
    model: nn.Module,
    masks: Mapping[str, Mapping[str, Tensor | None]],
    loader: Iterable[Any],
    example_inputs: Any,
    refit: Refit | str = "sequential",
    *,
    groups: PrunableGroups | None = None,
    forward_fn: ForwardFn | None = None,
    label_fn: LabelFn | None = None,
    progress: bool | None = None,
) -> RefitReport:
    """Refit the consumers of masked channels, in place; then call :func:`nni_plugins.speedup` with the same masks.

    For masks of any NNI pruner. A unit counts as removed if its rows are masked in *all* layers that make it, or its
    columns in all that read it, for then ``speedup`` takes it out. After the refit no layer weighs a removed channel
    any more, so that masked and smaller network agree even where the masks of the batch norms were not aligned. Masked
    channels that stay, or of groups for which removal is not masking, are reported and not made up for.

    Args:
        model: the network, after ``pruner.unwrap_model()``: its weights are the targets of the refit.
        masks: as returned by ``compress()`` of an NNI pruner.
        loader: re-iterable of batches.
        example_inputs: tensor, tuple or dict, batch dimension first.
        refit: settings, or ``"sequential"`` or ``"parallel"``, see :class:`tp_importance.Refit`.
        groups: groups of the model, if they are at hand.
        forward_fn: ``forward_fn(model, batch)``.
        label_fn: ``label_fn(batch)``.
        progress: show a progress bar; by default in a terminal.

    Returns:
        The :class:`tp_importance.refitting.report.RefitReport`.

    Raises:
        RuntimeError: if the model is still wrapped.
        TypeError: if the masks are not a dict of dicts of tensors.
        ValueError: for masks that :func:`nni_plugins.speedup` refuses, or bad data; the model is then as before.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> x, rows = torch.randn(16, 3, 12, 12), torch.ones(8, 1, 1, 1)
        >>> rows[[1, 5]] = 0
        >>> report = refit_masks(net, {"0": {"weight": rows, "bias": rows.flatten()}}, [x], x[:2])
        >>> [(r.name, r.removed, r.after < r.before) for r in report.rows]
        [('2', 18, True), ('4', 0, True)]
    """
    require_unwrapped(model)
    full = checked_masks(model, masks)
    if groups is None:
        groups = prunable_groups(model, example_inputs, forward_fn=forward_fn, progress=progress)
    what = _removal(groups, full)
    report = refit_consumers(
        model,
        example_inputs,
        loader,
        what.units,
        refit,
        groups=groups,
        leave=what.leave,
        forward_fn=forward_fn,
        label_fn=label_fn,
        progress=progress,
    )
    return what.added_to(report)


def _removal(groups: PrunableGroups, masks: Mapping[str, Mapping[str, Tensor]]) -> Removal:
    result, model = Removal(), groups.trace.model
    axes = masked_axes(model, masks)
    refused = {e.name: e.reason for e in groups.excluded}
    for group in build_groups(groups.trace, options=groups.options):  # those that were refused have consumers, too
        dead = dead_units(group, axes)
        some = dead | made_in_part(group, axes)
        if not some:
            continue
        reason = ""
        if group.name not in groups.names:
            reason = f"it reads masked channels of {group.name}: {refused.get(group.name, 'not a group to prune')}"
        elif some != dead:
            reason = f"not all layers that make the channels of {group.name} are masked, so they stay"
        if not reason:
            result.units[group.name] = sorted(dead)
        for m in group.consumers if reason else ():
            alive = np.ones(m.width, bool)
            alive[m.positions(some)] = False
            result.cannot_refit(reason, model.get_submodule(m.name), m.name, torch.from_numpy(alive))
    return result
