"""Contracts that every importance and every pruner keeps, and the networks they are tried on, traced once.

A method joins by two subclasses in a test file, see `test_contract.py`.
"""

import copy
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from helpers.networks import MISTRACED, class_loader, make_network, make_zoo_network
from tp_importance import (
    Budget,
    BudgetError,
    BudgetPruner,
    Cost,
    NotCollectedError,
    StaleStatisticsError,
    StatisticalImportance,
    count_ops,
    load_pruned,
    prunable_groups,
    save_pruned,
)
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.host_groups import build_groups
from tp_importance.graph.tracing import trace
from tp_importance.graph.verify import gates, masked_equals_removed


@dataclass(frozen=True)
class Case:
    """A network, its inputs and its verified groups; shared between tests, so never to be changed: take a copy."""

    model: nn.Module
    x: Tensor
    groups: PrunableGroups

    def copy(self) -> "Case":
        model = copy.deepcopy(self.model)
        fresh = build_groups(trace(model, self.x))
        return Case(model, self.x, fresh.exclude({n: "" for n in fresh.names if n not in self.groups.names}))


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
    """Statistics of a batch norm, moved by the change between two networks; inputs of shape (C, elements)."""
    ratio = pruned.var(1) / dense[keep].var(1)
    mean = pruned.mean(1) + ratio.sqrt() * (norm.running_mean[keep] - dense[keep].mean(1))
    return mean.float(), (norm.running_var[keep] * ratio).float()


@cache
def topology(name: str) -> Case:
    model, x = make_network(name)
    return Case(model, x, prunable_groups(model, x))


@cache
def zoo(name: str) -> Case:
    model, x = make_zoo_network(name)
    return Case(model, x[:1], prunable_groups(model, x[:1]))


def known_unsafe(name: str, groups: PrunableGroups) -> dict[str, str]:
    """Which groups of a network the oracle has refused, and why."""
    return {e.name: e.reason for e in topology(name).groups.excluded if e.name in groups.names}


def random_units(groups: PrunableGroups, seed: int) -> dict[str, int]:
    """Admissible widths, in units."""
    rng = np.random.default_rng(seed)
    return {g.name: int(rng.integers(g.min_units, g.n_units + 1)) for g in groups}


def removal(groups: PrunableGroups, seed: int) -> dict[str, list[int]]:
    """Units to remove, at random, down to random widths."""
    rng = np.random.default_rng(seed)
    left = random_units(groups, seed)
    return {g.name: sorted(rng.permutation(g.n_units)[left[g.name] :].tolist()) for g in groups}


def loader_for(x: Tensor, n: int = 32, batch_size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return class_loader(n=n, shape=tuple(x.shape[1:]), batch_size=batch_size, seed=seed)


class Snapshot:
    """Everything about a model that must not change: structure, values, flags and hooks."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.values = {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}
        self.rest = self._rest()

    def _rest(self) -> list[Any]:
        modules = list(self.model.modules())
        hooks = [list(getattr(m, key)) for m in modules for key in sorted(vars(m)) if key.endswith("_hooks")]
        sizes = [[v for v in vars(m).values() if isinstance(v, int)] for m in modules]
        tensors = [(id(p), p.requires_grad, p.grad is None) for p in self.model.parameters()]
        return [[(id(m), m.training) for m in modules], hooks, sizes, tensors, [id(b) for b in self.model.buffers()]]

    def check(self) -> None:
        now = self.model.state_dict()
        assert now.keys() == self.values.keys()
        assert all(torch.equal(now[k], v) for k, v in self.values.items())
        assert self._rest() == self.rest


def same_values(a: nn.Module, b: nn.Module) -> bool:
    return same_tensors(a.state_dict(), b.state_dict())


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def permuted(case: Case, name: str, order: Tensor) -> nn.Module:
    """A copy in which unit u of a group is what unit order[u] was; it computes the same."""
    model = copy.deepcopy(case.model)
    for member in case.groups[name].members:
        module = model.get_submodule(member.name)
        source = torch.arange(member.width)
        for unit in range(case.groups[name].n_units):
            source[member.positions([unit])] = torch.from_numpy(member.positions([int(order[unit])]))
        depthwise = getattr(module, "groups", 1) > 1
        if depthwise and member.role == "in":
            continue  # one dimension, already moved
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim() == 0:
                continue
            is_in = member.role == "in" and tensor.dim() > 1
            if member.role == "in" and tensor.dim() == 1 and member.kind == "consumer":
                continue  # the consumer's bias belongs to its outputs
            dim = int(is_in) if not getattr(module, "transposed", False) or tensor.dim() == 1 else int(not is_in)
            moved = tensor.detach().index_select(dim, source)
            with torch.no_grad():
                getattr(module, key).copy_(moved)
    return model


def host_group(graph: Any, module: nn.Module, role: str = "out") -> Any:
    pruner = graph.get_pruner_of_module(module)
    out = role == "out"
    fn, width = (
        (pruner.prune_out_channels, graph.get_out_channels(module))
        if out
        else (pruner.prune_in_channels, graph.get_in_channels(module))
    )
    return graph.get_pruning_group(module, fn, list(range(width)))


SOME = ("residual", "concat", "grouped", "split", "flatten", "padded_shortcut", "transformer_mlp")


class ImportanceContract:
    """What Torch-Pruning and our allocators may expect of a data-driven importance; subclass and override."""

    def make_importance(self) -> StatisticalImportance:
        raise NotImplementedError

    def collected(self, name: str, dtype: torch.dtype | None = None) -> tuple[StatisticalImportance, nn.Module, Tensor]:
        """On a model of its own, which tests may prune."""
        case = topology(name).copy()
        model, x = case.model, case.x
        groups: PrunableGroups | None = case.groups
        if dtype is not None:
            model, x, groups = model.to(dtype), x.to(dtype), None
        return self.make_importance().collect(model, x, loader_for(x), groups=groups), model, x

    def assert_scores(self, scores: Any, width: int) -> None:
        assert isinstance(scores, Tensor) and scores.shape == (width,)
        assert scores.dtype == torch.float32 and scores.device.type == "cpu" and not scores.requires_grad
        assert torch.isfinite(scores).all()

    @pytest.mark.parametrize("name", SOME)
    def test_scores_of_every_root(self, name: str) -> None:
        """Shape, dtype, strictness, and the same score of a unit wherever Torch-Pruning starts."""
        importance, model, x = self.collected(name)
        graph = tp.DependencyGraph().build_dependency(model, x)
        for group in importance.groups:
            ranks: dict[int, set[float]] = defaultdict(set)
            for member in group.members:
                scores = importance(host_group(graph, model.get_submodule(member.name), member.role))
                if scores is None:  # the dimension holds channels of groups that are left alone
                    assert name in MISTRACED
                    continue
                self.assert_scores(scores, member.width)
                for channel, unit in zip(member.channels, member.units, strict=True):
                    ranks[int(unit)].add(float(scores[int(channel)]))
            assert all(len(found) == 1 for found in ranks.values())
            values = [found.pop() for found in ranks.values()]
            assert len(set(values)) == len(values) == group.n_units
            assert 0 < min(values) and max(values) <= 1

    def test_scores_of_some_channels(self) -> None:
        importance, model, x = self.collected("plain")
        graph = tp.DependencyGraph().build_dependency(model, x)
        everything = importance(host_group(graph, model[1][0]))
        assert everything is not None
        some = importance(graph.get_pruning_group(model[1][0], tp.prune_conv_out_channels, [7, 2, 5]))
        assert torch.equal(some, everything[[7, 2, 5]])

    @pytest.mark.parametrize("name", ["residual", "flatten"])
    def test_ranks_follow_the_curve(self, name: str) -> None:
        importance, model, x = self.collected(name)
        graph = tp.DependencyGraph().build_dependency(model, x)
        for group in importance.groups:
            curve = importance.curves()[group.name]
            assert len(curve.loss) == group.n_units + 1 and np.isfinite(curve.loss).all()
            scores = importance(host_group(graph, model.get_submodule(group.root[0]), group.root[1]))
            assert torch.argsort(scores[torch.from_numpy(group.root_channels)]).tolist() == curve.order.tolist()

    def test_deterministic(self) -> None:
        first, second = (self.collected("residual")[0].curves() for _ in range(2))
        for name in first:
            assert np.array_equal(first[name].order, second[name].order)
            assert np.array_equal(first[name].loss, second[name].loss)

    @pytest.mark.parametrize(
        ("name", "group"),
        [
            ("plain", "1.0"),
            ("residual", "0.0"),
            ("concat", "right.0"),
            ("flatten", "1.0"),
            ("depthwise", "1.body.0"),
            ("transposed", "up.0"),
        ],
    )
    def test_equivariant_to_the_order_of_channels(self, name: str, group: str) -> None:
        """In float64, so that noise of the arithmetic does not swap neighbours."""
        case = topology(name)
        n = case.groups[group].n_units
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        model, x = copy.deepcopy(case.model).double(), case.x.double()
        other = permuted(case, group, order).double()
        torch.testing.assert_close(model(x), other(x))
        loader = [(a.double(), y) for a, y in loader_for(x)]
        curves, moved = (self.make_importance().collect(m, x, loader).curves() for m in (model, other))
        for key in curves:
            found = order[moved[key].order].tolist() if key == group else moved[key].order.tolist()
            assert found == curves[key].order.tolist()
            np.testing.assert_allclose(moved[key].loss, curves[key].loss, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("name", ["residual", "concat", "dense", "se"])
    def test_torch_pruning_locally(self, name: str) -> None:
        importance, model, x = self.collected(name)
        groups, curves = importance.groups, importance.curves()
        weights = {g.name: model.get_submodule(g.name).weight.clone() for g in groups}
        before = count_ops(model, x)
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[list(model.modules())[-1]]).step()
        for g in groups:
            kept = np.sort(curves[g.name].order[g.n_units // 2 :])
            own, filters = model.get_submodule(g.name).weight, weights[g.name][torch.from_numpy(kept)]
            assert len(own) == len(filters), g.name
            if own.shape == filters.shape:  # nothing in front of it was pruned
                assert torch.equal(own, filters), g.name
        assert count_ops(model, x)[0] < before[0] and model(x).shape == (2, 4)

    @pytest.mark.parametrize("name", ["residual", "grouped", "flatten"])
    def test_torch_pruning_globally(self, name: str) -> None:
        importance, model, x = self.collected(name)
        widths = importance.groups.widths
        pruner = tp.pruner.BasePruner(
            model, x, importance, pruning_ratio=0.4, global_pruning=True, ignored_layers=[list(model.modules())[-1]]
        )
        pruner.step()
        left = {n: model.get_submodule(n).weight.shape[0] for n in widths}
        assert all(0 < left[n] <= widths[n] for n in widths) and left != widths
        assert model(x).shape == (2, 4)
        wanted = 0.6 * sum(widths.values())
        assert name == "grouped" or sum(left.values()) == pytest.approx(
            wanted, abs=max(4, 0.1 * wanted)
        )  # strict scores: no landslide

    @pytest.mark.parametrize("name", ["plain", *sorted(MISTRACED)])
    def test_unsafe_groups_get_none_and_are_skipped(self, name: str) -> None:
        importance, model, x = self.collected(name)
        graph = tp.DependencyGraph().build_dependency(model, x)
        verified = prunable_groups(model, x)
        excluded = {e.name.split("/")[0] for e in verified.excluded}
        assert excluded
        for layer in excluded:
            assert importance(host_group(graph, model.get_submodule(layer))) is None
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5).step()
        for layer in excluded:
            assert (
                model.get_submodule(layer).weight.shape[0] == topology(name).model.get_submodule(layer).weight.shape[0]
            )
        assert model(x).shape == (2, 4)

    def test_nothing_before_collect(self) -> None:
        model, x = make_network("plain")
        graph = tp.DependencyGraph().build_dependency(model, x)
        importance = self.make_importance()
        for use in (
            lambda: importance(host_group(graph, model[0][0])),
            importance.curves,
            lambda: importance.groups,
            lambda: importance.constant_units,
        ):
            with pytest.raises(NotCollectedError, match="collect"):
                use()

    def test_stale_after_a_step(self) -> None:
        importance, model, x = self.collected("residual")
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model[-1]]).step()
        graph = tp.DependencyGraph().build_dependency(model, x)
        with pytest.raises(StaleStatisticsError, match="collect"):
            importance(host_group(graph, model[0][0]))
        with pytest.raises(StaleStatisticsError, match="stale"):
            importance.curves(prunable_groups(model, x))
        importance.collect(model, x, loader_for(x))
        assert importance(host_group(graph, model[0][0])) is not None

    def test_a_failed_collect_keeps_the_old_statistics(self) -> None:
        importance, model, x = self.collected("plain")
        before = importance.curves()
        bad = [(a * float("nan"), y) for a, y in loader_for(x)]
        with pytest.raises(ValueError):
            importance.collect(model, x, bad)
        for name, curve in importance.curves().items():
            assert np.array_equal(curve.order, before[name].order) and np.array_equal(curve.loss, before[name].loss)

    def test_collect_leaves_the_model_alone(self) -> None:
        model, x = make_network("residual")
        model.train()[1].eval()
        model[0].requires_grad_(False)
        snapshot, rng = Snapshot(model), torch.get_rng_state()
        self.make_importance().collect(model, x, loader_for(x))
        snapshot.check()
        assert torch.equal(torch.get_rng_state(), rng)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_precisions(self, dtype: torch.dtype) -> None:
        importance, model, x = self.collected("residual", dtype)
        graph = tp.DependencyGraph().build_dependency(model, x)
        self.assert_scores(importance(host_group(graph, model[0][0])), 8)

    def test_no_group_to_prune(self) -> None:
        model, x = make_network("plain")
        with pytest.raises(ValueError, match="no group that can be pruned"):
            self.make_importance().collect(model, x, loader_for(x), ignored_layers=[nn.Conv2d])


def unlabelled(loader: Any) -> Any:
    return [x for x, _ in loader]


BAD_DATA = {
    "unlabelled": (unlabelled, ValueError),
    "one class": (lambda loader: [(x, torch.ones_like(y)) for x, y in loader], ValueError),
    "one-hot": (lambda loader: [(x, nn.functional.one_hot(y, 4)) for x, y in loader], ValueError),
    "float labels": (lambda loader: [(x, y.float()) for x, y in loader], TypeError),
    "out of range": (lambda loader: [(x, y + 1) for x, y in loader], ValueError),
    "negative": (lambda loader: [(x, y - 1) for x, y in loader], ValueError),
    "wrong length": (lambda loader: [(x, y[:-1]) for x, y in loader], ValueError),
}
"""Labels that are wrong, and what says so."""

BAD_LOADERS = {
    "empty": (lambda loader: [], ValueError),
    "used-up generator": (lambda loader: (b for b in ()), ValueError),
    "NaN": (lambda loader: [(x * float("nan"), y) for x, y in loader], ValueError),
    "infinite": (lambda loader: [(x * float("inf"), y) for x, y in loader], ValueError),
    "wrong shape": (lambda loader: [(x[:, :2], y) for x, y in loader], RuntimeError),
    "a tensor": (lambda loader: loader[0][0], TypeError),
    "text": (lambda loader: ["text"], TypeError),
    "no iterable": (lambda loader: 3, TypeError),
    "none": (lambda loader: None, ValueError),
}


class LoaderError(Exception):
    """Of the user's own loader."""


class Fails:
    """A loader that raises in its n-th pass, after one batch."""

    def __init__(self, batches: list[Any], fatal: int = 1):
        self.batches, self.fatal, self.passes = batches, fatal, 0

    def __iter__(self) -> Any:
        self.passes += 1
        yield self.batches[0]
        if self.passes == self.fatal:
            raise LoaderError("disk on fire")
        yield from self.batches[1:]


class PrunerContract:
    """What the user may expect of a pruner; subclass and override."""

    uses_data = True
    needs_labels = True

    def make_pruner(self, model: nn.Module, x: Any, loader: Any, budget: Budget, **options: Any) -> BudgetPruner:
        raise NotImplementedError

    def fresh(self, name: str, budget: Budget | None = None, **options: Any) -> tuple[BudgetPruner, nn.Module, Tensor]:
        """A pruner whose groups need no second verification, its network and inputs."""
        model, x = make_network(name)
        options.setdefault("verify", lambda groups, _: known_unsafe(name, groups))
        loader = options.pop("loader", None) or loader_for(x)
        return self.make_pruner(model, x, loader, budget or Budget(macs=0.5), **options), model, x

    @pytest.mark.parametrize("name", SOME)
    def test_step_does_what_the_plan_says(self, name: str) -> None:
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

    @pytest.mark.parametrize(
        "budget",
        [Budget(macs=0.3), Budget(params=0.4), Budget(macs=0.7, params=0.3), Budget(macs=200_000)],
        ids=["macs", "params", "both", "absolute"],
    )
    def test_budgets_are_met(self, budget: Budget) -> None:
        pruner, model, x = self.fresh("residual", budget)
        limits = budget.limits(pruner.dense)
        pruner.step()
        counted = Cost(*count_ops(model, x)).as_dict()
        assert all(counted[field] <= limit for field, limit in limits.items())
        for g in pruner.groups:  # and not one more channel fits
            more = pruner.cost_model.cost({g.name: g.width}).as_dict()
            assert more == counted
        for row in pruner.plan(Budget(macs=1.0)).widths.items():
            assert row[1] == pruner.groups[row[0]].width

    def test_whole_budget_changes_nothing_and_warns(self) -> None:
        pruner, model, x = self.fresh("residual", Budget(macs=1.0))
        snapshot = Snapshot(model)
        with pytest.warns(UserWarning, match="nothing is pruned"):
            report = pruner.step()
        snapshot.check()
        assert report.cost == report.dense == Cost(*count_ops(model, x)) and pruner.pruning_history() == []
        assert pruner.plan().is_noop

    @pytest.mark.parametrize("allocator", ["greedy", "uniform"])
    def test_repeated_steps_refer_to_the_original_cost(self, allocator: str) -> None:
        pruner, model, x = self.fresh("residual", allocator=allocator)
        dense = Cost(*count_ops(model, x))
        first = pruner.step(Budget(macs=0.7))
        second = pruner.step(Budget(macs=0.3))
        assert (
            second.dense == dense and second.before == first.cost and second.limits == {"macs": int(0.3 * dense.macs)}
        )
        assert Cost(*count_ops(model, x)) == second.cost and second.cost.macs <= 0.3 * dense.macs
        for row in second.rows:
            assert row.initial == topology("residual").groups[row.name].width and row.after <= row.before <= row.initial
        with pytest.warns(UserWarning, match="nothing is pruned"):
            pruner.step(Budget(macs=0.3))

    def test_one_budget_after_another_needs_no_second_look_at_the_data(self) -> None:
        model, x = make_network("plain")
        loader = Fails(loader_for(x), fatal=2)
        pruner = self.make_pruner(model, x, loader, Budget(macs=0.5))
        plans = [pruner.plan(Budget(macs=f)) for f in (0.8, 0.5, 0.3)]
        assert plans[0].cost.macs > plans[1].cost.macs > plans[2].cost.macs
        assert loader.passes == int(self.uses_data)

    def test_the_same_seed_gives_the_same_network(self) -> None:
        (a, first, _), (b, second, _) = self.fresh("residual"), self.fresh("residual")
        a.step()
        torch.randn(7)  # whatever happens to the global generator
        rng = torch.get_rng_state()
        b.step()
        assert torch.equal(torch.get_rng_state(), rng)
        assert same_values(first, second) and a.pruning_history() == b.pruning_history()

    @pytest.mark.parametrize("name", ["residual", "concat", "split", "grouped"])
    def test_history_replays(self, name: str, tmp_path: Any) -> None:
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
            other.load_state_dict(saved["state"])
            assert same_values(other, model) and torch.equal(other(x), model(x))
        assert ours.pruning_history() == saved["history"] and ours.dense == pruner.dense
        assert ours.groups.widths == pruner.groups.widths
        assert ours.step(Budget(macs=0.3)).cost.macs <= 0.3 * pruner.dense.macs

    def test_a_history_that_does_not_fit(self) -> None:
        pruner, model, _ = self.fresh("plain")
        snapshot, widths = Snapshot(model), pruner.groups.widths
        for bad in ([["nope", True, [0]]], [["0.0", True, [99]]], [["0.0", True, [1]], ["1.0", True, [-3]]], [[3]], 3):
            with pytest.raises((ValueError, TypeError)):
                pruner.load_pruning_history(bad)
            snapshot.check()
        assert pruner.groups.widths == widths and pruner.pruning_history() == []
        pruner.step()

    @pytest.mark.parametrize("name", ["residual", "flatten"])
    def test_pruned_network_can_be_saved_and_loaded(self, name: str, tmp_path: Any) -> None:
        pruner, model, x = self.fresh(name)
        pruner.step()
        save_pruned(model, tmp_path / "p.pt")
        loaded = load_pruned(lambda: make_network(name, seed=3)[0], tmp_path / "p.pt")
        assert same_values(loaded, model) and torch.equal(loaded(x), model(x))

    def test_options(self) -> None:
        pruner, model, _ = self.fresh("residual", Budget(macs=0.4), round_to=4)
        assert all(row.after % 4 == 0 for row in pruner.step().rows)
        pruner, model, _ = self.fresh("residual", Budget(macs=0.6), max_pruning_ratio=0.5)
        pruner.step()
        pruner.step(Budget(macs=0.4))  # half of the initial channels, also after several steps
        assert all(w >= pruner.initial_widths[n] / 2 for n, w in pruner.groups.widths.items())
        with pytest.raises(BudgetError):
            pruner.step(Budget(macs=0.01))
        model, x = make_network("residual")
        ignored = [model[2], model[0][0].weight]
        pruner = self.make_pruner(model, x, loader_for(x), Budget(params=0.97), ignored_layers=ignored)
        assert pruner.groups.names == ["1.body.0.0"]
        report = pruner.step()
        assert model[0][0].out_channels == 8 and model[2].body[1][0].out_channels == 24
        assert {"2.body.0.0", "2.body.1.0", "0.0"} <= {e.name for e in report.excluded}
        assert pruner.groups.names in (["1.body.0.0"], [])

    @pytest.mark.parametrize(
        "options",
        [{"round_to": 0}, {"max_pruning_ratio": 2.0}, {"allocator": "best"}, {"ignored_layers": ["0.0"]}],
        ids=lambda options: next(iter(options)),
    )
    def test_bad_options(self, options: dict[str, Any]) -> None:
        model, x = make_network("plain")
        snapshot = Snapshot(model)
        with pytest.raises((ValueError, TypeError)):
            self.make_pruner(model, x, loader_for(x), Budget(macs=0.5), **options)
        snapshot.check()

    @pytest.mark.parametrize("allocator", ["greedy", "uniform", "mine"])
    def test_allocators(self, allocator: str) -> None:
        def mine(curves: Any, cost: Any, space: Any, limits: Any) -> Any:
            assert set(curves) == set(cost.names) and limits["macs"] > 0
            return space.floor

        pruner, model, x = self.fresh("residual", allocator=mine if allocator == "mine" else allocator)
        report = pruner.step()
        assert Cost(*count_ops(model, x)) == report.cost
        assert allocator != "mine" or set(pruner.groups.widths.values()) <= {1}

    def test_flags_and_statistics_stay(self) -> None:
        model, x = make_network("residual")
        model.train()[1].eval()
        model[1].body[0][0].weight.requires_grad_(False)
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        modes = [m.training for m in model.modules()]
        statistics = {n: b.clone() for n, b in model.named_buffers()}
        self.make_pruner(model, x, loader_for(x), Budget(macs=0.5)).step()
        assert [m.training for m in model.modules()] == modes
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for key, buffer in model.named_buffers():  # those of the channels that stay, in their order
            old = statistics[key].tolist() if buffer.dim() else [statistics[key].item()]
            left = iter(old)
            assert all(value in left for value in buffer.flatten().tolist()), key

    def test_recalibration(self) -> None:
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
        assert torch.equal(model[0][1].running_mean, other[0][1].running_mean)  # nothing before it was pruned
        assert not torch.equal(model[2].body[1][1].running_mean, other[2].body[1][1].running_mean)
        model, x = make_network("residual")
        pruner = self.make_pruner(model, x, None, Budget(macs=0.5))
        snapshot = Snapshot(model)
        with pytest.raises(ValueError, match="loader"):
            pruner.step(refit="batchnorm")
        snapshot.check()

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_gradients_switched_off_around(self, context: Any) -> None:
        model, x = make_network("residual")
        with context():
            self.make_pruner(model, x, loader_for(x), Budget(macs=0.5)).step(refit="batchnorm")
        assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])
        model.train()(x).sum().backward()  # can be trained
        assert all(p.grad is not None for p in model.parameters())

    def test_the_user_may_train_between_steps(self) -> None:
        pruner, model, x = self.fresh("residual")
        for fraction in (0.8, 0.5):
            pruner.step(Budget(macs=fraction))
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            model.train()(x).square().sum().backward()
            optimizer.step()
        assert Cost(*count_ops(model, x)).macs <= 0.5 * pruner.dense.macs

    # --- errors: the model is bit for bit what it was, hooks are gone -------------------------------------------------

    def assert_refused(self, loader: Any, errors: Any, refit: str | None = None, **options: Any) -> None:
        model, x = make_network("plain")
        model.train()
        snapshot, built = Snapshot(model), []
        with pytest.raises(errors) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            built.append(self.make_pruner(model, x, loader(loader_for(x)), Budget(macs=0.5), **options))
            built[0].step(refit=refit)
        snapshot.check()
        for pruner in built:  # what is no loader at all is refused at once
            assert pruner.groups.widths == pruner.initial_widths and pruner.pruning_history() == []
        if not isinstance(caught.value, LoaderError):
            assert isinstance(caught.value, (ValueError, TypeError, RuntimeError)) and str(caught.value)

    @pytest.mark.parametrize("kind", BAD_DATA)
    def test_bad_labels(self, kind: str) -> None:
        if not self.needs_labels:
            pytest.skip("looks at no labels")
        self.assert_refused(*BAD_DATA[kind])

    @pytest.mark.parametrize("kind", BAD_LOADERS)
    def test_bad_loaders(self, kind: str) -> None:
        spoil, error = BAD_LOADERS[kind]
        self.assert_refused(spoil, error, refit="batchnorm" if not self.uses_data else None)

    def test_the_loaders_own_exception_passes(self) -> None:
        self.assert_refused(lambda batches: Fails(batches), LoaderError, refit="batchnorm")
        if self.uses_data:  # the second pass is the recalibration's, behind the surgery
            self.assert_refused(lambda batches: Fails(batches, 2), LoaderError, refit="batchnorm")

    def test_a_step_that_failed_can_be_repeated(self) -> None:
        model, x = make_network("concat")
        loader = Fails(loader_for(x), fatal=1 + self.uses_data)
        pruner = self.make_pruner(model, x, loader, Budget(macs=0.5))
        snapshot = Snapshot(model)
        with pytest.raises(LoaderError):
            pruner.step(refit="batchnorm")
        snapshot.check()
        pruner.step()
        clean, expected, _ = self.fresh("concat")
        clean.step()
        assert same_values(model, expected) and pruner.pruning_history() == clean.pruning_history()

    @pytest.mark.parametrize(
        "budget",
        [0.5, None, "half", {"macs": 0.5}, Budget(macs=1), Budget(macs=1e-6), Budget(params=0.9, macs=2)],
        ids=str,
    )
    def test_bad_budgets(self, budget: Any) -> None:
        model, x = make_network("plain")
        snapshot = Snapshot(model)
        pruner = self.make_pruner(model, x, loader_for(x), Budget(macs=0.5))
        error = BudgetError if isinstance(budget, Budget) else TypeError
        with pytest.raises(error, match="Budget" if error is TypeError else "cannot be reached"):
            self.make_pruner(model, x, loader_for(x), budget).step()
        if budget is not None:  # there it means: the pruner's own
            for use in (pruner.plan, pruner.step):
                with pytest.raises(error):
                    use(budget)
        snapshot.check()

    def test_no_group_to_prune(self) -> None:
        model, x = make_network("plain")
        snapshot = Snapshot(model)
        with pytest.raises(ValueError, match="no group that can be pruned"):
            self.make_pruner(model, x, loader_for(x), Budget(macs=0.5), ignored_layers=[model]).step()
        snapshot.check()

    def test_an_allocator_that_breaks_its_promise(self) -> None:
        for change in (lambda full: full * 0, lambda full: full + 1):
            model, x = make_network("plain")
            snapshot = Snapshot(model)

            def wrong(_curves: Any, cost: Any, *_: Any, change: Any = change) -> Any:
                return change(cost.full)

            pruner = self.make_pruner(model, x, loader_for(x), Budget(macs=0.5), allocator=wrong)
            with pytest.raises((ValueError, RuntimeError)):
                pruner.step()
            snapshot.check()
