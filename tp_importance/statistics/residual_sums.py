"""Moments of what errors in the outputs of consumers disturb: sums, and norms behind them, in one pass over data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.precision import at_least_float, undisturbed
from ..errors import TracingError
from ..graph.activations import watch_activations
from ..graph.dataflow import Flow
from ..graph.residual_sums import addition, norm_behind
from ..maths.batchnorm import ChannelMoments, PooledMoments
from .labels import labels_per_position, labels_per_row

__all__ = ["Disturbed", "watch_residual_sums"]


@dataclass
class Disturbed:
    r"""What errors of consumers disturb.

    Where a layer norm alone reads the output of a consumer, or the sum it is added up to, errors count as the norm
    passes them on. To first order an error ε of channel o becomes :math:`\gamma_o \varepsilon_o / \sigma`, with σ of
    the token; what the norm gives is the measure. A channel that carries most of the variance of the sum, as in many
    language models, and that γ damps, would make all other errors look small. Ours.

    Attributes:
        sums: moments per consumer: of the sum, or behind the norm.
        inverse: per consumer with a norm behind it, the norm and the moments of 1/σ².
    """

    sums: PooledMoments = field(default_factory=PooledMoments)
    inverse: PooledMoments = field(default_factory=PooledMoments)
    norms: dict[str, nn.Module] = field(default_factory=dict)

    def gain(self, name: str) -> Tensor | None:
        """Root mean square of γ/σ per channel of the output of a consumer, shape (O,); ``None`` without a norm."""
        if name not in self.norms or name not in self.inverse:
            return None
        root = self.inverse[name].mean.sqrt()
        gamma = self.norms[name].weight
        return root if gamma is None else root * gamma.detach().abs().to(root)  # type: ignore[operator]

    def clear(self) -> None:
        """Forget everything."""
        for seen in (self.sums, self.inverse, self.norms):
            seen.clear()


@contextmanager
def watch_residual_sums(
    model: nn.Module,
    norms: Mapping[str, nn.Module | None],
    into: Disturbed,
    labels: Callable[[], Tensor | None],
    flow: Flow | None,
) -> Iterator[None]:
    """While the model runs over the data, pool the moments of what errors in the outputs of consumers disturb.

    Args:
        model: the network.
        norms: per consumer the batch norm behind it, if any.
        into: gets the moments; empty in the end if the model does other operations than on its example inputs.
        labels: gives those of the present batch; samples whose label is negative do not count.
        flow: of the call of the model, to find the sums with; ``None`` if later calls cannot be compared with it.

    Warns:
        UserWarning: if the model does other operations than on its example inputs; no sum is used then.
    """
    consumers: dict[int, list[str]] = {}
    for name, norm in norms.items():
        if flow is None:
            break
        behind = norm_behind(flow, name, norm)
        if behind is not None and isinstance(model.get_submodule(name), nn.Linear):
            consumers.setdefault(behind[0], []).append(name)
            into.norms[name] = behind[1]
        elif (op := addition(flow, name, norm)) is not None:
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
                if kept.dim() == 2 and channels_first:
                    kept = labels_per_row(first, x, now) >= 0
                x = x.flatten(1, -2)[kept] if kept.dim() == 2 else x[kept]
            if not len(x):
                return
            x = at_least_float(x if channels_first else x.flatten(0, -2))
            behind, inverse = into.norms.get(first), None
            if behind is not None:
                scale = _variance(behind, x)
                inverse, x = ChannelMoments.of(1 / scale), _normalised(behind, x)
            new = ChannelMoments.of(x)
        for name in consumers[value]:
            into.sums.add(name, new)
            if inverse is not None:
                into.inverse.add(name, inverse)

    looks = {value: partial(look, value) for value in consumers}
    with watch_activations(model, flow, looks, otherwise=lost.append):
        yield
    if lost:
        into.clear()
        warnings.warn(f"{lost[0]}; losses are taken relative to single layers, not to residual sums", stacklevel=4)


def _variance(norm: Any, x: Tensor) -> Tensor:
    """What a layer or RMS norm divides by, squared, shape (n, 1)."""
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    if isinstance(norm, nn.LayerNorm):
        return x.var(1, correction=0, keepdim=True) + eps
    return x.square().mean(1, keepdim=True) + eps


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """What the norm makes of x, but for a constant per channel."""
    centred = x - x.mean(1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    made = centred / _variance(norm, x).sqrt()
    return made if norm.weight is None else made * norm.weight.detach().to(made)
