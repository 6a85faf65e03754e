"""PSAP as an NNI pruner."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from tp_importance import Budget
from tp_importance.core.progress import Phase, phase
from tp_importance.methods.psap.history import PSAPHistory
from tp_importance.methods.psap.schedule import PSAPSchedule
from tp_importance.methods.psap.soft_masks import Ratios
from tp_importance.methods.psap.soft_pruning import SoftPruning

from ..config import Config
from .base import MaskingPruner

__all__ = ["PSAPPruner"]


class PSAPPruner(MaskingPruner):
    """Self-adaptive iterative pruning with protection (PSAP, arXiv 2303.11881) inside NNI's training.

    ``compress(max_steps, max_epochs)`` trains through the evaluator and prunes on the way, as
    :class:`tp_importance.PSAPPruner` does: while it trains, gates in front of the reading layers mask; in the end NNI's
    wrappers get the masks, aligned over batch norms, for :func:`nni_plugins.speedup`. It fuses (``from_compressor``).
    It brings a schedule of its own, so ``LinearPruner`` and ``AGPPruner`` are refused.

    Args:
        model: the network.
        config_list: which layers; without ``budget``, the budget is what the network would cost in MACs with every
            ``sparse_ratio`` as it is written there, and the adaptive ratios differ from them.
        evaluator: NNI evaluator, needed to train.
        existed_wrappers: NNI's own.
        budget: what the pruned network may cost.
        example_inputs: default: ``dummy_input`` of the evaluator, else the first samples of ``loader``.
        loader: the training batches; only its length and first samples are looked at.
        total_steps: optimizer steps of the training. Default: ``max_steps`` of :meth:`compress`, else ``max_epochs``
            times the length of ``loader``. Needed where neither is known: if another compressor, fused after this one,
            is told to compress.
        schedule: see :class:`tp_importance.PSAPPruner`.
        threshold: see :class:`tp_importance.PSAPPruner`.
        ratios: see :class:`tp_importance.PSAPPruner`.
        protect: see :class:`tp_importance.PSAPPruner`.
        protect_steps: see :class:`tp_importance.PSAPPruner`.
        max_pruning_ratio: see :class:`tp_importance.PSAPPruner`.
        **options: see :class:`~nni_plugins.pruners.base.MaskingPruner`.

    Attributes:
        history: what every prune step did, see :class:`~tp_importance.methods.psap.history.PSAPHistory`.

    Raises:
        BudgetError: if the budget cannot be reached.
        ValueError: as :class:`~nni_plugins.pruners.base.MaskingPruner`, or without example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Config,
        evaluator: Any = None,
        existed_wrappers: dict[str, Any] | None = None,
        *,
        budget: Budget | None = None,
        example_inputs: Any = None,
        loader: Iterable[Any] | None = None,
        total_steps: int | None = None,
        schedule: PSAPSchedule = PSAPSchedule(),
        threshold: float = 0.25,
        ratios: Ratios = "adaptive",
        protect: bool = True,
        protect_steps: int | None = 1,
        max_pruning_ratio: float | Mapping[str, float] = 0.9,
        **options: Any,
    ) -> None:
        if isinstance(budget, Budget):
            budget.require_counted("PSAP's schedule")
        if example_inputs is None:
            example_inputs = getattr(evaluator, "dummy_input", None)
        if example_inputs is None and loader is None:
            raise ValueError("example inputs are missing: give example_inputs=, or dummy_input= to the evaluator")
        self._soft_options: dict[str, Any] = {
            "schedule": schedule,
            "threshold": threshold,
            "ratios": ratios,
            "protect": protect,
            "protect_steps": protect_steps,
        }
        self._batches, self._total_steps = loader, total_steps
        self._duration: tuple[int | None, int | None] = (None, None)
        self._running = Phase("training")
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            loader=loader if loader is not None else (),
            budget=budget,
            example_inputs=example_inputs,
            max_pruning_ratio=max_pruning_ratio,
            **options,
        )

    @property
    def history(self) -> PSAPHistory:
        """What every prune step did."""
        return self._soft.history

    def _check_options(self) -> None:
        self._soft = self._fresh()

    def _fresh(self) -> SoftPruning:
        if self._budget is None:
            uniform = {g.name: list(range(int(g.n_units * self._goal[g.name]))) for g in self._target.groups}
            limits = {"macs": self._target.plan(uniform).cost.macs}
        else:
            limits = self._budget.marked_limits(self._target.dense)
        return SoftPruning(
            self._target.groups,
            self._target.cost_model,
            self._space,
            limits,
            parameters_of=_parameters_of,
            **self._soft_options,
        )

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.evaluator is None:
            raise ValueError("PSAP prunes while it trains: pass evaluator=TorchEvaluator(...)")
        if max_steps is None and max_epochs is None:
            raise ValueError("say how long to train: compress(max_steps=...) or compress(max_epochs=...)")
        self._duration = (max_steps, max_epochs)
        try:
            with phase("training", max_steps, unit="step", progress=self._target._progress) as self._running:
                super()._fusion_compress(max_steps, max_epochs)
        except BaseException:
            self._soft.close()
            if self.evaluator.model is not None:
                self.evaluator.unbind_model()
            raise

    def _fuse_preprocess(self, evaluator: Any) -> None:
        if (self.interval_steps, self.total_times) != (1, 1):
            raise RuntimeError("PSAP brings its own schedule: pass schedule=PSAPSchedule(...) instead of NNI's pruner")
        self._soft = self._fresh()
        self._soft.start(list(getattr(evaluator, "_optimizers", None) or ()), self._steps())
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._soft_step])

    def _soft_step(self) -> None:
        self._running.advance()
        self._soft.step()

    def _fuse_postprocess(self, evaluator: Any) -> None:
        if not self._soft.frozen:
            warnings.warn(f"the training ended early ({self._soft.progress}); the rest is pruned at once", stacklevel=2)
        self._soft.conclude()
        self._soft.close()
        self.update_masks(self.generate_masks())

    def _steps(self) -> int:
        max_steps, max_epochs = self._duration
        if self._total_steps is not None:
            return self._total_steps
        if max_steps is not None:
            return max_steps
        try:
            return (max_epochs or 0) * len(self._batches) or 1  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(
                "how many optimizer steps there will be is not known: give compress(max_steps=...), or loader= (with a "
                "length) or total_steps= to the pruner"
            ) from None

    def _collect_data(self) -> dict[str, Any]:
        """0 for units that are masked, shape (U,)."""
        return {g.name: (~self._soft.masked[g.name]).astype(np.float64) for g in self._target.groups}

    def _removed(self) -> dict[str, list[int]]:
        removed = self._soft.removed
        self.plan = self._target.plan(removed, self._soft.limits)
        return removed


def _parameters_of(module: nn.Module) -> Mapping[str, Any]:
    """NNI's wrappers take the parameters over that they mask."""
    wrapper: Any = getattr(module, "_nni_wrapper", None)
    mine = dict(module._parameters)
    for name, space in () if wrapper is None else wrapper.pruning_target_spaces.items():
        mine[name] = space.target
    return mine
