"""Contract of an NNI pruner: what is masked can be removed, and NNI's interface."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from tp_importance import Budget

from .. import speedup
from .base import PrunerCase
from .cases import (
    BUDGETS,
    HALF,
    LEFT_OUT,
    assert_budget_rule,
    assert_masked_is_removed,
    assert_same_masks,
    case,
    hooks,
    output,
    plan_of,
    relative_error,
    wrappers,
)

__all__ = ["MaskTests"]


class MaskTests(PrunerCase):
    """The sped-up model computes what the masked one did, at the planned cost; masks are NNI's."""

    @pytest.mark.parametrize(
        "name",
        [
            *("residual", "concat", "dense", "depthwise", "grouped", "split", "flatten", "se", "shared_input"),
            *("transposed", "transformer_mlp", "padded_shortcut", "no_bn", "preact"),
        ],
    )
    def test_by_ratio_the_sped_up_model_computes_what_the_masked_one_did(self, name: str) -> None:
        """Half of every group is masked; the sped-up model computes the same and costs what was planned."""
        pruner, this = self.pruner_of(name)
        dense = output(this.model, this.x)
        model, masks = pruner.compress()
        assert model is pruner.bound_model
        assert relative_error(dense, output(model, this.x)) > 1e-3
        assert set(pruner.left_out) == LEFT_OUT.get(name, set())
        assert plan_of(pruner).widths == {g.name: g.width - g.n_units // 2 * g.unit_size for g in this.groups}
        assert_masked_is_removed(pruner, masks, this, engines=True)

    @pytest.mark.parametrize(
        "name, goal",
        [
            *(("residual", "macs"), ("residual", "params"), ("residual", "both"), ("grouped", "macs")),
            *(("depthwise", "both"), ("dense", "params"), ("transposed", "macs"), ("transformer_mlp", "params")),
        ],
    )
    def test_to_a_budget_the_sped_up_model_costs_what_was_planned(self, name: str, goal: str) -> None:
        """To a budget, every limit is kept and used up, and the sped-up model costs what was planned."""
        pruner, this = self.pruner_of(name, budget=BUDGETS[goal])
        _, masks = pruner.compress()
        assert_budget_rule(pruner, BUDGETS[goal], this)
        assert plan_of(pruner).limits == BUDGETS[goal].limits(this.cost.dense)
        assert_masked_is_removed(pruner, masks, this)

    def test_absolute_budget(self) -> None:
        """A budget may be a number of multiply-accumulates."""
        budget = Budget(macs=case("residual").cost.dense.macs * 2 // 3)
        pruner, this = self.pruner_of("residual", budget=budget)
        pruner.compress()
        assert_budget_rule(pruner, budget, this)

    def test_coupled_layers_lose_the_same_channels(self) -> None:
        """All layers and batch norms of a group have the same mask."""
        pruner, this = self.pruner_of("residual")
        _, masks = pruner.compress()
        for group in this.groups:
            kept = [masks[m.name]["weight"].reshape(m.width, -1).any(1) for m in group.members if m.role == "out"]
            assert len(kept) >= 2  # a batch norm at least
            assert all(torch.equal(kept[0], other) for other in kept)

    def test_compress_leaves_the_model_wrapped_and_unwrap_restores_it(self) -> None:
        """As NNI has it: ``compress`` gives model and masks, wrapped; unwrapped, the network is what it was."""
        pruner, this = self.pruner_of("residual")
        values = copy.deepcopy(this.model.state_dict())
        result = pruner.compress()
        assert isinstance(result, tuple) and len(result) == 2
        assert wrappers(pruner.bound_model)
        pruner.unwrap_model()
        assert not wrappers(pruner.bound_model) and not hooks(pruner.bound_model)
        assert all(torch.equal(v, values[k]) for k, v in pruner.bound_model.state_dict().items())
        assert torch.equal(output(pruner.bound_model, this.x), output(this.model, this.x))

    def test_generated_metrics_and_masks_keep_their_dimensions(self) -> None:
        """Metrics and masks have the shapes NNI expects, and what is masked has the smallest metrics, without ties."""
        pruner, this = self.pruner_of("transposed")
        metrics = pruner._calculate_metrics(pruner._collect_data())
        masks = pruner.generate_masks()
        for group in this.groups:
            for member in group.producers:
                shape = (1, 12, 1, 1) if member.name == "up.0" else (member.width, 1, 1, 1)
                assert metrics[member.name]["weight"].shape == masks[member.name]["weight"].shape == shape
                assert set(masks[member.name]["weight"].unique().tolist()) <= {0.0, 1.0}
                metric, keep = metrics[member.name]["weight"].flatten(), masks[member.name]["weight"].flatten() == 1
                assert metric[~keep].max() < metric[keep].min()  # smaller goes first
                assert len(metric.unique()) == member.width
        assert masks["up.1"]["weight"].shape == masks["up.1"]["bias"].shape == (12,)

    def test_get_and_update_masks(self) -> None:
        """Masks can be taken off and put back."""
        pruner, this = self.pruner_of("residual")
        ones = pruner.get_masks()
        assert all(
            bool((mask == 1).all()) for targets in ones.values() for mask in targets.values() if mask is not None
        )
        model, masks = pruner.compress()
        assert_same_masks(masks, pruner.get_masks())
        masked = output(model, this.x)
        pruner.update_masks(ones)
        assert torch.equal(output(model, this.x), output(this.model, this.x))
        assert any(bool((mask == 0).any()) for mask in masks["0.0"].values() if mask is not None)  # they are copies
        pruner.update_masks(masks)
        assert torch.equal(output(model, this.x), masked)

    def test_masks_survive_a_safe_file(self) -> None:
        """Masks saved and loaded with ``weights_only=True`` give the same sped-up model."""
        pruner, this = self.pruner_of("residual")
        _, masks = pruner.compress()
        file = io.BytesIO()
        torch.save(masks, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert_same_masks(masks, loaded)
        assert_masked_is_removed(pruner, loaded, this)

    def test_compressing_again_changes_nothing(self) -> None:
        """A second ``compress`` gives the masks of the first."""
        pruner, _ = self.pruner_of("residual")
        _, masks = pruner.compress()
        _, again = pruner.compress()
        assert_same_masks(masks, again)

    def test_wrapped_model_remains_an_ordinary_model(self) -> None:
        """The wrapped model has no inference tensors and loads its own state."""
        pruner, this = self.pruner_of("residual")
        model, _ = pruner.compress()
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        masked = output(model, this.x)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(output(model, this.x), masked)

    def test_pruning_a_sped_up_model_once_more(self) -> None:
        """A sped-up model can be pruned again, from the cost that it has."""
        pruner, this = self.pruner_of("residual")
        model, masks = pruner.compress()
        pruner.unwrap_model()
        speedup(model, this.x, masks)
        first = plan_of(pruner)
        second = self.make(model, HALF, loader=this.loader)
        _, masks = second.compress()
        assert plan_of(second).dense == first.cost
        assert_masked_is_removed(second, masks, this)
