"""ITPruner as an NNI pruner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tp_importance import Budget, ITPrunerImportance
from tp_importance.allocation.program import Objective, Solver
from tp_importance.allocation.registry import Allocator
from tp_importance.methods.itpruner.hsic import Estimator, Kernel
from tp_importance.methods.itpruner.importance import Per

from .base import Config, ImportancePruner

__all__ = ["ITPruner"]


class ITPruner(ImportancePruner):
    """Widths by ITPruner's program (arXiv 2108.08532) with NNI's masks, schedules and speedup.

    With ``budget`` the program decides the widths; with ratios only the importance inside the groups counts.

    Args:
        model: the network.
        config_list: which layers, and ``sparse_ratio``; with ``budget`` it only selects layers.
        evaluator: NNI evaluator, for fusion and schedules.
        existed_wrappers: NNI's own.
        loader: re-iterable of batches; labels are needed if ``importance`` needs them.
        budget: what the pruned network may cost.
        example_inputs: default: the first samples of the loader.
        importance: see :class:`tp_importance.ITPrunerImportance`.
        beta: see :class:`tp_importance.ITPrunerImportance`.
        estimator: see :class:`tp_importance.ITPrunerImportance`.
        kernel: see :class:`tp_importance.ITPrunerImportance`.
        objective: see :class:`tp_importance.ITPrunerImportance`.
        solver: see :class:`tp_importance.ProgramAllocator`.
        pool: see :class:`tp_importance.ITPrunerImportance`.
        per: see :class:`tp_importance.ITPrunerImportance`.
        allocator: another allocator on the same curves; default: the program.
        **options: see :class:`~nni_plugins.base.ImportancePruner`.

    Example:
        >>> import torch
        >>> from nni_plugins import speedup
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> loader = [torch.randn(16, 3, 8, 8)]
        >>> pruner = ITPruner(net, [{"op_types": ["Conv2d"]}], loader=loader, budget=Budget(macs=0.5))
        >>> _, masks = pruner.compress()
        >>> pruner.unwrap_model()
        >>> speedup(net, torch.randn(2, 3, 8, 8), masks)[0].out_channels
        4
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Config,
        evaluator: Any = None,
        existed_wrappers: dict[str, Any] | None = None,
        *,
        loader: Iterable[Any],
        budget: Budget | None = None,
        example_inputs: Any = None,
        importance: Any = None,
        beta: float = 0.0,
        estimator: Estimator = "biased",
        kernel: Kernel = "linear",
        objective: Objective = "gp",
        solver: Solver = "direct",
        pool: bool = False,
        per: Per = "layer",
        allocator: str | Allocator | None = None,
        **options: Any,
    ) -> None:
        weighted = ITPrunerImportance(
            importance=importance,
            beta=beta,
            estimator=estimator,
            kernel=kernel,
            objective=objective,
            pool=pool,
            per=per,
        )
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            loader=loader,
            importance=weighted,
            budget=budget,
            example_inputs=example_inputs,
            allocator=weighted.allocator(solver, allocator),
            **options,
        )
