"""Layer scaling factors as a help for ordinary channel pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .block import resconv_layers

__all__ = ["ResConvImportance"]


class ResConvImportance(tp.importance.Importance):
    r"""Any importance, times the layer scaling factors |s| that training has found.

    .. math:: score_c = inner_c \cdot \frac{1}{|P|} \sum_{l \in P} |s_l|

    over the convolutions P whose output channels are in the group; layers without a factor count as 1. So channels of
    layers that were on their way out go first when groups compete (``global_pruning=True``, or a greedy allocation).
    The factors are read now: make it before fusing, prune channels after it (the shortcut of an unfused layer couples
    its inputs and outputs).

    Args:
        model: a converted network, or factors by layer name.
        importance: any ``tp.importance.Importance``; default: L2 norm, normalised by the mean of the group.

    Raises:
        ValueError: if there is no factor.

    Example:
        >>> from tp_importance import convert_to_resconv, fuse
        >>> net = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
        >>> net = nn.Sequential(*net)
        >>> importance = ResConvImportance(convert_to_resconv(net, torch.randn(1, 3, 8, 8), s=0.5))
        >>> importance.scales
        {'2': 0.5}
        >>> tp.pruner.BasePruner(fuse(net.eval()), torch.randn(1, 3, 8, 8), importance, pruning_ratio=0.5,
        ...                      ignored_layers=[net[4]]).step()
        >>> net[2].out_channels
        2

    Source: ours.
    """

    def __init__(self, model: nn.Module | Mapping[str, float], importance: Any = None) -> None:
        if isinstance(model, nn.Module):
            scales = {name: abs(layer.s.item()) for name, layer in resconv_layers(model).items()}
        else:
            scales = {name: abs(float(s)) for name, s in model.items()}
        if not scales:
            raise ValueError("there are no layer scaling factors; call convert_to_resconv first, and fuse afterwards")
        self.scales = scales
        self.importance = (
            tp.importance.MagnitudeImportance(p=2, normalizer="mean") if importance is None else importance
        )

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Scores of a ``tp.Group``, shape (len(group[0].idxs),); ``None`` where the inner importance gives none."""
        scores = self.importance(group)
        graph = group._DG
        found = {}
        for item in group:
            name = graph._module2name.get(item.dep.target.module)
            if graph.is_out_channel_pruning_fn(item.dep.handler) and isinstance(item.dep.target.module, nn.Conv2d):
                found[name] = self.scales.get(name, 1.0)
        return scores if scores is None or not found else scores * (sum(found.values()) / len(found))
