"""What operations do to labels. An operation without a rule mixes all channels that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import contractions, elementwise, movement, reductions
from .calls import Call, Layers, Run

__all__ = ["rule_of"]

Rule = Callable[[Run, Call], list[Layers]]

RULES: dict[str, Rule] = {**elementwise.RULES, **reductions.RULES, **contractions.RULES, **movement.RULES}


def rule_of(func: Any, name: str) -> Rule:
    """The rule for an operation of torch.

    Args:
        func: the operation.
        name: its name without namespace and trailing underscore.
    """
    if not func._schema.name.startswith("aten::"):
        return unknown
    pointwise = torch.Tag.pointwise in func.tags
    if name in RULES and not (pointwise and name in ("max", "min")):  # of one tensor, or of two
        return RULES[name]
    return elementwise.pointwise if pointwise else unknown


def unknown(run: Run, call: Call) -> list[Layers]:
    """Whatever it does: nothing that it reads can go."""
    for tensor in call.inputs:
        for layer in run.layers(tensor):
            run.flag(layer, "mixed", f"{call.where} mixes its channels, as far as anybody knows")
    return []
