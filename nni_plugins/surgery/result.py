"""What a trial has come to: its widths and outputs checked, and what has to change in the network."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .masks import kept_positions
from .trial import OTHER_ENGINE

__all__ = ["changes_of", "check_widths", "compare_outputs"]

WIDTHS = (
    *("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features"),
    *("num_channels", "num_groups", "num_parameters", "normalized_shape", "embedding_dim"),
)
"""Module attributes that may follow the width of a tensor; anything else NNI changes would change the function."""

TOLERANCE = 1e-3
"""Largest silent difference between masked and sped-up output, relative to the largest output (float32)."""


def check_widths(trial: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a trial whose layers have other widths than the masks ask for; ``RuntimeError``."""
    for name, targets in masks.items():
        for target, mask in targets.items():
            shape = tuple(getattr(trial.get_submodule(name), target, torch.empty(0)).shape)
            for dim, keep in enumerate(kept_positions(mask)):
                wanted, left = int(keep.sum()), shape[dim] if dim < len(shape) else 0
                if wanted < len(keep) and left != wanted:
                    raise RuntimeError(
                        f"NNI left {left} of {len(keep)} channels in dimension {dim} of '{name}.{target}', the masks "
                        f"keep {wanted}. Usual causes: layers that share channels have different masks or none (sums, "
                        "products with a gate, depthwise and grouped convolutions; dependency_group_id sets them), a "
                        "batch norm is masked but not the layer before it, or NNI cannot shrink a "
                        f"{type(trial.get_submodule(name)).__name__}. {OTHER_ENGINE}"
                    )


def compare_outputs(before: list[Tensor], after: list[Tensor]) -> None:
    """The masked and the smaller network must agree; a difference in value may be the user's choice."""
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (before, after)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(
            f"the network's output changed from shapes {shapes[0]} to {shapes[1]}: the masks remove outputs of the "
            "network; exclude its last layer in config_list (exclude_op_names). The model is unchanged."
        )
    for masked, small in zip(before, after, strict=True):
        if not masked.numel():
            continue
        masked, small = masked.double(), small.double()
        scale, error = float(masked.abs().max()), float((masked - small).abs().max())
        if not error <= TOLERANCE * scale:
            warnings.warn(
                f"masked and sped-up network differ by {error:.2g} on a scale of {scale:.2g}: align the masks of batch "
                "norms and biases with their convolution (align in config_list), or an operation lies in between for "
                "which removing a channel is not zeroing it (group norm, channel shuffle, sigmoid)",
                stacklevel=3,
            )


def changes_of(
    model: nn.Module, trial: nn.Module, replaced: list[str]
) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Attributes, parameters and buffers to set on the replaced modules, for the widths they have in the trial."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    changes = []
    for name in replaced:
        old, new = model.get_submodule(name), trial.get_submodule(name)
        attributes = {k: v for k, v in vars(new).items() if k[0] != "_" and getattr(old, k, None) != v}
        attributes.pop("training", None)
        parameters = _resized(name, old._parameters, new._parameters)
        shared = [k for k in parameters if owners[id(old._parameters[k])] > 1]
        if type(old) is not type(new) or not attributes.keys() <= set(WIDTHS) or shared:
            raise RuntimeError(
                f"NNI turned {name!r} from {old} into {new}, which changes more than its width or breaks up shared "
                f"parameters {shared}. {OTHER_ENGINE}"
            )
        changes.append((old, attributes, parameters, _resized(name, old._buffers, new._buffers)))
    return changes


def _resized(name: str, old: Mapping[str, Tensor | None], new: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Tensors of another shape, in the precision, kind and ``requires_grad`` of the old ones."""
    if {k for k, v in old.items() if v is not None} != {k for k, v in new.items() if v is not None}:
        raise RuntimeError(f"NNI turned the tensors {sorted(old)} of {name!r} into {sorted(new)}. {OTHER_ENGINE}")
    resized: dict[str, Tensor] = {}
    for key, before in old.items():
        after = new[key]
        if before is None or after is None or before.shape == after.shape:
            continue
        value = after.detach().to(before.dtype)
        resized[key] = nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value
    return resized
