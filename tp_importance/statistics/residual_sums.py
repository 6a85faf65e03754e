"""Moments of what the outputs of consumers are added to, in one pass over data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..core.forward import ForwardFn
from ..core.precision import at_least_float, undisturbed
from ..errors import TracingError
from ..graph.activations import recording, watch_activations
from ..graph.residual_sums import addition
from ..maths.batchnorm import ChannelMoments, PooledMoments
from .labels import labels_per_position, labels_per_row

__all__ = ["watch_residual_sums"]


@contextmanager
def watch_residual_sums(
    model: nn.Module,
    norms: Mapping[str, nn.Module | None],
    into: PooledMoments,
    labels: Callable[[], Tensor | None],
    example_inputs: Any,
    forward_fn: ForwardFn | None,
) -> Iterator[None]:
    """While the model runs over the data, pool the moments of the sums that outputs of consumers are part of.

    Args:
        model: the network.
        norms: per consumer the batch norm behind it, if any.
        into: gets the moments per consumer; empty in the end if the model does other operations than on its example
            inputs.
        labels: gives those of the present batch; samples whose label is negative do not count.
        example_inputs: to find the sums with.
        forward_fn: how the model is called; also with the example inputs.

    Warns:
        UserWarning: if the model does other operations than on its example inputs; no sum is used then.
    """
    flow = recording(model, example_inputs, forward_fn)
    consumers: dict[int, list[str]] = {}
    for name, norm in norms.items():
        op = None if flow is None else addition(flow, name, norm)
        if op is not None:
            consumers.setdefault(op.outputs[0], []).append(name)
    if flow is None or not consumers:
        yield
        return
    lost: list[TracingError] = []

    def look(value: int, x: Tensor) -> None:
        first, now = consumers[value][0], labels()
        channels_first = x.dim() > 2 and not isinstance(model.get_submodule(first), nn.Linear)
        with undisturbed(x.device):
            if now is not None and bool((now < 0).any()):
                module = model.get_submodule(first)
                kept = labels_per_position(first, module, x, x, now) >= 0
                x = (
                    x.flatten(1, -2)[kept]
                    if kept.dim() == 2 and not channels_first
                    else x[labels_per_row(first, x, now) >= 0]
                )
            if not len(x):
                return
            new = ChannelMoments.of(at_least_float(x if channels_first else x.flatten(0, -2)))
        for name in consumers[value]:
            into.add(name, new)

    looks = {value: partial(look, value) for value in consumers}
    with watch_activations(model, flow, looks, otherwise=lost.append):
        yield
    if lost:
        into.clear()
        warnings.warn(f"{lost[0]}; losses are taken relative to single layers, not to residual sums", stacklevel=4)
