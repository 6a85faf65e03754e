"""Keep some classes of a classifier: the last step of pruning to a subtask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..core.arguments import unwrapped_model
from ..core.stale_optimizers import replacing

__all__ = ["slice_classifier"]


def slice_classifier(model: nn.Module, classes: Sequence[int], *, layer: nn.Linear | None = None) -> nn.Module:
    r"""Keep the rows of the classifier that belong to ``classes``, in place.

    Output c' of the result is output ``classes[c']`` of the original: :math:`W' = W_{classes}, b' = b_{classes}`.

    Args:
        model: the network.
        classes: labels to keep, in the order the outputs are to have.
        layer: the classifier; default: the last linear layer in the order of ``model.modules()``.

    Returns:
        ``model``.

    Raises:
        TypeError: if the model is none, or wrapped (``DistributedDataParallel``, ...).
        ValueError: if there is no linear layer, or a class is out of range or named twice.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10))
        >>> x = torch.randn(2, 4)
        >>> expected = net(x)[:, [7, 3]]
        >>> torch.allclose(slice_classifier(net, [7, 3])(x), expected)
        True
    """
    unwrapped_model(model)
    if layer is None:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise ValueError(f"{type(model).__name__} has no linear layer; pass layer=")
        layer = linear[-1]
    chosen = [int(c) for c in classes]
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= layer.out_features:
        raise ValueError(f"classes={chosen} must be different labels in 0..{layer.out_features - 1}")
    index = torch.tensor(chosen, device=layer.weight.device)
    with replacing(model):
        for name in ("weight", "bias"):
            old = getattr(layer, name)
            if old is not None:
                setattr(layer, name, nn.Parameter(old.detach()[index].clone(), requires_grad=old.requires_grad))
    layer.out_features = len(chosen)
    return model
