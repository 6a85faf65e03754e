"""Contract of an NNI pruner: under NNI's schedulers, and fused with its distiller and quantizer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tp_importance import Budget, count_ops
from tp_importance.budget import Cost

from .. import speedup
from .._compat import import_nni
from .base import PrunerCase
from .cases import (
    HALF,
    Case,
    assert_budget_rule,
    assert_masked_is_removed,
    case,
    hooks,
    output,
    plan_of,
    relative_error,
    removed_filters,
)
from .training import TrainingLog, make_evaluator

_pruning = import_nni("nni.compression.pruning")

__all__ = ["ScheduleTests"]


class ScheduleTests(PrunerCase):
    """Pruning while training goes on, alone and together with other compressors."""

    @pytest.mark.parametrize("budget", [None, Budget(macs=0.4)], ids=["ratio", "budget"])
    @pytest.mark.parametrize("scheduler", [_pruning.LinearPruner, _pruning.AGPPruner])
    def test_schedule(self, scheduler: Any, budget: Budget | None) -> None:
        """Sparsity rises as the scheduler says, the goal is kept while training goes on, and no hook remains."""
        log, times = TrainingLog(), 4
        this = case("residual")
        model = copy.deepcopy(this.model)
        evaluator = make_evaluator(model, this.loader, log)
        log.pruner = pruner = self.make(model, HALF, evaluator, loader=this.loader, budget=budget)
        schedule = scheduler(pruner, interval_steps=2, total_times=times)
        _, masks = schedule.compress(max_steps=12, max_epochs=None)

        assert log.costs[0] is None and log.masked[0] == 0
        assert log.masked[1] > 0
        for k in range(1, times + 1):
            progress = k / times if scheduler is _pruning.LinearPruner else 1 - (1 - k / times) ** 3
            if budget is None:
                gone = {g.name: int(progress * 0.5 * g.n_units) for g in this.groups}
                assert log.masked[2 * k - 1] == sum(gone.values())
            else:
                dense, limit = this.cost.dense.macs, budget.limits(this.cost.dense)["macs"]
                cost = log.costs[2 * k - 1]
                assert cost is not None and cost.macs <= math.ceil(dense - progress * (dense - limit))
        costs = [cost.macs for cost in log.costs if cost is not None]
        assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
        assert log.masked[7:] == [log.masked[-1]] * 5  # the goal is reached, and kept while training goes on

        if budget is None:
            assert all(removed_filters(masks, g.name) == g.n_units // 2 for g in this.groups)
        else:
            assert_budget_rule(pruner, budget, this)
        assert sum(log.losses[-4:]) < sum(log.losses[:4])
        assert set(log.hooks) == {0} and not hooks(model) and not evaluator.get_all_hooks()
        schedule.unwrap_model()
        moved = {n: p for n, p in model.named_parameters() if not torch.equal(p, this.model.get_parameter(n))}
        assert len(moved) == len(list(model.parameters()))
        schedule.wrap_model()
        assert_masked_is_removed(pruner, masks, this, wrapped_by=schedule)

    def distiller(self, this: Case, log: TrainingLog) -> tuple[Any, list[int]]:
        """A distiller of a copy of the network, and the batches its teacher saw."""
        model, seen = copy.deepcopy(this.model), list[int]()

        def teach(batch: tuple[Tensor, Tensor], teacher: nn.Module) -> Tensor:
            seen.append(len(batch[0]))
            return teacher(batch[0])

        config = [{"op_types": ["Linear"], "lambda": 0.1, "apply_method": "mse"}]
        evaluator = make_evaluator(model, this.loader, log)
        distiller = import_nni("nni.compression.distillation").DynamicLayerwiseDistiller
        return distiller(model, config, evaluator, copy.deepcopy(this.model), teach), seen

    @pytest.mark.parametrize("budget", [None, Budget(macs=0.5)], ids=["ratio", "budget"])
    def test_fused_with_a_distiller(self, budget: Budget | None) -> None:
        """Fused with NNI's distiller: the teacher sees every batch, the masks hold."""
        this, log = case("residual"), TrainingLog()
        distiller, taught = self.distiller(this, log)
        log.pruner = pruner = self.fuse(distiller, HALF, loader=this.loader, budget=budget)
        model, masks = pruner.compress(max_steps=6, max_epochs=None)
        assert model is distiller.bound_model
        assert len(taught) == len(log.losses) == 6
        assert log.masked[-1] == log.masked[0] > 0  # at once, as nothing says when
        assert set(log.hooks) == {0} and not hooks(model)
        if budget is not None:
            assert_budget_rule(pruner, budget, this)
        assert_masked_is_removed(pruner, masks, this)

    def test_fused_and_scheduled(self) -> None:
        """Fused with a distiller and under a scheduler, both do their part."""
        this, log = case("residual"), TrainingLog()
        distiller, taught = self.distiller(this, log)
        log.pruner = pruner = self.fuse(distiller, HALF, loader=this.loader)
        schedule = _pruning.LinearPruner(pruner, interval_steps=2, total_times=2)
        _, masks = schedule.compress(max_steps=None, max_epochs=2)
        assert len(taught) == 2 * len(this.loader) == len(log.masked)
        assert log.masked[0] == 0 < log.masked[1] < log.masked[3] == log.masked[-1]
        assert_masked_is_removed(pruner, masks, this, wrapped_by=schedule)

    def test_fused_with_a_quantizer(self) -> None:
        """Fused with NNI's quantizer: masked filters stay masked, and speedup removes them."""
        this, log = case("plain"), TrainingLog()
        model = copy.deepcopy(this.model)
        config = [{"op_types": ["Conv2d"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}]
        quantizer = import_nni("nni.compression.quantization").QATQuantizer(
            model, config, make_evaluator(model, this.loader, log)
        )
        log.pruner = pruner = self.fuse(quantizer, HALF, loader=this.loader)
        _, masks = pruner.compress(max_steps=6, max_epochs=None)
        assert log.masked == [4 + 6 + 8] * 6
        scales = [quantizer.get_calibration_config()[name]["weight"]["scale"] for name in ("0.0", "1.0", "2.0")]
        assert all(bool((scale > 0).all()) for scale in scales)
        quantized = output(model.eval(), this.x)
        pruner.unwrap_model()
        small = speedup(model, this.x, masks)
        assert Cost(*count_ops(small, this.x)) == plan_of(pruner).cost
        assert relative_error(quantized, output(small, this.x)) < 0.1  # 8 bits
