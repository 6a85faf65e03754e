"""The weights behind coupled groups: filters to rank, and the optimizer's state that belongs to units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.types import Bools
from ..errors import StaleStatisticsError
from ..graph.channel_axes import scale_inputs, scale_outputs
from ..graph.groups import ChannelGroup, Member, PrunableGroups
from ..graph.layer_kinds import CONV
from ..graph.layer_pruners import has_channels
from ..graph.remap import check_optimizer

__all__ = ["GroupWeights", "ParametersOf", "own_parameters", "summed_l1_norms"]

ParametersOf = Callable[[nn.Module], Mapping[str, Any]]
"""Parameters of a module by leaf name; NNI, say, keeps them elsewhere."""

MOMENTA = ("momentum_buffer", "exp_avg")
"""Names under which torch's optimizers keep directions; second moments carry none and stay."""


def own_parameters(module: nn.Module) -> Mapping[str, Any]:
    """Parameters registered in the module itself."""
    return module._parameters


class GroupWeights:
    """Filters and optimizer state of the units of some groups.

    Args:
        groups: groups of the model as it is now.
        parameters_of: where the parameters of a module are.
    """

    def __init__(self, groups: PrunableGroups, parameters_of: ParametersOf = own_parameters) -> None:
        self._groups, self._parameters_of = groups, parameters_of
        self._modules: dict[str, Any] = dict(groups.trace.model.named_modules())

    def filters(self, group: ChannelGroup, active: Bools | None = None) -> list[tuple[Tensor, Tensor]]:
        """Filters of every producer and their units, shapes (m, fan_in) and (m,); only of active units if given."""
        layers = []
        for member in group.producers:
            module = self._modules[member.name]
            weight = self._parameters_of(module).get("weight")
            rows = _rows(module, module.weight if weight is None else weight).detach()
            use = np.ones(len(member.units), bool) if active is None else active[member.units]
            layers.append(
                (rows[torch.from_numpy(member.channels[use]).to(rows.device)], torch.from_numpy(member.units[use]))
            )
        return layers

    @torch.no_grad()
    def zero_momentum(self, optimizers: Sequence[Optimizer], masked: Mapping[str, Bools]) -> None:
        """Zero the momentum of masked units: without a gradient it would go on moving them unseen.

        Args:
            optimizers: changed in place.
            masked: per group a mask of shape (U,).

        Raises:
            ValueError: for an optimizer with state of unknown form.
        """
        for optimizer in optimizers:
            check_optimizer(optimizer, self._groups.trace.model)
        for group in self._groups:
            units = np.flatnonzero(masked[group.name])
            for member in group.members if len(units) else ():
                module = self._modules.get(member.name)
                if module is None:
                    continue
                kept = torch.ones(member.width, device="cpu")
                kept[torch.from_numpy(member.positions(units))] = 0
                for leaf, parameter in self._parameters_of(module).items():
                    if parameter is None or (factor := _factor(module, member, leaf, kept, parameter)) is None:
                        continue
                    for optimizer in optimizers:
                        for value in _momenta(optimizer, parameter):
                            value.mul_(factor.to(value))

    def require_unchanged(self) -> None:
        """Compare the layers with those the groups were built from.

        Raises:
            StaleStatisticsError: if a layer was replaced or has another width.
        """
        now = dict(self._groups.trace.model.named_modules())
        for group in self._groups:
            for member in group.members:
                module = self._modules.get(member.name)
                if module is None:
                    continue
                width = _width(module, member)
                if now.get(member.name) is not module or width not in (None, member.width):
                    state = f"{width} now" if now.get(member.name) is module else "been replaced"
                    raise StaleStatisticsError(
                        f"the model was changed: layer {member.name} had {member.width} channels ({member.role}) and "
                        f"has {state}; build a new pruner for the new model"
                    )


def summed_l1_norms(groups: PrunableGroups, group: ChannelGroup) -> NDArray[np.float64]:
    """L1 norm of the filters of every unit over all producers: breaks ties; shape (U,)."""
    norms = np.zeros(group.n_units)
    for rows, units in GroupWeights(groups).filters(group):
        norms += np.bincount(units.numpy(), rows.double().abs().sum(1).cpu().numpy(), group.n_units)
    return norms


def _rows(module: Any, weight: Tensor) -> Tensor:
    """Weights by output channel, shape (C_out, fan_in)."""
    if not getattr(module, "transposed", False):
        return weight.flatten(1)
    blocks = weight.view(module.groups, -1, *weight.shape[1:])  # (groups, in / groups, out / groups, ...)
    return blocks.transpose(1, 2).reshape(module.out_channels, -1)


def _width(module: Any, member: Member) -> int | None:
    """Channels a layer has now in the dimension of ``member``."""
    if isinstance(module, CONV):
        return module.out_channels if member.role == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if member.role == "out" else module.in_features
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and not has_channels(module):
        return None
    return getattr(module, "num_features", None)


def _factor(module: Any, member: Member, leaf: str, kept: Tensor, parameter: Tensor) -> Tensor | None:
    """``kept`` over one parameter of a member, in a shape that multiplies it; ``None`` if it has no such dimension."""
    if leaf == "weight" and member.kind in ("producer", "consumer"):
        return (scale_outputs if member.role == "out" else scale_inputs)(module, kept)
    if member.role == "out" and len(parameter) == member.width:  # bias, batch norm, depthwise
        return kept.view(-1, *[1] * (parameter.dim() - 1))
    return None


def _momenta(optimizer: Optimizer, parameter: Any) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [state[key] for key in MOMENTA if isinstance(state.get(key), Tensor)]
