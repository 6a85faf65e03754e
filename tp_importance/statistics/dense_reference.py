"""The network before pruning, and which channels of its batch norms are left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.copies import copied
from .running_statistics import is_calibrated

__all__ = ["DenseReference"]

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
            old = kept.get(name, torch.arange(layers[name].num_features, device="cpu"))
            stay = torch.ones(len(old), dtype=torch.bool, device="cpu")
            stay[torch.as_tensor(gone, dtype=torch.int64, device="cpu")] = False
            kept[name] = old[stay]
        return replace(self, kept=kept)


def _sums(model: nn.Module) -> tuple[float, ...]:
    """Sum and sum of squares of every parameter and buffer."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if not t.is_complex()]
    wide = torch.float32 if any(t.device.type == "mps" for t in tensors) else torch.float64
    return tuple(float(v) for each in tensors for t in [each.to(wide)] for v in (t.sum(), t.square().sum()))


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
    return torch.tensor(channels, device="cpu")


def _permuted(before: Any, now: Any) -> bool:
    """Whether a batch norm has the same channels as before, in another order."""
    old, new = _rows(before), _rows(now)
    return not np.array_equal(old, new) and sorted(old.tolist()) == sorted(new.tolist())


def _rows(layer: Any) -> np.ndarray:
    """Weight, bias and running variance of every channel, shape (C, 3)."""
    var = layer.running_var
    columns = [torch.ones_like(var) if t is None else t.detach() for t in (layer.weight, layer.bias)]
    return torch.stack([t.double().cpu() for t in (*columns, var)], 1).numpy()
