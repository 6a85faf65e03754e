"""A search that stays on the budget: CMA-ES over the weights of the convex program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.linalg import helmert

from ..allocation import Ints
from ..curves import Floats
from .optional import optional_import
from .problem import BudgetProblem
from .space import check_names, flatten

__all__ = ["BudgetSearch", "SearchExhaustedError"]

Key = tuple[str, tuple[int, ...]]


class SearchExhaustedError(RuntimeError):
    """No widths on the budget are left that were not tried."""


class BudgetSearch:
    r"""Ask for parameters of trials, tell what they gave; every proposal keeps the budget and none comes twice.

    First come the widths that each method chooses itself, then those widths with the channels chosen by the method
    that did best, then CMA-ES (Hansen and Ostermeier 2001, from the package ``cmaes``) in the coordinates

    .. math:: z = H \log \alpha \in R^{G-1}

    α being the weights of the geometric program whose optimum the widths are
    (:func:`~tp_importance.program.implied_weights`), and H Helmert's matrix, which takes out the factor that changes
    nothing. So a step of any length stays on the budget surface. It starts at the best widths so far; where it finds
    nothing but known widths it starts anew there. Larger values are better. Ours.

    Args:
        problem: the budget, the methods and their widths.
        sigma: first standard deviation of log α; widths change by about half of it.
        population: of CMA-ES; default: 4 + ⌊3 log(G − 1)⌋.
        seed: of CMA-ES.

    Attributes:
        history: ``(parameters, value)`` in the order told; the value of a failed trial is None.

    Raises:
        MissingPackageError: without the package ``cmaes``; names the extra.
        ValueError: for a ``sigma`` that is not above 0 or a ``population`` below 2.

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
        self, problem: BudgetProblem, *, sigma: float = 0.5, population: int | None = None, seed: int = 0
    ) -> None:
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma < math.inf:
            raise ValueError(f"sigma={sigma!r} must be a number above 0, e.g. 0.5")
        if population is not None and (
            isinstance(population, bool) or not isinstance(population, int) or population < 2
        ):
            raise ValueError(f"population={population!r} must be an integer of at least 2, or None")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r} must be an integer >= 0")
        self._cmaes = optional_import("cmaes")
        self.problem, self.sigma, self.population, self.seed = problem, float(sigma), population, seed
        self.history: list[tuple[dict[str, Any], float | None]] = []
        self._results: dict[Key, float | None] = {}
        self._pending: dict[Key, tuple[int, Floats] | None] = {}  # with the number of the run of CMA-ES
        self._queue: list[Key] = [_key(m, u) for m, u in problem.starts.items()]
        self._crossed = self._restarts = 0
        self._basis: Floats = helmert(len(problem.cost.names)) if len(problem.cost.names) > 1 else np.zeros((0, 1))
        self._optimiser: Any = None
        self._method = problem.methods[0]
        self._pool: list[tuple[Floats, float]] = []

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
        if not self._queue and not self._crossed:
            self._cross()
        while self._queue:
            key = self._queue.pop(0)
            if key not in self._results and key not in self._pending:
                self._pending[key] = None
                return self.problem.params(key[0], key[1])
        for attempt in range(400):
            if self._optimiser is None or attempt % 40 == 39:
                self._restart(wider=1 + attempt // 40)
            z = self._optimiser.ask()
            key = _key(self._method, self._units(z))
            if key in self._results:
                self._learn(z, self._results[key])
            elif key not in self._pending:
                self._pending[key] = (self._restarts, z)
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
        flat = flatten(params)
        method = flat.get("method")
        check_names([str(method)], self.problem.methods, "method of this search")
        key = _key(str(method), self.problem.units(flat))
        if value is not None and not math.isfinite(value):
            raise ValueError(f"a trial gave {value}; report a finite number, or None if it failed")
        asked = key in self._pending
        proposed = self._pending.pop(key, None)
        self._results[key] = value
        self.history.append((self.problem.params(*key), value))
        if proposed is not None and proposed[0] == self._restarts and self._optimiser is not None:
            self._learn(proposed[1], value)
        elif not asked:  # from elsewhere: the next proposals start from the best of all
            self._optimiser = None

    def _cross(self) -> None:
        """Widths of all methods with the channels of the best one."""
        self._crossed, self._method = 1, self._best_key()[0]
        self._queue = [_key(self._method, units) for units in self.problem.starts.values()]

    def _best_key(self) -> Key:
        told = {key: value for key, value in self._results.items() if value is not None}
        if not told:
            return next(iter(self._pending), _key(self._method, self.problem.starts[self._method]))
        return max(told, key=lambda key: told[key])

    def _restart(self, wider: int = 1) -> None:
        self._method, units = self._best_key()
        mean = self._basis @ np.log(self.problem.weights(np.array(units)))
        size = max(len(mean), 2)  # cmaes wants two dimensions; the second then does nothing
        self._optimiser = self._cmaes.CMA(
            mean=np.pad(mean, (0, size - len(mean))),
            sigma=self.sigma * wider,
            population_size=self.population,
            seed=self.seed + self._restarts,
        )
        self._restarts += 1
        self._pool = []

    def _units(self, z: Floats) -> Ints:
        log = np.clip(z[: len(self._basis)] @ self._basis, -30.0, 30.0)
        return self.problem.project(np.exp(log), self._method)

    def _learn(self, z: Floats, value: float | None) -> None:
        """Hand a value to CMA-ES, which minimises and takes whole generations; failed trials rank last."""
        told = [v for v in self._results.values() if v is not None]
        loss = -value if value is not None else 1.0 - min(told, default=0.0)
        self._pool.append((z, loss))
        if len(self._pool) >= self._optimiser.population_size:
            generation = self._pool[: self._optimiser.population_size]
            self._pool = self._pool[self._optimiser.population_size :]
            self._optimiser.tell(generation)
            if self._optimiser.should_stop():
                self._optimiser = None


def _key(method: str, units: Any) -> Key:
    return method, tuple(int(u) for u in units)
