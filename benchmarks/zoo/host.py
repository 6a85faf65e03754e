"""Torch-Pruning alone: its own groups, its own pruner, at about half of the MACs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.zoo.embedding import difference, in_precision
from benchmarks.zoo.entry import Network
from tp_importance import count_ops

RATIO = 0.3
"""Of the channels of every layer; where all of them can go, 0.7² of the MACs are left."""


def pruned_alone(network: Network, model: nn.Module, inputs: Any, ignored: Sequence[str]) -> dict[str, Any]:
    """What its pruner makes of a copy: right, wrong or a crash; that it hangs is for a clock outside to say.

    Args:
        network: of the catalogue.
        model: the network; it is not changed.
        inputs: example inputs.
        ignored: layers that make the outputs of the network, which its user has to name; if none are known, those of
            the last call.
    """
    twin = copy.deepcopy(model)
    ignored = ignored or last_layer(network, model, inputs)
    layers = [twin.get_submodule(name) for name in ignored]
    importance = tp.importance.MagnitudeImportance(p=2)
    options: dict[str, Any] = {"forward_fn": network.forward_fn} if network.forward_fn else {}
    try:
        pruner = tp.pruner.BasePruner(twin, inputs, importance, pruning_ratio=RATIO, ignored_layers=layers, **options)
        pruner.step()
    except Exception as error:
        return {"outcome": "crash", "reason": said(error)}
    twin.eval()
    try:
        with torch.no_grad():
            network.run(twin, inputs)
    except Exception as error:
        return {"outcome": "wrong", "reason": f"the pruned network does not run: {said(error)}"}
    left = count_ops(twin, inputs, forward_fn=network.forward_fn)[0]
    reached = round(left / count_ops(model, inputs, forward_fn=network.forward_fn)[0], 4)
    if all(a.shape == b.shape for a, b in zip(model.parameters(), twin.parameters(), strict=True)):
        return {"outcome": "nothing", "reason": "nothing was removed", "reached": reached}
    problem = difference(model, twin, lambda m: network.run(m, in_precision(inputs, m)))
    return {"outcome": "wrong" if problem else "right", "reason": problem, "reached": reached}


def last_layer(network: Network, model: nn.Module, inputs: Any) -> list[str]:
    """The convolution or linear layer that is called last."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    ]
    try:
        with torch.no_grad():
            network.run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called[-1:]


def said(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:240]}" if lines else type(error).__name__
