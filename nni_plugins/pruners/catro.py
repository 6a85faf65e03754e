"""CATRO as an NNI pruner."""

from tp_importance import CATROImportance

from .importance import MethodPruner

__all__ = ["CATROPruner"]


class CATROPruner(MethodPruner):
    """Class-aware channel pruning (CATRO, arXiv 2110.10921) with NNI's masks, schedules and speedup.

    Args:
        loader: re-iterable of labelled batches; a few hundred samples suffice.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from nni_plugins import speedup
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2)]
        >>> pruner = CATROPruner(net, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], loader=loader)
        >>> _, masks = pruner.compress()
        >>> pruner.unwrap_model()
        >>> speedup(net, torch.randn(2, 3, 8, 8), masks)[0].out_channels
        4
    """

    importance_class = CATROImportance
