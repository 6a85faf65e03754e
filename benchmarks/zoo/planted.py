"""Half of the channels are dead, and the criterion must find them: then pruning changes nothing.

All odd channels of every convolution, linear layer and norm are set to zero. They stay zero through activations with
f(0) = 0, sums, products, pools, concatenations of even width and depthwise convolutions, so that the network is planted
without knowing any group. L2 ranks dead channels last, and no live one goes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.embedding import compared
from benchmarks.zoo.entry import Network
from tp_importance import Budget, BudgetPruner, prunable_groups
from tp_importance.core.batches import tensors_in
from tp_importance.graph.cost import CostModel
from tp_importance.pruning.registry import find_importance

TOLERANCE = 1e-5
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@torch.no_grad()
def kill_odd_channels(model: nn.Module) -> None:
    for module in model.modules():
        if not isinstance(module, LAYERS):
            continue
        if isinstance(module.weight, nn.Parameter):
            grouped = getattr(module, "groups", 1)
            rows = module.weight
            if getattr(module, "transposed", False):  # (in, out / groups, ...)
                rows = rows.unflatten(0, (grouped, -1)).transpose(1, 2).flatten(0, 1)
                dead = torch.zeros(len(rows), dtype=torch.bool)
                dead[1::2] = True
                rows = rows.clone()
                rows[dead] = 0
                inner = rows.unflatten(0, (grouped, -1)).transpose(1, 2).flatten(0, 1)
                module.weight.copy_(inner)
            else:
                rows[1::2] = 0
        if isinstance(module.bias, nn.Parameter):
            module.bias[1::2] = 0


def planted(network: Network, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Prune a planted copy by L2 to half of the MACs, or to what is left without its dead channels if that is more.

    Returns:
        ``off``: how the output differs, None if it does not; ``live``: units that went and were not dead, by group;
        ``reached``: fraction of the MACs.
    """
    twin = copy.deepcopy(model)
    kill_odd_channels(twin)
    with torch.no_grad():
        before = tensors_in(network.run(twin, inputs))
    groups = prunable_groups(twin, inputs, forward_fn=network.forward_fn)
    cost = CostModel.from_groups(groups)
    without = cost.cost({g.name: (g.n_units - g.n_units // 2) * g.unit_size for g in groups}).macs / cost.dense.macs
    target = max(0.5, min(1.0, without + 0.01))
    pruner = BudgetPruner(
        *(twin, inputs),
        importance=find_importance("l2"),
        budget=Budget(macs=target),
        allocator="uniform",
        forward_fn=network.forward_fn,
    )
    plan = pruner.plan()
    live = {name: len(units) for name, units in _live(pruner, plan.removed).items() if units}
    pruner.apply(plan)
    with torch.no_grad():
        after = tensors_in(network.run(twin.eval(), inputs))
    return {
        "off": compared(before, after, TOLERANCE),
        "live": live,
        "budget": round(target, 4),
        "reached": round(plan.cost.macs / plan.dense.macs, 4),
        "removed": sum(len(units) for units in plan.removed.values()),
    }


def _live(pruner: BudgetPruner, removed: Any) -> dict[str, list[int]]:
    """Units that are to go although a producer has something in them."""
    found: dict[str, list[int]] = {}
    for group in pruner.groups:
        gone = set(removed.get(group.name, ()))
        for member in group.producers:
            channels = [int(c) for c, u in zip(member.channels, member.units, strict=True) if int(u) in gone]
            if any(c % 2 == 0 for c in channels):
                found.setdefault(group.name, []).extend(c for c in channels if c % 2 == 0)
    return found
