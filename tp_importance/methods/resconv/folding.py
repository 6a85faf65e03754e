"""Move constant factors of tensors into the layers around them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...graph.dataflow import Flow, Op, is_batchnorm
from ...graph.layer_kinds import CONV
from ...maths.rescaling import Ratios
from .block import ResConv2d, Scale, replace_module
from .conversion import shared_parameters
from .fusion import scaled_batchnorm

__all__ = ["fold_scales"]

_CHANNELWISE = ("relu", "leaky_relu", "pad", "flatten", "reshape", "view", "mean", "interpolate", "upsample")

Segments = list[tuple[int, int]]
"""Factor and number of channels of the parts of a tensor, along dimension 1."""


def fold_scales(model: nn.Module, flow: Flow) -> dict[str, float]:
    r"""Move the factors of all :class:`Scale` modules into layers with weights; returns those that must stay.

    Every tensor is stored divided by a factor ρ of its own. Adds demand the same ρ of all they touch, homogeneous
    operations hand it on, everything unknown demands ρ = 1, and layers with weights absorb any. A Scale by r is
    superfluous if :math:`\rho_{out} = r \rho_{in}` can be had.
    """
    scales = _Scales(model, flow)
    wanted = [op for op in flow.ops if isinstance(op.module, Scale)]
    failed = []
    for op in wanted:
        (i, _), (o, _) = scales.parts[op.inputs[0]][0], scales.parts[op.outputs[0]][0]
        if not (scales.once(op) and scales.ratios.bind(o, i, _factor_of(op))):
            failed.append(op)
    kept = {}
    for op in wanted:
        (i, _), (o, _) = scales.parts[op.inputs[0]][0], scales.parts[op.outputs[0]][0]
        left = _factor_of(op) * scales.ratios.value(i) / scales.ratios.value(o)
        if op in failed:
            kept[op.name] = left
        old: Any = model.get_submodule(op.name)
        new = Scale(left, like=old.factor) if op in failed else nn.Identity()
        replace_module(model, op.name, new.train(old.training))
    for op in flow.ops:
        if op.kind == "layer":
            scales.absorb(op)
    return kept


def _factor_of(op: Op) -> float:
    assert isinstance(op.module, Scale)
    return op.module.factor.item()


class _Scales:
    """Factors of all tensors, and the equations between them."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.flow, self.ratios = flow, Ratios()
        self.parts: dict[int, Segments] = {}
        self._tied = shared_parameters(model)
        for op in flow.ops:
            self._enter(op)
        for v in flow.outputs:
            self._pin(v)

    def once(self, op: Op) -> bool:
        """Whether the module of ``op`` is called only here."""
        return op.module is not None and len(self.flow.calls(op.module)) == 1

    def _of(self, v: int) -> Segments:
        if v not in self.parts:  # given from outside
            self.parts[v] = self._new(v)
            self._pin(v)
        return self.parts[v]

    def _new(self, v: int) -> Segments:
        shape = self.flow.shapes[v]
        return [(self.ratios.new(), shape[1] if len(shape) > 1 else 1)]

    def _pin(self, v: int) -> None:
        for part, _ in self._of(v):
            self.ratios.pin(part)

    def _unify(self, v: int) -> int:
        """One factor for the whole tensor."""
        parts = self._of(v)
        for part, _ in parts[1:]:
            self.ratios.bind(part, parts[0][0])
        self.parts[v] = [(parts[0][0], sum(n for _, n in parts))]
        return parts[0][0]

    def _enter(self, op: Op) -> None:
        flow = self.flow
        if op.kind == "layer" or isinstance(op.module, Scale):
            for v in op.outputs:
                self.parts[v] = self._new(v)
            if isinstance(op.module, Scale) or not _per_channel(op, flow):
                for v in op.inputs:
                    self._unify(v)
            if op.kind == "layer" and not self._can_absorb(op):
                for v in (*op.inputs, *op.outputs):
                    self._pin(v)
        elif op.kind == "add":
            first = self._unify(op.inputs[0])
            for v in op.inputs[1:]:
                self.ratios.bind(self._unify(v), first)
            self.parts[op.outputs[0]] = [(first, self._new(op.outputs[0])[0][1])]
        elif op.kind == "cat":
            self.parts[op.outputs[0]] = [part for v in op.inputs for part in self._of(v)]
        elif op.kind in ("relu", "same", "homogeneous"):
            for v in op.outputs:
                self.parts[v] = self._handed_on(op, v)
        else:
            for v in op.inputs:
                self._pin(v)
            for v in op.outputs:
                self.parts[v] = self._new(v)
                self._pin(v)

    def _handed_on(self, op: Op, v: int) -> Segments:
        parts, given, made = self._of(op.inputs[0]), self.flow.shapes[op.inputs[0]], self.flow.shapes[v]
        if len(parts) == 1:
            return [(parts[0][0], made[1] if len(made) > 1 else 1)]
        known = op.kind in ("relu", "same") or "pool" in op.name or op.name in _CHANNELWISE
        if op.name == "mean":
            dims = op.argument(1, "dim", None)
            dims = [dims] if isinstance(dims, int) else dims or [1]
            known = all(d % len(given) > 1 for d in dims)
        flat = len(made) == 2 and len(given) > 2 and made[1] == math.prod(given[1:])
        if known and len(made) > 1 and given[0] == made[0] and (made[1] == given[1] or flat):
            return [(part, n * (made[1] // given[1])) for part, n in parts]
        return [(self._unify(op.inputs[0]), made[1] if len(made) > 1 else 1)]

    def _can_absorb(self, op: Op) -> bool:
        module = op.module
        if not self.once(op) or module is None or len(op.inputs) != 1 or len(op.outputs) != 1:
            return False
        inner = [module] if not isinstance(module, ResConv2d) else [module.conv]
        if any(hasattr(m, "parametrizations") or self._tied.intersection(m._parameters.values()) for m in inner):
            return False
        if is_batchnorm(module):
            return getattr(module, "weight", None) is not None
        return all(isinstance(m, (*CONV, nn.Linear)) and "weight" in m._parameters for m in inner)

    def absorb(self, op: Op) -> None:
        """Give a layer weights that read and make the tensors as they are stored."""
        module: Any = op.module
        parts = [(self.ratios.value(p), n) for p, n in self._of(op.inputs[0])]
        values = [parts[0][0]] if len(parts) == 1 else [value for value, n in parts for _ in range(n)]
        read = torch.tensor(values, dtype=torch.float64, device="cpu")
        made = self.ratios.value(self._of(op.outputs[0])[0][0])
        if made == 1.0 and bool((read == 1.0).all()):
            return
        if isinstance(module, ResConv2d):
            _set(module.conv, "weight", module.conv.weight.double() * read[0].item())
            _set(module, "a", module.a.double() * (read[0].item() / made))
            _set(module, "s", module.s.double() / made)
        elif is_batchnorm(module):
            statistics = (module.running_mean, module.running_var, module.weight, module.eps)
            mean, var, gamma = scaled_batchnorm(*statistics, read.to(module.weight.device))
            assert gamma is not None
            bias = module.bias.double()
            for key, value in (
                ("running_mean", mean),
                ("running_var", var),
                ("weight", gamma / made),
                ("bias", bias / made),
            ):
                _set(module, key, value)
        else:
            weight: Any = module.weight
            _set(module, "weight", weight.double() * _factors_of(module, read).to(weight.device) / made)
            if module.bias is not None:
                _set(module, "bias", module.bias.double() / made)


def _per_channel(op: Op, flow: Flow) -> bool:
    """Whether a layer can read a different factor in every input channel."""
    if isinstance(op.module, nn.Linear):
        return len(flow.shapes[op.inputs[0]]) == 2
    return is_batchnorm(op.module) or isinstance(op.module, CONV)


def _factors_of(module: Any, read: Tensor) -> Tensor:
    """What a weight is multiplied by, for factors by input channel (or one for all); of a shape that broadcasts."""
    rest = [1] * (module.weight.dim() - 2)
    if len(read) == 1 or getattr(module, "groups", 1) == 1 or module.transposed:
        return read.view(-1, 1, *rest) if getattr(module, "transposed", False) else read.view(1, -1, *rest)
    by_group = read.view(module.groups, -1)
    return by_group.repeat_interleave(module.out_channels // module.groups, 0).view(*module.weight.shape[:2], *rest)


def _set(module: nn.Module, key: str, value: Tensor) -> None:
    """Replace a parameter or buffer by a new one: the old one is never written to."""
    old: Any = getattr(module, key)
    value = value.detach().to(old.dtype)
    setattr(module, key, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
