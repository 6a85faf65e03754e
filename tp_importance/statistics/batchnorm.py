"""Recalibrate batch normalisation: after pruning, the running statistics belong to another network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import checked_model, require_writable
from ..core.forward import ForwardFn, layer_input, run_batch
from ..core.guards import written
from ..core.loaders import WholeBatches
from ..core.processes import levels_up
from ..core.progress import track
from ..core.untouched import untouched
from ..maths.batchnorm import ChannelMoments, PooledMoments
from .dense_reference import DenseReference
from .running_statistics import is_calibrated, move_statistics, write_statistics

__all__ = ["recalibrate_batchnorm"]


def recalibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | DenseReference | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool | None = None,
) -> nn.Module:
    r"""Adjust the running statistics of all batch normalisation layers to the network as it is now, in place.

    At the input of a layer let batch b have n_b elements per channel (samples × positions), mean m_b and biased
    variance v_b, and N = Σ n_b. All elements pooled have

        m = Σ n_b m_b / N,
        v = (Σ n_b (v_b + m_b²) / N − m²) · N / (N − 1),

    accumulated in float64, so a short last batch weighs what its samples weigh; PyTorch's moving average depends on
    the order, and its cumulative average (``momentum=None``) weighs batches, not samples.

    **With a reference**, the network before pruning, both run on the same batches, and the statistics the reference
    has are moved by the change: running_mean = m + r (μ − m_ref) and running_var = r² σ², r² = v / v_ref, see
    :func:`~tp_importance.maths.batchnorm.follow_change`. What training saw and these images do not show is kept:
    a network that was not pruned keeps its statistics. Better than anew, or as good, in all that was measured
    (docs/benchmarks.md, "Batch norms after pruning"), and what the pruners do.

    **Without one**, the layer gets the statistics of the images themselves, m and v. That is for networks without
    usable statistics, and costs accuracy where training augmented its images.

    While the batches run, batch normalisation uses the statistics of each batch and everything else is in eval mode. A
    module called several times per forward pass pools all its calls; one that is never called keeps its statistics.
    Layers without running statistics are left alone. ``num_batches_tracked`` becomes the number of batches, with a
    reference it stays. Training flags, ``requires_grad``, ``momentum`` and weights stay as they are; no gradients are
    computed. Distributed processes each see their own batches: run it in one.

    Args:
        model: the network, frozen or not, in any floating dtype.
        loader: iterable of batches, see :func:`~tp_importance.core.batches.split_batch`; labels are ignored. A few
            hundred samples usually do; at least two elements per channel in every batch; a last batch of one sample
            runs together with the one before it.
        reference: ``copy.deepcopy(model)`` made before pruning; it comes back as it was.
        forward_fn: ``forward_fn(model, batch)`` for batches of another form; it moves them itself.
        progress: show a progress bar; by default in a terminal.

    Returns:
        The same model.

    Raises:
        TypeError: if ``loader`` or its batches are of an unknown form, or the model is compiled.
        ValueError: if ``loader`` is empty, if a batch has fewer than two elements per channel, if statistics are not
            finite in the dtype of the layer, or if the reference has other batch norms. After any exception, also one
            of ``loader`` or ``model``, the running statistics are bit for bit the old ones.

    Warns:
        UserWarning: if there is no layer to recalibrate, or none was called: nothing changed. Frozen batch norms and
            instance norms are none: they keep their statistics.

    Example:
        >>> import copy
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        >>> dense, x = copy.deepcopy(net), torch.randn(10, 3, 8, 8)
        >>> _ = net[0].weight.data.mul_(2)  # a change of scale
        >>> _ = recalibrate_batchnorm(net, [x], reference=dense)
        >>> torch.allclose(net[1].running_var, 4 * dense[1].running_var)
        True
        >>> _ = recalibrate_batchnorm(net, [(x[:8], torch.zeros(8)), (x[8:], torch.zeros(2))])
        >>> torch.allclose(net[1].running_mean, net[0](x).mean((0, 2, 3)), atol=1e-6)
        True

    Reference:
        Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3 (PreciseBN). Exact
        pooling of unequal batches by element count, and moving the statistics by the change, are ours.
    """
    require_writable(checked_model(model))
    layers = {name: m for name, m in model.named_modules() if is_calibrated(m)}
    if not layers:
        warnings.warn(
            "the model has no batch normalisation with running statistics: nothing changed", stacklevel=levels_up()
        )
        return model
    if reference is not None and not isinstance(reference, DenseReference):
        reference = DenseReference.matched(checked_model(reference, "reference"), model)
    networks = [model] if reference is None else [model, reference.model]
    found, count = _batch_moments(networks, loader, forward_fn, progress)
    if not found[0]:
        warnings.warn(
            f"none of the {len(layers)} batch normalisation layers was called: nothing changed", stacklevel=levels_up()
        )
    with written(b for m in layers.values() for b in m.buffers(recurse=False)):
        for name, moments in found[0].items():
            if reference is None:
                write_statistics(layers[name], name, moments, count)
            elif name not in found[1]:
                raise ValueError(
                    f"layer {name!r} ran in the model but not in the reference: forward_fn must call the model it gets"
                )
            else:
                before = reference.model.get_submodule(name)
                move_statistics(layers[name], name, found[1][name], moments, before, reference.kept.get(name))
    return model


def _batch_moments(
    networks: Sequence[nn.Module], loader: Iterable[Any], forward_fn: ForwardFn | None, progress: bool | None
) -> tuple[list[PooledMoments], int]:
    """ChannelMoments at every batch norm of every network over the same batches, and their number; buffers stay."""
    pooled = [PooledMoments() for _ in networks]
    batches = WholeBatches(loader, 2)
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for network, mine in zip(networks, pooled, strict=True):
            layers = {name: m for name, m in network.named_modules() if is_calibrated(m)}
            stack.enter_context(untouched(network))
            network.eval()
            for name, layer in layers.items():
                layer.training = True
                layer.register_forward_pre_hook(_collector(mine, name), with_kwargs=True)
        total = length_hint(loader)
        for batch in track(batches, "recalibrating batch norms", total, unit="batch", progress=progress):
            for network in networks:
                run_batch(network, batch, forward_fn)
    if not batches.given:
        raise ValueError("loader is empty (or a generator that was used up before): pass at least one batch")
    return pooled, batches.given


def _collector(pooled: PooledMoments, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def collect(_layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = layer_input(args, kwargs)
        if x.dim() < 2:
            return  # the layer itself will refuse it
        count = x.numel() // max(x.shape[1], 1)
        if count < 2:
            raise ValueError(
                f"layer {name!r}: a batch with input of shape {tuple(x.shape)} has {count} element(s) per channel and "
                "so no variance; use larger batches, or drop_last=True in the loader"
            )
        pooled.add(name, ChannelMoments.of(x))

    return collect
