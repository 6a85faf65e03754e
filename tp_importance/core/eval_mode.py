"""Warn of a training in eval mode."""

from __future__ import annotations

import warnings

from torch import nn

__all__ = ["warn_in_eval_mode"]


def warn_in_eval_mode(model: nn.Module, *, stacklevel: int = 2) -> bool:
    """Warn if a network in training is in eval mode and has layers that work otherwise then.

    Batch norms in eval mode normalise by statistics that do not follow the weights: the training diverges, to NaN in
    the end. Single layers in eval mode are the user's choice, if the network is in train mode.

    Args:
        model: the network, just after a training step.
        stacklevel: as for :func:`warnings.warn`.

    Returns:
        Whether it has warned.
    """
    if model.training:
        return False
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    layers = [name for name, m in model.named_modules() if isinstance(m, kinds) and not m.training]
    if layers:
        warnings.warn(
            f"{type(model).__name__} is trained in eval mode: {len(layers)} batch norm or dropout layers ({layers[0]}, "
            "say) do not work as in a training, which will diverge; call model.train() before the training",
            stacklevel=stacklevel,
        )
    return bool(layers)
