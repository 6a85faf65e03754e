"""Contract of an NNI pruner: what it leaves as it was, also after an error; and data of other forms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tp_importance import Budget, count_ops
from tp_importance.budget import Cost
from tp_importance.testing import NUM_CLASSES, FailingLoader, LoaderError, Snapshot, class_loader

from .. import speedup
from .base import PrunerCase
from .cases import (
    HALF,
    assert_masked_is_removed,
    assert_same_masks,
    case,
    hooks,
    output,
    plan_of,
    relative_error,
    wrappers,
)

__all__ = ["UntouchedTests"]


class SumOfTwoInputs(nn.Module):
    """Two convolutions, each with an input of its own, are added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Scores of the classes, shape (B, classes)."""
        return self.fc(F.relu(self.a(a) + self.b(b)).mean((2, 3)))


class UntouchedTests(PrunerCase):
    """Everything but the masks is what it was; inputs may have other forms."""

    def test_modes_flags_hooks_data_and_random_state_are_left_alone(self) -> None:
        """Modes, flags, foreign hooks, statistics, the config_list and the random generator are what they were."""
        this = case("residual")
        model = copy.deepcopy(this.model).train()
        model.get_submodule("1").eval()
        model.get_submodule("2").requires_grad_(False)
        seen: list[int] = []
        model.get_submodule("0").register_forward_hook(lambda *_: seen.append(1))
        modes = {name: module.training for name, module in model.named_modules()}
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        statistics = {name: b.clone() for name, b in model.named_buffers()}
        config, state = copy.deepcopy(HALF), torch.get_rng_state()
        pruner = self.make(model, config, loader=this.loader)
        pruner.compress()
        assert {n: m.training for n, m in model.named_modules() if "_nni_wrapper" not in n} == modes
        assert hooks(model) == 1
        assert config == HALF
        assert torch.equal(torch.get_rng_state(), state)
        pruner.unwrap_model()
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())

    def test_same_data_same_masks(self) -> None:
        """The same data give the same masks, whatever the global random generator does."""
        first, _ = self.pruner_of("residual")
        _, masks = first.compress()
        torch.rand(7)
        second, _ = self.pruner_of("residual")
        assert_same_masks(masks, second.compress()[1])

    def test_frozen_model(self) -> None:
        """A model without gradients can be pruned, and stays frozen."""
        this = case("residual")
        model = copy.deepcopy(this.model).requires_grad_(False)
        pruner = self.make(model, HALF, loader=this.loader)
        with torch.no_grad():
            _, masks = pruner.compress()
        assert plan_of(pruner).widths["0.0"] == 4
        assert_masked_is_removed(pruner, masks, this)
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        """Masks have the precision of the weights, and masked is removed up to its rounding."""
        this = case("plain")
        model = copy.deepcopy(this.model).to(dtype)
        pruner = self.make(model, HALF, loader=this.loader)
        _, masks = pruner.compress()
        assert masks["0.0"]["weight"].dtype == dtype
        masked = output(model, this.x.to(dtype)).float()
        pruner.unwrap_model()
        small = output(speedup(model, this.x, masks), this.x.to(dtype)).float()
        assert relative_error(masked, small) <= 10 * torch.finfo(dtype).eps
        assert plan_of(pruner).cost == Cost(*count_ops(model, this.x.to(dtype)))

    def test_error_while_collecting_leaves_the_masks_alone(self) -> None:
        """An exception of the loader arrives as it is; masks and model are what they were."""
        loader = FailingLoader(case("residual").loader, fatal=None)
        pruner, this = self.pruner_of("residual", loader=loader)
        model = pruner.bound_model.train()
        ones, wrapped = pruner.get_masks(), wrappers(model)
        with pytest.raises(LoaderError) as caught:
            pruner.compress()
        assert caught.value is loader.error
        assert wrappers(model) == wrapped and pruner.plan is None
        assert not hooks(model) and all(module.training for module in model.modules())
        assert_same_masks(pruner.get_masks(), ones)
        pruner.unwrap_model()
        assert torch.equal(output(model.eval(), this.x), output(this.model, this.x))

    def test_error_of_the_constructor_leaves_the_model_alone(self) -> None:
        """A refused config_list, budget or option leaves the model unwrapped and unchanged."""
        this = case("residual")
        model = copy.deepcopy(this.model).train()
        before = Snapshot(model)
        uneven = [{"op_names": ["0.0"], "sparse_ratio": 0.25}, *HALF]
        for config_list, options in ((uneven, {}), (HALF, {"budget": Budget(macs=1)}), (HALF, {"no_option": 1})):
            with pytest.raises((ValueError, TypeError)):
                self.make(model, config_list, loader=this.loader, **options)
            before.check()

    def test_batches_of_two_inputs_and_of_keywords(self) -> None:
        """Inputs may be a tuple or keywords."""
        torch.manual_seed(0)
        model = SumOfTwoInputs()
        pairs = [((x, x.flip(0)), y) for x, y in class_loader(shape=(3, 6, 6))]
        keywords = [{"a": a, "b": b, "labels": y} for (a, b), y in pairs]
        masks = []
        for loader in (pairs, keywords):
            pruner = self.make(model, HALF, loader=loader)
            masks.append(pruner.compress()[1])
            pruner.unwrap_model()
            assert plan_of(pruner).widths == {"a": 4}
        assert_same_masks(*masks)

    def test_explicit_example_inputs(self) -> None:
        """``example_inputs`` say for which shape costs are counted."""
        this = case("plain")
        x = this.x[:, :, :8, :8]
        pruner = self.make(copy.deepcopy(this.model), HALF, loader=this.loader, example_inputs=x)
        pruner.compress()
        assert plan_of(pruner).dense == Cost(*count_ops(this.model, x)) != this.cost.dense
