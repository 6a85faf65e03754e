"""Refit the layers of a network to what those of another one give, of which some layers do something else."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..core.forward import ForwardFn
from ..core.guards import written
from ..graph.groups import PrunableGroups
from ..graph.layer_kinds import CONV
from ..graph.trace_options import TraceOptions
from ..graph.tracing import trace
from .layers import whole
from .report import RefitReport
from .sequential import SequentialRefit
from .settings import Refit

__all__ = ["refit_towards"]


def refit_towards(
    model: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    changed: Collection[str],
    settings: Refit,
    *,
    forward_fn: ForwardFn | None = None,
) -> RefitReport:
    r"""Refit, in place, all layers behind those that have changed, one after the other.

    Each is refitted to its inputs in ``model`` with targets from ``dense``.

    With the unfolded inputs u of a layer in ``model`` and its outputs y in ``dense``,

    .. math:: W' = \arg\min_W \sum \|W u - y\|^2 + \epsilon \|W - W_0\|^2,

    and where y is added to a tensor z that is there already, y + z is wanted: so it makes up for what z lacks.

    Args:
        model: the network; weights, and biases or running means behind them, change.
        dense: a network of the same modules and operations; is not changed.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: re-iterable of batches.
        changed: convolutions and linear layers in which the networks differ; they stay as they are.
        settings: of a sequential refit.
        forward_fn: ``forward_fn(model, batch)``.

    Raises:
        ValueError: for bad data, or weights that are not finite; the model is then as before.

    Example:
        >>> import copy, torch
        >>> net = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
        >>> dense, x = copy.deepcopy(net), torch.randn(64, 4, 6, 6)
        >>> _ = nn.init.dirac_(net[0].weight), nn.init.zeros_(net[0].bias)  # as if it were removed
        >>> before = (net(x) - dense(x)).square().mean()
        >>> report = refit_towards(net, dense, x[:2], [x], ["0"], Refit())
        >>> [row.name for row in report.rows], bool((net(x) - dense(x)).square().mean() < 0.7 * before)
        (['1', '2'], True)

    Source: ours.
    """
    traced = trace(model, example_inputs, TraceOptions(forward_fn=forward_fn))
    order = traced.first_call()
    first = min((order[name] for name in changed if name in order), default=len(order))
    layers = {n for n, m in model.named_modules() if isinstance(m, (*CONV, nn.Linear))} - set(changed)
    behind = sorted((n for n in layers if order.get(n, -1) > first), key=lambda n: order[n])
    refits, rows = whole(traced, behind)
    if not refits:
        return RefitReport("sequential", 0, rows)
    nothing = PrunableGroups([], [], traced, traced.options)
    sequence = SequentialRefit(nothing, {}, refits, settings, example_inputs, forward_fn=forward_fn, dense=dense)
    with written((*model.parameters(), *model.buffers())):
        rows += sequence.run(loader)
    return RefitReport("sequential", sequence.passes, sorted(rows, key=lambda r: order[r.name]))
