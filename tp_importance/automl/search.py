"""A search that stays on the budget: its coordinates are the weights of the convex program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.types import Floats
from ..pruning.domains import check_names
from .problem import BudgetProblem
from .space import flatten
from .strategies import STRATEGIES, Settings, Strategy

__all__ = ["BudgetSearch", "SearchExhaustedError"]

Key = tuple[str, tuple[int, ...]]


class SearchExhaustedError(RuntimeError):
    """No widths on the budget are left that were not tried."""


class BudgetSearch:
    r"""Ask for parameters of trials, tell what they gave; every proposal keeps the budget and none comes twice.

    First come the widths that each method chooses itself, then those widths with the channels chosen by the method
    that did best, then an optimiser in the coordinates

    .. math:: \log \alpha \in R^G, \quad \text{up to a common summand}

    α being the weights of the geometric program whose optimum the widths are
    (:func:`~tp_importance.allocation.program.implied_weights`). So a step of any length stays on the budget surface.
    CMA-ES starts at the best widths so far; where an optimiser finds nothing but known widths it starts anew. Larger
    values are better. Ours.

    Args:
        problem: the budget, the methods and their widths.
        strategy: ``"tpe"`` or ``"cmaes"``, see :mod:`~tp_importance.automl.strategies`.
        sigma: first standard deviation of log α, for CMA-ES; widths change by about half of it.
        population: of CMA-ES; default: 4 + ⌊3 log(G − 1)⌋.
        seed: of the optimiser.

    Attributes:
        history: ``(parameters, value)`` in the order told; the value of a failed trial is None.

    Raises:
        MissingPackageError: without the package of the strategy, Optuna or ``cmaes``; names the extra.
        ValueError: for an unknown strategy, a ``sigma`` that is not above 0 or a ``population`` below 2.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tp_importance import Budget
        >>> def conv():
        ...     return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), conv(), conv(), nn.Conv2d(8, 2, 3))
        >>> x, budget = torch.randn(1, 3, 12, 12), Budget(macs=0.5)
        >>> problem = BudgetProblem.prepare(net, x, budget=budget, methods=["magnitude"])
        >>> search = BudgetSearch(problem)
        >>> for _ in range(10):
        ...     proposal = search.ask()
        ...     search.tell(proposal, -abs(proposal["width:0"] - 6))
        >>> search.best[0]["width:0"]
        6
    """

    def __init__(
        self,
        problem: BudgetProblem,
        *,
        strategy: str = "tpe",
        sigma: float = 0.5,
        population: int | None = None,
        seed: int = 0,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r} is unknown; choose one of {sorted(STRATEGIES)}")
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma < math.inf:
            raise ValueError(f"sigma={sigma!r} must be a number above 0, e.g. 0.5")
        if population is not None and (
            isinstance(population, bool) or not isinstance(population, int) or population < 2
        ):
            raise ValueError(f"population={population!r} must be an integer of at least 2, or None")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r} must be an integer >= 0")
        self.problem, self.strategy, self.sigma, self.population, self.seed = (
            problem,
            strategy,
            float(sigma),
            population,
            seed,
        )
        self.history: list[tuple[dict[str, Any], float | None]] = []
        self._results: dict[Key, float | None] = {}
        self._pending: dict[Key, tuple[int, Any] | None] = {}  # with the number of the optimiser's run, and its handle
        self._queue: list[Key] = [_key(m, u) for m, u in problem.starts.items()]
        self._crossed = False
        self._method = problem.methods[0]
        self._runs = 0
        self._optimiser: Strategy | None = None
        self._started()  # so that a missing package shows at once
        self._runs = 0

    @property
    def best(self) -> tuple[dict[str, Any], float]:
        """Parameters and value of the best trial.

        Raises:
            RuntimeError: before the first result.
        """
        told = [(params, value) for params, value in self.history if value is not None]
        if not told:
            raise RuntimeError("no trial has given a result yet: tell(params, value) first")
        return max(told, key=lambda item: item[1])

    def ask(self) -> dict[str, Any]:
        """Parameters of the next trial; may be called again before the last was told.

        Raises:
            SearchExhaustedError: if nothing new is found.
        """
        while self._queue or not self._crossed:
            if not self._queue:
                self._cross()
                continue
            key = self._queue.pop(0)
            if key not in self._results and key not in self._pending:
                self._pending[key] = None
                return self.problem.params(key[0], key[1])
        for attempt in range(400):
            again = attempt % 20 == 19  # nothing but known widths: look further away
            if self._optimiser is None or self._optimiser.finished or again:
                self._optimiser = self._started(wider=1 + (attempt + 1) // 20)
            handle, log_weights = self._optimiser.ask()
            key = _key(self._method, self.problem.project(np.exp(np.clip(log_weights, -30.0, 30.0)), self._method))
            if key in self._results:
                self._optimiser.tell(handle, self._rank(self._results[key]))
            elif key not in self._pending:
                self._pending[key] = (self._runs, handle)
                if attempt >= 19 and self._optimiser.remembers:
                    self._optimiser = None
                return self.problem.params(key[0], key[1])
        raise SearchExhaustedError(
            f"after {len(self._results)} trials no other widths on the budget were found; the search is done"
        )

    def tell(self, params: Mapping[str, Any], value: float | None) -> None:
        """Report what a trial gave; also one that was not asked for, of an earlier run say.

        Args:
            params: as :meth:`ask` gave them.
            value: larger is better; None if the trial failed.

        Raises:
            SearchSpaceError: if the parameters do not belong to this problem.
            ValueError: if the value is not finite.
        """
        key = self._checked(params)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"a trial gave {value}; report a finite number, or None if it failed")
        asked = key in self._pending
        proposed = self._pending.pop(key, None)
        self._results[key] = value
        self.history.append((self.problem.params(*key), value))
        if self._optimiser is None:
            return
        if proposed is not None and proposed[0] == self._runs:
            self._optimiser.tell(proposed[1], self._rank(value))
        elif not asked or self._optimiser.remembers:  # the next proposals start from the best, or learn from all
            self._optimiser = None

    def expect(self, params: Mapping[str, Any]) -> None:
        """A trial with these parameters runs already, of an earlier run say: they are not proposed.

        Args:
            params: as :meth:`ask` gave them.

        Raises:
            SearchSpaceError: if the parameters do not belong to this problem.
        """
        self._pending.setdefault(self._checked(params), None)

    def _checked(self, params: Mapping[str, Any]) -> Key:
        flat = flatten(params)
        method = str(flat.get("method"))
        check_names([method], self.problem.methods, "method of this search")
        return _key(method, self.problem.units(flat))

    def _cross(self) -> None:
        """Widths of all methods with the channels of the best one."""
        self._crossed, self._method = True, self._best_key()[0]
        self._queue = [_key(self._method, units) for units in self.problem.starts.values()]

    def _best_key(self) -> Key:
        told = {key: value for key, value in self._results.items() if value is not None}
        if not told:
            return next(iter(self._pending), _key(self._method, self.problem.starts[self._method]))
        return max(told, key=lambda key: told[key])

    def _started(self, wider: int = 1) -> Strategy:
        """The optimiser, at the best widths so far."""
        self._method, units = self._best_key()
        told = [(self._log_weights(key[1]), self._rank(value)) for key, value in self._results.items()]
        settings = Settings(self._log_weights(units), told, wider, self.sigma, self.population, self.seed + self._runs)
        self._runs += 1
        return STRATEGIES[self.strategy](settings)

    def _log_weights(self, units: tuple[int, ...]) -> Floats:
        result: Floats = np.log(self.problem.weights(np.array(units)))
        return result

    def _rank(self, value: float | None) -> float:
        """The value; failed trials rank below all others."""
        told = [v for v in self._results.values() if v is not None]
        return value if value is not None else min(told, default=0.0) - 1.0


def _key(method: str, units: Any) -> Key:
    return method, tuple(int(u) for u in units)
