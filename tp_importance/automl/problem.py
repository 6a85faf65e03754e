"""A budget as a search problem: which widths keep it, as plain data that travels between processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from ..allocation.curves import Curve
from ..allocation.limits import require_reachable
from ..allocation.program import ProgramAllocator, implied_weights
from ..allocation.registry import named_allocator
from ..allocation.space import WidthSpace
from ..budget import Budget
from ..core.arguments import checked_budget, checked_model
from ..core.copies import copied_with
from ..core.files import read_json, write_json
from ..core.processes import warned_once
from ..core.types import Ints
from ..errors import SearchSpaceError
from ..graph.cost import COST_FIELDS, CostModel
from ..pruning.domains import Choice, Int
from ..pruning.registry import Job, find_method
from ..pruning.target import PruningTarget
from ..statistics.gradients import LossFn
from .channels import value_network
from .space import Parameter, SearchSpace
from .statistics import CurveStore
from .trial import checked_number

__all__ = ["BudgetProblem"]

FORMAT = "tp_importance.budget_problem"


@dataclass(frozen=True, eq=False)
class BudgetProblem:
    """The widths that keep a budget, what they cost, and where methods would start.

    Attributes:
        cost: exact cost of any widths.
        space: admissible widths.
        limits: upper limit per cost field.
        losses: per method the loss of every group at every width; it decides which steps fill the budget up.
        starts: per method the units per group that it would choose itself.
        options: per method its hyper-parameters, fixed in this search.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> problem = BudgetProblem.prepare(net, torch.randn(1, 3, 12, 12), budget=Budget(macs=0.5),
        ...                                 methods={"magnitude": {"p": 1}})
        >>> units = problem.project([1.0, 5.0], "magnitude")
        >>> problem.macs(units) <= problem.limits["macs"], problem.params("magnitude", units)["magnitude.p"]
        (True, 1)
    """

    cost: CostModel
    space: WidthSpace
    limits: dict[str, int]
    losses: dict[str, list[list[float]]]
    starts: dict[str, Ints]
    options: dict[str, dict[str, Any]]

    @classmethod
    @warned_once()
    def prepare(
        cls,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any] | None = None,
        *,
        budget: Budget,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("catro", "itpruner", "psap", "magnitude"),
        statistics: Any = None,
        loss_fn: LossFn | None = None,
        **pruner_options: Any,
    ) -> BudgetProblem:
        """Collect the statistics of all methods, once, and let each choose its widths; the model is not changed.

        Args:
            model: the network.
            example_inputs: tensor, tuple or dict, batch dimension first.
            loader: re-iterable of batches, for methods that look at data.
            budget: what the network may cost.
            methods: names, or names with their hyper-parameters.
            statistics: folder to share with the trials, see :func:`~tp_importance.automl.prune_trial`.
            loss_fn: ``loss_fn(output, labels)`` for criteria that look at a loss; default: their own, cross entropy.
            **pruner_options: as for the trials.

        Raises:
            BudgetError: if the budget cannot be reached; names the least reachable cost.
            SearchSpaceError: for an unknown method, or one that takes no widths.
        """
        checked_budget(budget).require_counted("the budget surface of a search")
        given = {m: dict(methods[m]) for m in methods} if isinstance(methods, Mapping) else {m: {} for m in methods}
        chosen = {name: find_method(name) for name in given}
        for method in chosen.values():
            if method.make is None:
                raise SearchSpaceError(f"method {method.name!r} takes no widths per group; leave it out of this search")
        checked_model(model)
        clone, options = copied_with(model, pruner_options)
        store = None if statistics is None else CurveStore(statistics, model)
        arguments = Job(clone, example_inputs, loader, budget, store=store, pruner_options=options).arguments
        arguments.pop("label_fn", None)
        target = PruningTarget(clone, example_inputs, **arguments)
        cost, space, limits = target.cost_model, target.space, budget.marked_limits(target.dense)
        require_reachable(cost, space, limits)
        losses, starts = {}, {}
        for name, method in chosen.items():
            job = Job(
                clone, example_inputs, loader, budget, given[name], store=store, loss_fn=loss_fn, pruner_options=options
            )
            found = value_network(method, job, target.groups)
            curves = found.curves(target.groups)
            starts[name] = named_allocator(None, found.weights, found)(curves, cost, space, limits)
            losses[name] = [curves[g].loss.tolist() for g in cost.names]
        return cls(cost, space, limits, losses, starts, given)

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return list(self.starts)

    def macs(self, units: ArrayLike) -> int:
        """Exact MACs."""
        return int(self.cost.evaluate(units)[COST_FIELDS.index("macs")])

    def fits(self, units: ArrayLike) -> bool:
        """Whether the units keep every limit and are admissible."""
        admissible = all(u in levels for u, levels in zip(np.asarray(units), self.space.levels, strict=True))
        return admissible and self.cost.within(units, self.limits)

    def project(self, weights: ArrayLike, method: str) -> Ints:
        r"""Units on the budget for any weights α > 0: the geometric program, rounded down and filled up.

        Args:
            weights: α per group, shape (G,).
            method: whose losses fill up.

        Returns:
            Units, shape (G,): within every limit, and no further step fits.
        """
        curves = {
            name: Curve(np.array(loss), np.arange(len(loss) - 1))
            for name, loss in zip(self.cost.names, self.losses[method], strict=True)
        }
        alpha = dict(zip(self.cost.names, np.asarray(weights, np.float64).tolist(), strict=True))
        return ProgramAllocator(alpha)(curves, self.cost, self.space, self.limits)

    def weights(self, units: ArrayLike) -> Any:
        """Weights that lead to ``units``, up to rounding; shape (G,), geometric mean 1."""
        return implied_weights(self.cost, self.limits, units)

    def params(self, method: str, units: ArrayLike) -> dict[str, Any]:
        """Parameters for :func:`~tp_importance.automl.prune_trial`."""
        options = {f"{method}.{key}": value for key, value in self.options[method].items()}
        widths = {f"width:{name}": width for name, width in self.cost.widths(units).items()}
        return {"method": method, **options, **widths}

    def units(self, params: Mapping[str, Any]) -> Ints:
        """Units per group from the parameters of a trial.

        Raises:
            SearchSpaceError: if a group is missing or unknown, or a width is not admissible.
        """
        found = {
            key.removeprefix("width:"): int(checked_number(key, "width", value))
            for key, value in params.items()
            if key.startswith("width:")
        }
        if set(found) != set(self.cost.names):
            odd = sorted(set(found).symmetric_difference(self.cost.names))
            raise SearchSpaceError(f"the parameters and the search problem differ in the groups {odd}")
        try:
            return self.cost.units(found)
        except ValueError as error:
            raise SearchSpaceError(str(error)) from error

    def search_space(self) -> SearchSpace:
        """The space of the proposals, for hosts that want to see one; the budget couples its parameters."""
        widths = []
        for name, levels, size in zip(self.cost.names, self.space.levels, self.cost.unit_sizes, strict=True):
            widths.append(Parameter(f"width:{name}", Int(int(levels[0] * size), int(levels[-1] * size))))
        return SearchSpace((Parameter("method", Choice(tuple(self.methods))), *widths))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the problem as JSON, in one step."""
        content = {
            "format": FORMAT,
            "cost": {k: np.asarray(v).tolist() for k, v in vars(self.cost).items() if k not in ("latency", "left_out")},
            "levels": [levels.tolist() for levels in self.space.levels],
            "limits": self.limits,
            "losses": self.losses,
            "starts": {name: units.tolist() for name, units in self.starts.items()},
            "options": self.options,
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BudgetProblem:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if there is no such file, it is something else, or it is damaged.
        """
        try:
            content = read_json(path)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            names = tuple(content["cost"].pop("names"))
            arrays: dict[str, Any] = {k: np.array(v, np.int64) for k, v in content["cost"].items()}
            cost = CostModel(names, **arrays)
            space = WidthSpace(tuple(np.array(levels, np.int64) for levels in content["levels"]))
            starts = {name: np.array(units, np.int64) for name, units in content["starts"].items()}
            found = cls(cost, space, content["limits"], content["losses"], starts, content["options"])
            found._check()
            return found
        except (OSError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{path} is no search problem ({type(error).__name__}: {error}); write one by "
                "BudgetProblem.prepare(model, ...).save(path)"
            ) from error

    def _check(self) -> None:
        """Check what was read: one value per group everywhere, of every method.

        Raises:
            ValueError: names the field.
        """
        groups = len(self.cost.names)
        if len(self.space.levels) != groups or any(levels.ndim != 1 for levels in self.space.levels):
            raise ValueError(f"its levels are not of {groups} groups")
        for name, value in self.limits.items():
            if name not in COST_FIELDS or type(value) is not int:
                raise ValueError(f"its limit {name}={value!r} is no cost")
        for name, units in self.starts.items():
            losses, options = self.losses[name], self.options[name]
            flat = [float(loss) for of_group in losses for loss in of_group]
            if units.shape != (groups,) or len(losses) != groups or not np.isfinite(flat).all():
                raise ValueError(f"its units and losses of {name!r} are not of {groups} groups")
            if not isinstance(options, dict):
                raise ValueError(f"its options of {name!r} are {options!r}, not a dict")
