"""Recalibrate batch normalisation: after pruning, the running statistics belong to another network."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.arguments import checked_model
from ..core.copies import copied
from ..core.forward import ForwardFn, layer_input, run_batch
from ..core.guards import written
from ..core.loaders import WholeBatches
from ..core.processes import levels_up
from ..core.progress import track
from ..core.untouched import untouched
from ..maths.batchnorm import Moments, follow_change

__all__ = [
    "DenseReference",
    "has_batch_norm",
    "is_calibrated",
    "move_statistics",
    "recalibrate_batchnorm",
    "write_statistics",
]

_BatchNorm = nn.modules.batchnorm._BatchNorm  # 1d, 2d, 3d and Sync
Positions = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class DenseReference:
    """The network before pruning, and which channels of its batch norms are left.

    Attributes:
        model: a copy of the network.
        kept: by name of a batch norm the channels that are left, int64, ascending; one that is not named has them all.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> DenseReference.of(net).after({"1": [0, 2]}).after({"1": [1]}).kept["1"].tolist()
        [1]
    """

    model: nn.Module
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    _stamp: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> DenseReference:
        """A reference for a network that is about to be pruned; holds a copy of it."""
        with torch.inference_mode(False):  # a copy made under it could not be written to
            return cls(copied(model)).stamped(model)

    def stamped(self, model: nn.Module) -> DenseReference:
        """The reference, with the values that the network has now, by which :meth:`is_of` knows it."""
        return replace(self, _stamp=_sums(model))

    def is_of(self, model: nn.Module) -> bool:
        """Whether the values of the network are those it was last stamped with: nobody has trained it since."""
        now = _sums(model)
        close = (math.isclose(a, b, rel_tol=1e-9) for a, b in zip(self._stamp, now, strict=False))
        return len(self._stamp) == len(now) and all(close)  # the order of a sum depends on the threads

    @classmethod
    def matched(cls, dense: nn.Module, pruned: nn.Module) -> DenseReference:
        """A reference for a network that somebody else has pruned.

        Channels are recognised by weight, bias and running variance of their batch norm, which a surgery leaves as
        they are.

        Args:
            dense: the network before, in the shape and with the values it had.
            pruned: the network now, not yet trained or recalibrated.

        Raises:
            ValueError: if a batch norm is not in both, or its channels cannot be recognised; names it.
        """
        layers, kept = dict(dense.named_modules()), {}
        for name, layer in pruned.named_modules():
            if not is_calibrated(layer):
                continue
            before = layers.get(name)
            if before is None or not is_calibrated(before):
                raise ValueError(
                    f"layer {name!r} is a batch norm of the model but not of the reference: pass a copy of the model "
                    "that was made right before pruning, copy.deepcopy(model); for layers that ResConv has converted "
                    "use ResConvPruner(...).step(refit='batchnorm')"
                )
            if before.num_features != layer.num_features or _permuted(before, layer):
                kept[name] = _recognised(name, before, layer)
        return cls(dense, kept)

    def after(self, removed: Mapping[str, Positions]) -> DenseReference:
        """The reference after a surgery.

        Args:
            removed: by name of a batch norm the positions of the channels that went.
        """
        layers, kept = dict(self.model.named_modules()), dict(self.kept)
        for name, gone in removed.items():
            old = kept.get(name, torch.arange(layers[name].num_features))
            stay = torch.ones(len(old), dtype=torch.bool)
            stay[torch.as_tensor(gone, dtype=torch.int64)] = False
            kept[name] = old[stay]
        return replace(self, kept=kept)


def recalibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | DenseReference | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = False,
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
        progress: show a progress bar.

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
    checked_model(model)
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


def _sums(model: nn.Module) -> tuple[float, ...]:
    """Sum and sum of squares of every parameter and buffer."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if not t.is_complex()]
    wide = torch.float32 if any(t.device.type == "mps" for t in tensors) else torch.float64
    return tuple(float(v) for each in tensors for t in [each.to(wide)] for v in (t.sum(), t.square().sum()))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is anything for :func:`recalibrate_batchnorm` to do."""
    return any(map(is_calibrated, model.modules()))


def is_calibrated(module: nn.Module | None) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _batch_moments(
    networks: Sequence[nn.Module], loader: Iterable[Any], forward_fn: ForwardFn | None, progress: bool
) -> tuple[list[dict[str, Moments]], int]:
    """Moments at every batch norm of every network over the same batches, and their number; buffers stay."""
    pooled: list[dict[str, Moments]] = [{} for _ in networks]
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


def _collector(pooled: dict[str, Moments], name: str) -> Callable[[nn.Module, Any, Any], None]:
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
        moments = Moments.of(x)
        pooled[name] = pooled[name].merged(moments) if name in pooled else moments

    return collect


def _recognised(name: str, before: Any, now: Any) -> Tensor:
    """Positions in a batch norm before surgery of the channels it has now."""
    old, new = _rows(before), _rows(now)
    _, code = np.unique(np.concatenate([old, new]), axis=0, return_inverse=True)
    there, left = (part.tolist() for part in np.split(code.ravel(), [len(old)]))
    counts, stay = Counter(there), Counter(left)
    # equal channels of which some went could be any of them; without gain it does not matter which
    doubtful = any(stay[c] < counts[c] and row[0] for row, c in zip(new, left, strict=True))
    channels, at = list[int](), iter(enumerate(there))
    for c in left:
        channels += next(([i] for i, other in at if other == c), [])
    if doubtful or len(channels) < len(left):
        raise ValueError(
            f"layer {name!r}: its {len(new)} channels cannot be told among the {len(old)} of the reference by weight, "
            "bias and running variance. Either they have changed since: recalibrate right after pruning, with a copy "
            "made right before it. Or several are alike, as in a network that was never trained; then leave "
            "reference= out"
        )
    return torch.tensor(channels)


def _permuted(before: Any, now: Any) -> bool:
    """Whether a batch norm has the same channels as before, in another order."""
    old, new = _rows(before), _rows(now)
    return not np.array_equal(old, new) and sorted(old.tolist()) == sorted(new.tolist())


def _rows(layer: Any) -> np.ndarray:
    """Weight, bias and running variance of every channel, shape (C, 3)."""
    var = layer.running_var
    columns = [torch.ones_like(var) if t is None else t.detach() for t in (layer.weight, layer.bias)]
    return torch.stack([t.double().cpu() for t in (*columns, var)], 1).numpy()


def write_statistics(layer: Any, name: str, moments: Moments, batches: int) -> None:
    """Give a batch norm the statistics of its input; ``ValueError`` if they are not finite in its precision."""
    _write(layer, name, moments.mean, moments.variance)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)


def move_statistics(
    layer: Any, name: str, dense: Moments, pruned: Moments, before: Any = None, kept: Tensor | None = None
) -> None:
    """Move the statistics of a batch norm by the change of its input, see :func:`.maths.batchnorm.follow_change`.

    Args:
        layer: the batch norm as it is now, C' channels; gets the new statistics.
        name: its name.
        dense: moments of its input before pruning, shape (C,).
        pruned: moments of its input now, on the same batches, shape (C',).
        before: the batch norm before pruning; default: ``layer``.
        kept: positions of the channels that are left, shape (C',); default: all.

    Raises:
        ValueError: if the result is not finite in the precision of the layer.
    """
    before, here = layer if before is None else before, pruned.mean.device
    mean, var = before.running_mean.to(here), before.running_var.to(here)
    dense = Moments(dense.count, dense.mean.to(here), dense.m2.to(here))
    if kept is not None:
        mean, var, dense = mean[kept.to(here)], var[kept.to(here)], dense.take(kept)
    _write(layer, name, *follow_change(mean, var, dense, pruned))


def _write(layer: Any, name: str, mean: Tensor, var: Tensor) -> None:
    for key, value in (("running_mean", mean), ("running_var", var)):
        buffer = getattr(layer, key)
        buffer.copy_(value)
        if not torch.isfinite(buffer).all():
            raise ValueError(
                f"layer {name!r}: {key} is not finite in {buffer.dtype} (largest value {value.abs().max().item():g}); "
                "check the batches for NaN and inf, or keep batch normalisation in float32"
            )
