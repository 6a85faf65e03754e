"""Recalibrate batch normalisation: after pruning, the running statistics belong to another network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .arguments import checked_model
from .batches import ForwardFn, WholeBatches, run_batch
from .guards import preserved

__all__ = ["Moments", "has_batch_norm", "recalibrate_batchnorm", "write_statistics"]

_BatchNorm = nn.modules.batchnorm._BatchNorm  # 1d, 2d, 3d and Sync


@dataclass(frozen=True)
class Moments:
    """Count, mean and centred sum of squares M₂ = Σ(x − mean)² per channel.

    Attributes:
        count: number of elements n per channel.
        mean: float64, shape (C,).
        m2: float64, shape (C,).

    Example:
        >>> a, b = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4)
        >>> pooled = Moments.of(a).merged(Moments.of(b))
        >>> torch.allclose(pooled.variance, torch.cat([a, b]).double().var((0, 2, 3)))
        True
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments of a batch ``x`` of shape (B, C, ...), accumulated in float64 whatever its dtype."""
        x = x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)  # MPS has no float64
        dims = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(dims)  # two passes are 2.5 times faster than torch.var_mean on a CPU
        m2 = (x - mean.view(1, -1, *[1] * (x.dim() - 2))).square_().sum(dims)
        return cls(x.numel() // x.shape[1], mean, m2)

    def merged(self, other: Moments) -> Moments:
        """Moments of both samples together, without cancellation.

        With n = n₁ + n₂ and δ = mean₂ − mean₁: mean = mean₁ + δ n₂/n and M₂ = M₂,₁ + M₂,₂ + δ² n₁ n₂/n
        (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances").

        Args:
            other: moments of the second sample.

        Returns:
            The pooled moments; every element weighs the same.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta.square() * (self.count * other.count / count))

    @property
    def variance(self) -> Tensor:
        """Unbiased variance M₂ / (n − 1), shape (C,)."""
        return self.m2 / (self.count - 1)


def recalibrate_batchnorm(
    model: nn.Module, loader: Iterable[Any], *, forward_fn: ForwardFn | None = None, progress: bool = False
) -> nn.Module:
    """Set the running statistics of all batch normalisation layers to those of ``loader``, in place.

    At the input of a layer let batch b have n_b elements per channel (samples × positions), mean m_b and biased
    variance v_b, and N = Σ n_b. The layer gets the statistics of all elements pooled,

        running_mean = Σ n_b m_b / N,
        running_var  = (Σ n_b (v_b + m_b²) / N − running_mean²) · N / (N − 1),

    accumulated in float64, so a short last batch weighs what its samples weigh; PyTorch's moving average depends on
    the order, and its cumulative average (``momentum=None``) weighs batches, not samples. While the batches run,
    batch normalisation uses the statistics of each batch and everything else is in eval mode. A module called
    several times per forward pass pools all its calls; one that is never called keeps its statistics. Layers
    without running statistics are left alone. ``num_batches_tracked`` becomes the number of batches. Training flags,
    ``requires_grad``, ``momentum`` and weights stay as they are; no gradients are computed. Distributed processes
    each see their own batches: run it in one.

    Args:
        model: the network, frozen or not, in any floating dtype.
        loader: iterable of batches, see :func:`~tp_importance.batches.split_batch`; labels are ignored. A few
            hundred samples usually do; at least two elements per channel in every batch; a last
            batch of one sample runs together with the one before it.
        forward_fn: ``forward_fn(model, batch)`` for batches of another form; it moves them itself.
        progress: show a progress bar.

    Returns:
        The same model.

    Raises:
        TypeError: if ``loader`` or its batches are of an unknown form, or the model is compiled.
        ValueError: if ``loader`` is empty, if a batch has fewer than two elements per channel, or if statistics are
            not finite in the dtype of the layer. After any exception, also one of ``loader`` or ``model``, the
            running statistics are bit for bit the old ones.

    Warns:
        UserWarning: if there is no layer to recalibrate, or none was called: nothing changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        >>> x, y = torch.randn(10, 3, 8, 8), torch.zeros(10)
        >>> _ = recalibrate_batchnorm(net, [(x[:8], y[:8]), (x[8:], y[8:])])
        >>> torch.allclose(net[1].running_mean, net[0](x).mean((0, 2, 3)), atol=1e-6)
        True

    Reference:
        Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3 (PreciseBN). Exact
        pooling of unequal batches by element count is our choice.
    """
    checked_model(model)
    layers = {m: name for name, m in model.named_modules() if _is_calibrated(m)}
    if not layers:
        warnings.warn("the model has no batch normalisation with running statistics: nothing changed", stacklevel=2)
        return model
    batches = WholeBatches(loader, 2)
    old = {m: [(b, b.clone()) for b in m._buffers.values() if b is not None] for m in layers}
    pooled: dict[Any, Moments] = {}
    done = False
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            for layer, name in layers.items():
                layer.training = True
                layer.register_forward_pre_hook(_collector(pooled, name), with_kwargs=True)
            for batch in tqdm(batches, "recalibrate", length_hint(loader) or None) if progress else batches:
                run_batch(model, batch, forward_fn)
        if not batches.given:
            raise ValueError("loader is empty (or a generator that was used up before): pass at least one batch")
        for layer, moments in pooled.items():
            write_statistics(layer, layers[layer], moments, batches.given)
        done = True
    finally:
        for layer, buffers in old.items():
            if not done or layer not in pooled:
                for buffer, values in buffers:
                    buffer.copy_(values)
    if not pooled:
        warnings.warn(f"none of the {len(layers)} batch normalisation layers was called: nothing changed", stacklevel=2)
    return model


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is anything for :func:`recalibrate_batchnorm` to do."""
    return any(map(_is_calibrated, model.modules()))


def _is_calibrated(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _collector(pooled: dict[Any, Moments], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def collect(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.dim() < 2:
            return  # the layer itself will refuse it
        count = x.numel() // max(x.shape[1], 1)
        if count < 2:
            raise ValueError(
                f"layer {name!r}: a batch with input of shape {tuple(x.shape)} has {count} element(s) per channel and "
                "so no variance; use larger batches, or drop_last=True in the loader"
            )
        moments = Moments.of(x)
        pooled[layer] = pooled[layer].merged(moments) if layer in pooled else moments

    return collect


def write_statistics(layer: Any, name: str, moments: Moments, batches: int) -> None:
    """Give a batch norm the statistics of its input; ``ValueError`` if they are not finite in its precision."""
    for key, value in (("running_mean", moments.mean), ("running_var", moments.variance)):
        buffer = getattr(layer, key)
        buffer.copy_(value)
        if not torch.isfinite(buffer).all():
            raise ValueError(
                f"layer {name!r}: {key} is not finite in {buffer.dtype} (largest value {value.abs().max().item():g}); "
                "check the batches for NaN and inf, or keep batch normalisation in float32"
            )
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)
