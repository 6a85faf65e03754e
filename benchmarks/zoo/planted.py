"""Half of the channels are dead, and the criterion must find them: then pruning changes nothing.

All odd channels of every convolution, linear layer and norm are set to zero. They stay zero through activations with
f(0) = 0, sums, products, pools, concatenations of even width and depthwise convolutions, so that the network is planted
without knowing any group. The L2 norm of the filters of its first layer ranks every dead unit last: no live one may go.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.zoo.embedding import compared
from benchmarks.zoo.entry import Network
from tp_importance import Budget, BudgetPruner, prunable_groups
from tp_importance.core.batches import tensors_in
from tp_importance.graph.cost import CostModel
from tp_importance.graph.groups import ChannelGroup

TOLERANCE = 1e-5
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@torch.no_grad()
def kill_odd_channels(model: nn.Module) -> None:
    """Set weights and biases of all odd channels to zero."""
    for module in model.modules():
        if not isinstance(module, LAYERS):
            continue
        if isinstance(module.weight, nn.Parameter):
            # transposed convolutions have their channels on the second axis, one conv group after the other
            by_column = getattr(module, "transposed", False) and module.weight.shape[1] > 1
            (module.weight.transpose(0, 1) if by_column else module.weight)[1::2] = 0
        if isinstance(module.bias, nn.Parameter):
            module.bias[1::2] = 0


def planted(network: Network, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Prune a planted copy by L2 to half of the MACs, or to what is left without its dead channels if that is more.

    Returns:
        ``off``: how the output differs, None if it does not; ``live``: groups that lost units that were not dead;
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
        importance=tp.importance.MagnitudeImportance(p=2, group_reduction="first"),
        budget=Budget(macs=target),
        allocator="uniform",
        forward_fn=network.forward_fn,
    )
    plan = pruner.plan()
    live = [g.name for g in pruner.groups if _is_live(g, plan.removed.get(g.name, ()))]
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


def _is_live(group: ChannelGroup, units: Sequence[int]) -> bool:
    """Whether a producer has something in one of the units."""
    return any(bool((member.positions(units) % 2 == 0).any()) for member in group.producers)
