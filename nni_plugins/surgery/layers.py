"""What ``ModelSpeedup`` of NNI 3.0 cannot do: remove a layer. Our own removal, from masks of NNI's format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tp_importance.core.guards import preserved, transaction
from tp_importance.methods.resconv import ResConv2d, fuse, remove_layers, resconv_layers
from tp_importance.methods.resconv.removal import outputs_of, require_same

__all__ = ["LAYER_TARGET", "remove_masked_layers"]

LAYER_TARGET = "s"
"""The parameter whose mask decides on a layer: the factor of its branch."""


def remove_masked_layers(
    model: nn.Module, example_inputs: Any, masks: Mapping[str, Mapping[str, Tensor | None]]
) -> nn.Module:
    r"""Remove every residual convolution whose mask of s is 0, and fuse the others; in place.

    The masked layer hands on :math:`a x`; :func:`tp_importance.methods.resconv.remove_layers` folds a into its
    neighbours.

    Args:
        model: a network with :class:`~tp_importance.methods.resconv.ResConv2d` layers, not wrapped.
        example_inputs: as for :func:`nni_plugins.speedup`.
        masks: ``{layer: {"s": mask of shape (1,)}}``; masks of other parameters must be all 1.

    Returns:
        ``model`` itself, without :class:`~tp_importance.methods.resconv.ResConv2d`.

    Raises:
        TypeError: if a mask is none.
        ValueError: for masks of unknown layers or other values, or that remove channels.
        RuntimeError: if the result computes something else. The model is unchanged on any error.

    Example:
        >>> import torch
        >>> from tp_importance import convert_to_resconv
        >>> x, layers = torch.randn(1, 4, 8, 8), [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
        >>> net = convert_to_resconv(nn.Sequential(*layers), x, a=0.5)
        >>> remove_masked_layers(net, x, {"1": {"s": torch.zeros(1)}})
        Sequential(
          (0): Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
          (1): Identity()
          (2): Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        )
    """
    layers = resconv_layers(model)
    gone = _masked(model, layers, masks)
    if not gone:
        warnings.warn("the masks remove no layer; the residual convolutions are fused", stacklevel=3)
    inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
    known = set(model.modules())
    with transaction(model), preserved(model):
        if gone:
            remove_layers(model, inputs, gone)
        if len(gone) < len(layers):
            before = outputs_of(model, inputs)
            fuse(model.eval())
            require_same(before, outputs_of(model, inputs), "fusing the residual convolutions")
    for module in set(model.modules()) - known:
        module.training = model.training
    return model


def _masked(
    model: nn.Module, layers: Mapping[str, ResConv2d], masks: Mapping[str, Mapping[str, Tensor | None]]
) -> list[str]:
    """Layers to remove, in the order of the network."""
    gone, known = set(), dict(model.named_modules(remove_duplicate=False))
    for name, targets in masks.items():
        if name not in known:
            raise ValueError(f"there is a mask of {name!r}, and the model has no layer of that name")
        for target, mask in targets.items():
            if mask is None:
                continue
            where = f"the mask of '{name}.{target}'"
            if not isinstance(mask, Tensor):
                raise TypeError(f"{where} is of type {type(mask).__name__}, not a tensor")
            if name in layers and target == LAYER_TARGET:
                if mask.numel() != 1 or mask.item() not in (0, 1):
                    raise ValueError(f"{where} must be one number, 0 (remove the layer) or 1 (keep it), not {mask}")
                if not mask.item():
                    gone.add(name)
            elif target == LAYER_TARGET:
                raise ValueError(
                    f"{where} is for a ResConv2d, and the model has none of that name; pass the model it was made on"
                )
            elif not bool((mask == 1).all()):
                raise ValueError(
                    f"{where} removes channels, which the shortcuts of the residual convolutions tie together; remove "
                    "layers and fuse first, then prune channels of the plain network that is left"
                )
    return [name for name in layers if name in gone]
