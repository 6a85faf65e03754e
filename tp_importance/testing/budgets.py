"""Contract of a pruner: budgets are met, used up and refused; options do what they say."""

from __future__ import annotations

from typing import Any

import pytest

from ..budget import Budget, Cost
from ..errors import BudgetError
from ..graph.counting import count_ops
from .cases import topology, verified
from .data import FailingLoader, loader_for
from .networks import make_network
from .snapshots import Snapshot
from .surgery import PrunerCase

__all__ = ["BudgetTests"]


class BudgetTests(PrunerCase):
    """The pruned network costs no more than was allowed, and not one more channel would have fitted."""

    @pytest.mark.parametrize(
        "budget",
        [Budget(macs=0.3), Budget(params=0.4), Budget(macs=0.7, params=0.3), Budget(macs=200_000)],
        ids=["macs", "params", "both", "absolute"],
    )
    def test_budgets_are_met(self, budget: Budget) -> None:
        """Counted on the pruned network, every limit holds; the same counts stand in the cost model."""
        pruner, model, x = self.fresh("residual", budget)
        limits = budget.limits(pruner.dense)
        pruner.step()
        counted = Cost(*count_ops(model, x)).as_dict()
        assert all(counted[field] <= limit for field, limit in limits.items())
        for g in pruner.groups:
            assert pruner.cost_model.cost({g.name: g.width}).as_dict() == counted
        for name, width in pruner.plan(Budget(macs=1.0)).widths.items():
            assert width == pruner.groups[name].width

    def test_whole_budget_changes_nothing_and_warns(self) -> None:
        """A budget of everything removes nothing, and says so."""
        pruner, model, x = self.fresh("residual", Budget(macs=1.0))
        snapshot = Snapshot(model)
        with pytest.warns(UserWarning, match="nothing is pruned"):
            report = pruner.step()
        snapshot.check()
        assert report.cost == report.dense == Cost(*count_ops(model, x)) and pruner.pruning_history() == []
        assert pruner.plan().is_noop

    @pytest.mark.parametrize("allocator", ["greedy", "uniform"])
    def test_repeated_steps_refer_to_the_original_cost(self, allocator: str) -> None:
        """A second step to 0.3 means three tenths of the network as it was first."""
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
        """One pass over the loader answers for every budget."""
        model, x = make_network("plain")
        loader = FailingLoader(loader_for(x), fatal=2)
        pruner = self.make(model, x, loader, Budget(macs=0.5), **verified("plain"))
        plans = [pruner.plan(Budget(macs=f)) for f in (0.8, 0.5, 0.3)]
        assert plans[0].cost.macs > plans[1].cost.macs > plans[2].cost.macs
        assert loader.passes == int(self.uses_data)

    @pytest.mark.parametrize(
        "budget",
        [0.5, None, "half", {"macs": 0.5}, Budget(macs=1), Budget(macs=1e-6), Budget(params=0.9, macs=2)],
        ids=str,
    )
    def test_bad_budgets(self, budget: Any) -> None:
        """What is no budget, and what cannot be reached, is refused; the network stays as it is."""
        model, x = make_network("plain")
        snapshot = Snapshot(model)
        pruner = self.make(model, x, loader_for(x), Budget(macs=0.5), **verified("plain"))
        error = BudgetError if isinstance(budget, Budget) else TypeError
        with pytest.raises(error, match="Budget" if error is TypeError else "cannot be reached"):
            self.make(model, x, loader_for(x), budget, **verified("plain")).step()
        if budget is not None:  # there it means: the pruner's own
            for use in (pruner.plan, pruner.step):
                with pytest.raises(error):
                    use(budget)
        snapshot.check()

    def test_options(self) -> None:
        """``round_to``, ``max_pruning_ratio`` (over all steps) and ``ignored_layers`` are kept."""
        pruner, model, _ = self.fresh("residual", Budget(macs=0.4), round_to=4)
        assert all(row.after % 4 == 0 for row in pruner.step().rows)
        pruner, model, _ = self.fresh("residual", Budget(macs=0.6), max_pruning_ratio=0.5)
        pruner.step()
        pruner.step(Budget(macs=0.4))  # half of the initial channels, also after several steps
        assert all(w >= pruner.initial_widths[n] / 2 for n, w in pruner.groups.widths.items())
        with pytest.raises(BudgetError):
            pruner.step(Budget(macs=0.01))
        model, x = make_network("residual")
        stem, block = model.get_submodule("0.0"), model.get_submodule("2")
        pruner = self.make(model, x, loader_for(x), Budget(params=0.97), ignored_layers=[block, stem.weight])
        assert pruner.groups.names == ["1.body.0.0"]
        report = pruner.step()
        assert stem.out_channels == 8 and block.get_submodule("body.1.0").out_channels == 24
        assert {"2.body.0.0", "2.body.1.0", "0.0"} <= {e.name for e in report.excluded}
        assert pruner.groups.names in (["1.body.0.0"], [])

    @pytest.mark.parametrize(
        "options",
        [{"round_to": 0}, {"max_pruning_ratio": 2.0}, {"allocator": "best"}, {"ignored_layers": ["0.0"]}],
        ids=lambda options: next(iter(options)),
    )
    def test_bad_options(self, options: dict[str, Any]) -> None:
        """Options that make no sense are refused by the constructor, which changes nothing."""
        model, x = make_network("plain")
        snapshot = Snapshot(model)
        with pytest.raises((ValueError, TypeError)):
            self.make(model, x, loader_for(x), Budget(macs=0.5), **verified("plain"), **options)
        snapshot.check()

    @pytest.mark.parametrize("allocator", ["greedy", "uniform", "mine"])
    def test_allocators(self, allocator: str) -> None:
        """Widths come from the allocator asked for: one of ours by name, or a function of the user's."""

        def mine(curves: Any, cost: Any, space: Any, limits: Any) -> Any:
            assert set(curves) == set(cost.names) and limits["macs"] > 0
            return space.floor

        pruner, model, x = self.fresh("residual", allocator=mine if allocator == "mine" else allocator)
        report = pruner.step()
        assert Cost(*count_ops(model, x)) == report.cost
        assert allocator != "mine" or set(pruner.groups.widths.values()) <= {1}

    def test_an_allocator_that_breaks_its_promise(self) -> None:
        """Widths of nothing, and widths beyond the network's, are refused; nothing is removed."""
        for change in (lambda full: full * 0, lambda full: full + 1):
            model, x = make_network("plain")
            snapshot = Snapshot(model)

            def wrong(_curves: Any, cost: Any, *_: Any, change: Any = change) -> Any:
                return change(cost.full)

            pruner = self.make(model, x, loader_for(x), Budget(macs=0.5), allocator=wrong, **verified("plain"))
            with pytest.raises((ValueError, RuntimeError)):
                pruner.step()
            snapshot.check()

    def test_no_group_to_prune(self) -> None:
        """A network in which every layer is ignored is refused."""
        model, x = make_network("plain")
        snapshot = Snapshot(model)
        with pytest.raises(ValueError, match="no group that can be pruned"):
            self.make(model, x, loader_for(x), Budget(macs=0.5), ignored_layers=[model]).step()
        snapshot.check()
