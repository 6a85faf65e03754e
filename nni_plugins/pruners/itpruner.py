"""ITPruner as an NNI pruner."""

from tp_importance import ITPrunerImportance

from .importance import MethodPruner

__all__ = ["ITPruner"]


class ITPruner(MethodPruner):
    """Widths by ITPruner's program (arXiv 2108.08532) with NNI's masks, schedules and speedup.

    With ``budget`` the program decides the widths; with ratios only the importance inside the groups counts.

    Args:
        loader: re-iterable of batches; labels are needed if ``importance`` needs them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from nni_plugins import speedup
        >>> from tp_importance import Budget
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> loader, budget = [torch.randn(16, 3, 8, 8)], Budget(macs=0.5)
        >>> pruner = ITPruner(net, [{"op_types": ["Conv2d"]}], loader=loader, budget=budget)
        >>> _, masks = pruner.compress()
        >>> pruner.unwrap_model()
        >>> speedup(net, torch.randn(2, 3, 8, 8), masks)[0].out_channels
        4
    """

    importance_class = ITPrunerImportance
