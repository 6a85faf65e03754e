"""Gates on coupled groups: switch units off where consumers receive them, with the gradient of the loss there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.devices import reference_tensor
from ..core.forward import layer_input, with_input
from ..core.types import Bools, Floats
from .channel_axes import channel_dim, scale_inputs
from .gated_statistics import GatedStatistics
from .groups import ChannelGroup, Member, PrunableGroups
from .masking import kept_of

__all__ = ["ChannelGates"]


class ChannelGates:
    r"""One number per unit that scales its channels in every layer that reads them; 0 masks, 1 does nothing.

    Consumers are linear in their input, so the gate need not touch the activations: a convolution or linear layer with
    weight W reading g ⊙ x computes the same as one with weight W ⊙ g reading x, and

    .. math:: \frac{\partial L}{\partial g_c} = \sum_{r, o, k} W^r_{ock} \frac{\partial L}{\partial (W^r \odot g)_{ock}}

    over all consumers r is the same number. Weights are small, so gates and their gradients cost next to nothing.
    Where the weight is not an ordinary parameter (parametrizations, NNI's wrappers) the input is scaled instead.

    Means, variances and norms over channels (layer norms, group norms, ...) run over the channels whose gates are open.
    Closed ones are normalised with these statistics too, so that the gates behind the norm feel what they would do;
    that an open gate would also change the statistics, the gradient does not say. Weights that no layer owns (of
    ``F.linear(x, self.weight)``, say) have zeros where gates are closed, and gates feel nothing of them. Dimensions of
    attention heads also meet in products of queries and keys: there the queries, or if these are not known all filters
    of the unit, give zeros.

    The gates live in forward hooks. They hold in train and eval mode, under autocast, checkpointing and gradient
    accumulation (see :class:`.GatedStatistics` for what may be checkpointed), and are not part of
    ``model.state_dict()``. A copy of the model shares them. Call :meth:`remove` in the end.

    Args:
        groups: groups of the model as it is now.

    Attributes:
        values: gates of all units, group after group, then a constant 1; float32, shape (N + 1,). Not a parameter of
            the model; its ``.grad`` is ∂L/∂gate while :meth:`watch` is on.

    Example:
        >>> from tp_importance import prunable_groups
        >>> net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
        >>> gates = ChannelGates(prunable_groups(net, x))
        >>> gates.set({"0": np.array([True, False, True, True])})
        >>> out = net(x)
        >>> gates.remove()
        >>> torch.allclose(out, net[2](net[1](net[0](x)) * torch.tensor([0.0, 1, 0, 0])))
        True
    """

    def __init__(self, groups: PrunableGroups) -> None:
        model = groups.trace.model
        like = reference_tensor(model)
        self._offsets, total = {}, 0
        for group in groups:
            self._offsets[group.name] = (total, group.n_units)
            total += group.n_units
        self.values = torch.ones(total + 1, device=None if like is None else like.device)
        self._index: dict[str, Tensor] = {}
        for group in groups:
            for member in group.consumers:
                index = self._index.setdefault(member.name, torch.full((member.width,), total, device="cpu"))
                index[torch.from_numpy(member.channels)] = self._offsets[group.name][0] + torch.from_numpy(member.units)
        self._factors: dict[str, Tensor | None] = dict.fromkeys(self._index)
        self._groups = groups
        self._statistics = GatedStatistics(model, (s.call for g in groups for s in g.statistics))
        self._zeros: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}
        self._gone: dict[str, Tensor] = {}
        self._open = True
        self._handles = []
        for name in dict.fromkeys(m.name for g in groups for m in _multiplied(groups, g)):
            self._handles.append(model.get_submodule(name).register_forward_hook(self._cut(name), prepend=True))
        for name in self._index:
            module = model.get_submodule(name)
            self._handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(_restore_weight, always_call=True),
            ]
        for owner in dict.fromkeys(m.name.rpartition(".")[0] for g in groups for m in _raw(g)):
            module = model.get_submodule(owner)
            self._handles += [
                module.register_forward_pre_hook(self._zero(owner)),
                module.register_forward_hook(self._restore(owner), always_call=True),
            ]

    def set(self, masked: Mapping[str, Bools]) -> None:
        """Close the gates of the masked units, open all others; per group a mask of shape (U,)."""
        new = np.ones(len(self.values))
        for name, mask in masked.items():
            start, count = self._offsets[name]
            new[start : start + count] = ~mask
        with torch.no_grad():
            self.values.copy_(torch.from_numpy(new))
        self._factors = {}
        for name, index in self._index.items():
            gates = torch.from_numpy(new)[index]
            self._factors[name] = None if bool((gates == 1).all()) else gates
        removed = {name: np.flatnonzero(mask).tolist() for name, mask in masked.items()}
        cut: dict[str, list[Tensor]] = {}
        for name, units in removed.items():
            for member in _multiplied(self._groups, self._groups[name]) if units else ():
                cut.setdefault(member.name, []).append(torch.as_tensor(member.positions(units), device="cpu"))
        self._gone = {name: torch.cat(positions) for name, positions in cut.items()}
        self._statistics.kept = kept_of(self._groups, removed)
        self._zeros = {}
        for name, units in removed.items():
            for member in _raw(self._groups[name]) if units else ():
                owner, _, key = member.name.rpartition(".")
                assert member.axis is not None
                gone = torch.as_tensor(member.positions(units), device="cpu")
                self._zeros.setdefault(owner, {}).setdefault(key, []).append((member.axis, gone))

    def watch(self, on: bool) -> None:
        """Let gradients reach the gates (``self.values.grad``), or stop it."""
        self.values.grad = None
        self.values.requires_grad_(on)

    def take_gradient(self) -> Tensor | None:
        """∂L/∂gate of all units since the last call, shape (N,), and start afresh; ``None`` without backward pass."""
        gradient, self.values.grad = self.values.grad, None
        return None if gradient is None else gradient[:-1]

    def split(self, flat: Floats) -> dict[str, Floats]:
        """Values of all units, shape (N,), per group."""
        return {name: flat[start : start + count] for name, (start, count) in self._offsets.items()}

    def remove(self) -> None:
        """Take the hooks out; what was masked is not any more."""
        self._open = False  # copies of the model keep hooks of their own
        self._zeros, self._gone = {}, {}
        self._statistics.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _gate(self, name: str, like: Tensor) -> Tensor | None:
        """Gates of the input channels of a consumer, shape (C,); ``None`` if there is nothing to do."""
        if not self._open:
            return None
        if self.values.requires_grad and torch.is_grad_enabled():
            index = self._index[name]
            if index.device != self.values.device:
                index = self._index[name] = index.to(self.values.device)
            return self.values.index_select(0, index).to(like.device, like.dtype)
        factor = self._factors.get(name)
        if factor is not None and (factor.device, factor.dtype) != (like.device, like.dtype):
            factor = self._factors[name] = factor.to(like.device, like.dtype)
        return factor

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            weight = module._parameters.get("weight")
            if weight is not None:
                gate = self._gate(name, weight)
                if gate is not None:  # shadows the parameter until the layer has run
                    module.__dict__["weight"] = weight * scale_inputs(module, gate)
                return None
            x = layer_input(args, kwargs)
            gate = self._gate(name, x)
            return None if gate is None else with_input(args, kwargs, x * _over_input(module, gate))

        return hook

    def _cut(self, name: str) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> Any:
            gone = self._gone.get(name)
            if gone is None:
                return None
            return output.index_fill(output.dim() + channel_dim(module), gone.to(output.device), 0.0)

        return hook

    def _zero(self, owner: str) -> Any:
        def hook(module: nn.Module, _args: Any) -> None:
            for key, gone in self._zeros.get(owner, {}).items():
                weight = vars(module)["_parameters"].get(key, vars(module)["_buffers"].get(key))
                if isinstance(weight, Tensor) and sum(size > 1 for size in weight.shape) > 1:
                    for axis, positions in gone:
                        weight = weight.index_fill(axis, positions.to(weight.device), 0.0)
                    module.__dict__[key] = weight  # shadows it until the module has run

        return hook

    def _restore(self, owner: str) -> Any:
        def hook(module: nn.Module, _args: Any, _output: Any) -> None:
            for key in self._zeros.get(owner, ()):
                module.__dict__.pop(key, None)

        return hook


def _multiplied(groups: PrunableGroups, group: ChannelGroup) -> tuple[Member, ...]:
    """Filters of dimensions of heads: no layer reads the products of queries and keys, so one side must be zero.

    That is the queries, if they are known; else all filters, and closed gates then feel nothing.
    """
    products = groups.trace.labels.products
    if groups.options.attention != "dims" or all(products[i].weights is not None for i, _ in group.products):
        return ()
    return tuple(m for queries in group.queries for m in queries.own) or group.producers


def _raw(group: ChannelGroup) -> list[Member]:
    """Tensors that no layer is known to own and that may read channels."""
    return [m for m in group.members if m.axis is not None and m.role == "in"]


def _restore_weight(module: nn.Module, _args: Any, _output: Any) -> None:
    module.__dict__.pop("weight", None)


def _over_input(module: nn.Module, gate: Tensor) -> Tensor:
    return gate.view(-1, *[1] * (-1 - channel_dim(module)))
