"""Masks in NNI's format, checked against the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Masks", "apply_masks", "as_masks", "checked_masks", "kept_positions"]

Masks = Mapping[str, Mapping[str, Tensor | None]]

AS_RETURNED = "pass the dict returned by compress() of an NNI pruner, {module name: {parameter name: tensor or None}}"


def as_masks(masks: Any) -> Masks:
    """The masks, if they are dicts in a dict; else ``TypeError``."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks are of type {type(masks).__name__}; {AS_RETURNED}")
    for name, targets in masks.items():
        if not isinstance(targets, Mapping):
            raise TypeError(f"the masks of {name!r} are of type {type(targets).__name__}; {AS_RETURNED}")
    return masks


def checked_masks(model: nn.Module, masks: Masks) -> dict[str, dict[str, Tensor]]:
    """Own copies of the masks, of full shape, without the empty ones; errors as :func:`nni_plugins.speedup`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    checked: dict[str, dict[str, Tensor]] = {}
    for name, targets in as_masks(masks).items():
        if name not in modules:
            raise ValueError(
                f"masks name a module {name!r} that the model does not have; pass the model they were made on"
            )
        full = {
            target: _checked_mask(f"{name}.{target}", mask, _maskable(modules[name], target))
            for target, mask in targets.items()
            if mask is not None and not _is_idle(mask, modules[name], target)
        }
        if full:
            checked[name] = full
            _check_agreement(name, modules[name], full)
    if not any(bool((mask == 0).any()) for targets in checked.values() for mask in targets.values()):
        raise ValueError(
            f"the masks of {len(masks)} modules remove nothing; call pruner.compress() with a higher sparse_ratio"
        )
    return checked


def _is_idle(mask: Any, module: nn.Module, target: str) -> bool:
    """Whether a mask is for a parameter that is ``None``, or leaves a tensor that is none as it is."""
    if target in module._parameters:
        return module._parameters[target] is None
    return isinstance(mask, Tensor) and isinstance(getattr(module, target, None), Tensor) and bool((mask == 1).all())


def _maskable(module: nn.Module, target: str) -> Tensor | None:
    """The parameter, or what ``torch.nn.utils.parametrize`` computes in its place."""
    computed = parametrize.is_parametrized(module, target)
    return getattr(module, target).detach() if computed else module._parameters.get(target)


def _checked_mask(name: str, mask: Tensor, parameter: Tensor | None) -> Tensor:
    if parameter is None:
        raise ValueError(f"there is no parameter {name!r} to mask; only parameters (weight, bias) can be removed")
    if not isinstance(mask, Tensor):
        raise TypeError(f"the mask of {name!r} is of type {type(mask).__name__}; {AS_RETURNED}")
    shape = tuple(parameter.shape)
    if mask.dim() != len(shape) or any(m not in (1, s) for m, s in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {shape}; pass masks of the unpruned "
            "model, of the parameter's shape or with 1 in broadcast dimensions"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"the mask of {name!r} has values other than 0 and 1; threshold it first")
    full = mask.detach().to(parameter.device, torch.float32).expand(shape).clone()
    kept = kept_positions(full)
    for dim, keep in enumerate(kept):
        if not bool(keep.any()):
            raise ValueError(
                f"the mask of {name!r} removes all {shape[dim]} channels; a layer must keep at least one, as "
                "ModelSpeedup cannot remove it (EmptyLayerError). nni_plugins.ResConvPruner removes layers"
            )
    outer = torch.ones((), device=full.device)
    for dim, keep in enumerate(kept):
        outer = outer * keep.float().reshape([-1 if d == dim else 1 for d in range(full.dim())])
    if not torch.equal(full, outer.expand(shape)):
        raise ValueError(
            f"the mask of {name!r} (shape {shape}) is unstructured: it zeroes single weights, which cannot be removed; "
            "prune whole output channels (granularity 'default' or 'out_channel', not LevelPruner)"
        )
    return full


def kept_positions(mask: Tensor) -> list[Tensor]:
    """Which rows, and for matrices and kernels which columns, a mask keeps: boolean vectors."""
    dims = range(min(mask.dim(), 2))
    return [mask.transpose(0, dim).flatten(1).any(1) if mask.dim() > 1 else mask.bool() for dim in dims]


def _check_agreement(name: str, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    weight, bias = masks.get("weight"), masks.get("bias")
    if weight is None or bias is None or getattr(module, "transposed", False):
        return
    rows = kept_positions(weight)[0]
    if not torch.equal(rows, bias.bool()):
        raise ValueError(
            f"the masks of {name!r} contradict each other: weight keeps {int(rows.sum())}, bias {int(bias.sum())} of "
            f"{len(bias)} channels, or not the same; align the bias to the weight in config_list"
        )


def apply_masks(trial: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Zero what is masked in the parameters of a copy."""
    with torch.no_grad():
        for name, targets in masks.items():
            module = trial.get_submodule(name)
            for target, mask in targets.items():
                if parametrize.is_parametrized(module, target):
                    parametrize.register_parametrization(module, target, _Masked(mask), unsafe=True)
                else:
                    module._parameters[target].mul_(mask)  # type: ignore[union-attr]


class _Masked(nn.Module):
    """The last step of a parametrization: zero what is masked."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, value: Tensor) -> Tensor:
        return value * self.mask.to(value)
