"""Contract of a pruner: a step does what its plan says, and can be repeated, saved and replayed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..budget import Budget, Cost
from ..checkpoints.checkpoint import load_pruned, save_pruned
from ..graph.counting import count_ops
from ..graph.masking import masked_units as gates
from ..graph.verify import masked_equals_removed
from ..pruning.pruner import BudgetPruner
from .cases import SEVERAL, verified
from .data import loader_for
from .networks import make_network
from .snapshots import Snapshot, same_values

__all__ = ["PrunerCase", "SurgeryTests"]


class PrunerCase:
    """What every test of a pruner starts from."""

    uses_data = True
    """Whether its criterion reads the loader."""

    needs_labels = True
    """Whether its criterion reads labels."""

    def make(self, model: nn.Module, x: Any, loader: Any, budget: Budget, **options: Any) -> BudgetPruner:
        """The pruner of a network.

        Args:
            model: to be pruned in place.
            x: example inputs.
            loader: batches ``(inputs, labels)``.
            budget: what the network may cost.
            **options: of :class:`.BudgetPruner`, to be handed on.
        """
        raise NotImplementedError

    def fresh(self, name: str, budget: Budget | None = None, **options: Any) -> tuple[BudgetPruner, nn.Module, Tensor]:
        """A pruner whose groups need no second verification, its network and inputs.

        Args:
            name: key of :data:`.networks.TOPOLOGIES`.
            budget: half of the multiply-accumulates, unless given.
            **options: for :meth:`make`; ``loader`` replaces the usual one.
        """
        model, x = make_network(name)
        loader = options.pop("loader", None) or loader_for(x)
        return self.make(model, x, loader, budget or Budget(macs=0.5), **{**verified(name), **options}), model, x


class SurgeryTests(PrunerCase):
    """What is planned is what is removed: the rest of the network computes on as if the channels were masked."""

    @pytest.mark.parametrize("name", SEVERAL)
    def test_step_does_what_the_plan_says(self, name: str) -> None:
        """Planning changes nothing; the step gives the planned widths and cost, and computes what masking would."""
        pruner, model, x = self.fresh(name)
        reference = copy.deepcopy(model)
        snapshot, dense = Snapshot(model), Cost(*count_ops(model, x))
        plan = pruner.plan()
        snapshot.check()
        assert plan == pruner.plan() and plan.dense == dense and not plan.is_noop
        assert plan.limits == {"macs": dense.macs // 2} and plan.cost.macs <= plan.limits["macs"]
        before = pruner.groups
        with torch.no_grad():
            assert masked_equals_removed(before, x, plan.removed) is None
            with gates(reference, before, plan.removed):
                masked = reference(x)
        report = pruner.step()
        assert Cost(*count_ops(model, x)) == report.cost == plan.cost
        assert (report.dense, report.before, report.limits) == (dense, dense, plan.limits)
        assert {r.name: r.after for r in report.rows} == plan.widths
        assert {r.name: r.before for r in report.rows} == {r.name: r.initial for r in report.rows} == before.widths
        for name_, width in plan.widths.items():
            if "/" not in name_:
                module = model.get_submodule(name_)
                assert getattr(module, "out_channels", getattr(module, "out_features", None)) == width
        with torch.no_grad():
            torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-4)

    def test_the_same_seed_gives_the_same_network(self) -> None:
        """Twice the same, whatever the global random generator does, which is left alone."""
        (a, first, _), (b, second, _) = self.fresh("residual"), self.fresh("residual")
        a.step()
        torch.randn(7)  # whatever happens to the global generator
        rng = torch.get_rng_state()
        b.step()
        assert torch.equal(torch.get_rng_state(), rng)
        assert same_values(first, second) and a.pruning_history() == b.pruning_history()

    @pytest.mark.parametrize("name", ["residual", "concat", "split", "grouped"])
    def test_history_replays(self, name: str, tmp_path: Path) -> None:
        """The history makes the pruned network out of a dense one, here and in Torch-Pruning, and pruning goes on."""
        pruner, model, x = self.fresh(name)
        first = pruner.step(Budget(macs=0.7))
        pruner.step(Budget(macs=0.4))
        # Torch-Pruning's graph keeps stale offsets, if the first step takes channels of several parts of a split
        stale = sum("/" in row.name and row.after < row.before for row in first.rows) > 1
        with torch.no_grad():  # as after fine-tuning
            for p in model.parameters():
                p.add_(0.01)
        torch.save({"history": pruner.pruning_history(), "state": model.state_dict()}, tmp_path / "p.pt")
        saved = torch.load(tmp_path / "p.pt", weights_only=True)
        ours, again, _ = self.fresh(name)
        ours.load_pruning_history(saved["history"])
        theirs, _ = make_network(name)
        tp.DependencyGraph().build_dependency(theirs, x).load_pruning_history(copy.deepcopy(saved["history"]))
        for other in (again,) if stale else (again, theirs):
            assert {k: v.shape for k, v in other.state_dict().items()} == {
                k: v.shape for k, v in saved["state"].items()
            }
            other.load_state_dict(saved["state"])
            assert same_values(other, model) and torch.equal(other(x), model(x))
        assert ours.pruning_history() == saved["history"] and ours.dense == pruner.dense
        assert ours.groups.widths == pruner.groups.widths
        assert ours.step(Budget(macs=0.3)).cost.macs <= 0.3 * pruner.dense.macs

    @pytest.mark.parametrize("name", ["residual", "flatten"])
    def test_pruned_network_can_be_saved_and_loaded(self, name: str, tmp_path: Path) -> None:
        """A file of the pruned network gives it back, bit for bit."""
        pruner, model, x = self.fresh(name)
        pruner.step()
        save_pruned(model, tmp_path / "p.pt")
        loaded = load_pruned(lambda: make_network(name, seed=3)[0], tmp_path / "p.pt")
        assert same_values(loaded, model) and torch.equal(loaded(x), model(x))

    def test_flags_and_statistics_stay(self) -> None:
        """Modes, frozen parameters and the statistics of the channels that stay are left alone; no hook remains."""
        model, x = make_network("residual")
        model.train().get_submodule("1").eval()
        model.get_submodule("1.body.0.0").weight.requires_grad_(False)
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        modes = [m.training for m in model.modules()]
        statistics = {n: b.clone() for n, b in model.named_buffers()}
        self.make(model, x, loader_for(x), Budget(macs=0.5)).step()
        assert [m.training for m in model.modules()] == modes
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for key, buffer in model.named_buffers():  # those of the channels that stay, in their order
            old = statistics[key].tolist() if buffer.dim() else [statistics[key].item()]
            left = iter(old)
            assert all(value in left for value in buffer.flatten().tolist()), key

    def test_recalibration(self) -> None:
        """``refit="batchnorm"`` moves the batch norms behind what was pruned by the change of their inputs."""
        pruner, model, x = self.fresh("residual")
        plain, other, _ = self.fresh("residual")
        dense, groups, removed = copy.deepcopy(model), pruner.groups, pruner.plan().removed
        plain.step()
        pruner.step(refit="batchnorm")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        batches = [a for a, _ in loader_for(x)]
        for name, norm in dense.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                gone = [p for g in groups for m in g.members if m.name == name for p in m.positions(removed[g.name])]
                keep = sorted(set(range(norm.num_features)) - set(gone))
                mean, var = moved_statistics(norm, keep, *(norm_inputs(net, name, batches) for net in (dense, other)))
                torch.testing.assert_close(model.get_submodule(name).running_mean, mean)
                torch.testing.assert_close(model.get_submodule(name).running_var, var)
        first, last = "0.1", "2.body.1.1"
        mean_of = {name: [m.get_buffer(f"{name}.running_mean") for m in (model, other)] for name in (first, last)}
        assert torch.equal(*mean_of[first])  # nothing before it was pruned
        assert not torch.equal(*mean_of[last])
        model, x = make_network("residual")
        pruner = self.make(model, x, None, Budget(macs=0.5))
        snapshot = Snapshot(model)
        with pytest.raises(ValueError, match="loader"):
            pruner.step(refit="batchnorm")
        snapshot.check()

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_gradients_switched_off_around(self, context: Any) -> None:
        """Pruned where gradients are off, the network can still be trained."""
        model, x = make_network("residual")
        with context():
            self.make(model, x, loader_for(x), Budget(macs=0.5)).step(refit="batchnorm")
        assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])
        model.train()(x).sum().backward()  # can be trained
        assert all(p.grad is not None for p in model.parameters())

    def test_the_user_may_train_between_steps(self) -> None:
        """A network that is pruned, trained, and pruned further meets the second budget."""
        pruner, model, x = self.fresh("residual")
        for fraction in (0.8, 0.5):
            pruner.step(Budget(macs=fraction))
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            model.train()(x).square().sum().backward()
            optimizer.step()
        assert Cost(*count_ops(model, x)).macs <= 0.5 * pruner.dense.macs


def norm_inputs(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What a batch norm receives while all of them use the statistics of each batch, shape (C, elements)."""
    twin, seen = copy.deepcopy(model).eval(), []
    for module in twin.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    twin.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return torch.cat(seen).transpose(0, 1).flatten(1)


def moved_statistics(norm: nn.BatchNorm2d, keep: list[int], dense: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of a batch norm, moved by the change between two networks.

    Args:
        norm: of the dense network.
        keep: its channels that stay.
        dense: what it receives in the dense network, shape (C, elements).
        pruned: in the pruned network, shape (len(keep), elements).

    Returns:
        Mean and variance, shape (len(keep),).
    """
    running_mean, running_var = norm.running_mean, norm.running_var
    assert running_mean is not None and running_var is not None
    ratio = pruned.var(1) / dense[keep].var(1)
    mean = pruned.mean(1) + ratio.sqrt() * (running_mean[keep] - dense[keep].mean(1))
    return mean.float(), (running_var[keep] * ratio).float()
