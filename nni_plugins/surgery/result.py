"""What a trial has come to: its widths and outputs checked, and what has to change in the network."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_importance.checkpoints.content import integers

from .masks import kept_positions

__all__ = ["Changes", "changes_of", "check_widths", "output_difference", "width_changes"]

WIDTHS = (
    *("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features"),
    *("num_channels", "num_groups", "num_parameters", "normalized_shape", "embedding_dim"),
)
"""Module attributes that may follow the width of a tensor; anything else that changes would change the function."""

TOLERANCE = 1e-3
"""Largest silent difference between masked and sped-up output, relative to the largest output (float32)."""


@dataclass(frozen=True, eq=False)
class Changes:
    """What to set on one module of the network, for the widths it has in the trial."""

    module: nn.Module
    attributes: dict[str, Any]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def make(self) -> None:
        """Set it."""
        vars(self.module).update(self.attributes)
        self.module._parameters.update(self.parameters)  # type: ignore[arg-type]
        self.module._buffers.update(self.buffers)


def check_widths(trial: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a trial whose layers have other widths than the masks ask for; ``RuntimeError``."""
    for name, targets in masks.items():
        for target, mask in targets.items():
            shape = tuple(getattr(trial.get_submodule(name), target, torch.empty(0, device="cpu")).shape)
            for dim, keep in enumerate(kept_positions(mask)):
                wanted, left = int(keep.sum()), shape[dim] if dim < len(shape) else 0
                if wanted < len(keep) and left != wanted:
                    raise RuntimeError(
                        f"it left {left} of {len(keep)} channels in dimension {dim} of '{name}.{target}', the masks "
                        f"keep {wanted}. Usual causes: layers that share channels have different masks or none (sums, "
                        "products with a gate, depthwise and grouped convolutions; dependency_group_id sets them), a "
                        "batch norm is masked but not the layer before it, or the engine cannot shrink a "
                        f"{type(trial.get_submodule(name)).__name__}"
                    )


def output_difference(before: list[Tensor], after: list[Tensor]) -> str | None:
    """How the outputs of the masked and the smaller network differ; in value that may be the user's choice.

    Raises:
        RuntimeError: if their shapes differ.
    """
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (before, after)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(
            f"the network's output changed from shapes {shapes[0]} to {shapes[1]}: the masks remove outputs of the "
            "network; exclude its last layer in config_list (exclude_op_names)"
        )
    for masked, small in zip(before, after, strict=True):
        if not masked.numel():
            continue
        masked, small = masked.double(), small.double()
        scale, error = float(masked.abs().max()), float((masked - small).abs().max())
        if not error <= TOLERANCE * scale:
            return (
                f"masked and sped-up network differ by {error:.2g} on a scale of {scale:.2g}: align the masks of batch "
                "norms and biases with their convolution (align in config_list), or an operation lies in between for "
                "which removing a channel is not zeroing it (group norm, channel shuffle, sigmoid)"
            )
    return None


def changes_of(model: nn.Module, trial: nn.Module, replaced: list[str]) -> list[Changes]:
    """What has to change in the modules that NNI has replaced in the trial.

    Raises:
        RuntimeError: if it is more than widths.
    """
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
                f"parameters {shared}"
            )
        changes.append(Changes(old, attributes, parameters, _resized(name, old._buffers, new._buffers)))
    return changes


def width_changes(model: nn.Module, trial: nn.Module) -> list[Changes]:
    """What has to change in the network after our own surgery on the trial, which keeps the modules.

    Args:
        model: the network.
        trial: its copy, smaller, and not run since: a network may count its calls.

    Raises:
        RuntimeError: if layers that share a parameter or buffer would not share it any more.
    """
    changes = []
    for name, new in trial.named_modules():
        old = model.get_submodule(name)
        numbers = {k: v for k, v in vars(new).items() if k != "training" and integers(v) is not None}
        attributes = {k: v for k, v in numbers.items() if vars(old).get(k) != v}
        parameters = _resized(name, old._parameters, new._parameters)
        changes.append(Changes(old, attributes, parameters, _resized(name, old._buffers, new._buffers)))
    _keep_shared(model, changes)
    return [c for c in changes if c.attributes or c.parameters or c.buffers]


def _keep_shared(model: nn.Module, changes: Iterable[Changes]) -> None:
    """Give layers that share a parameter or buffer one new one, where each of them has made the same of it."""
    registries = [r for module in model.modules() for r in (module._parameters, module._buffers)]
    owners = Counter(id(tensor) for registry in registries for tensor in registry.values())
    cut: dict[int, list[tuple[dict[str, Tensor], str]]] = defaultdict(list)
    for change in changes:
        for old, new in ((change.module._parameters, change.parameters), (change.module._buffers, change.buffers)):
            for key in new:
                cut[id(old[key])].append((new, key))
    for tensor, places in cut.items():
        made = [tensors[key] for tensors, key in places]
        if len(made) < owners[tensor] or not all(torch.equal(made[0], other) for other in made):
            raise RuntimeError(f"the {places[0][1]} that {owners[tensor]} layers share would be another in each")
        for tensors, key in places:
            tensors[key] = made[0]


def _resized(name: str, old: Mapping[str, Tensor | None], new: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Tensors of another shape, in the precision, kind and ``requires_grad`` of the old ones."""
    if {k for k, v in old.items() if v is not None} != {k for k, v in new.items() if v is not None}:
        raise RuntimeError(f"the surgery turned the tensors {sorted(old)} of {name!r} into {sorted(new)}")
    resized: dict[str, Tensor] = {}
    for key, before in old.items():
        after = new[key]
        if before is None or after is None or before.shape == after.shape:
            continue
        value = after.detach().to(before.dtype)
        resized[key] = nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value
    return resized
