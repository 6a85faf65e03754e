"""Where a search over the coordinates of the budget goes next: what existing optimisers need to know, and no more."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from scipy.linalg import helmert

from ..core.optional import optional_import
from ..core.types import Floats

__all__ = ["CMAES", "STRATEGIES", "TPE", "Settings", "Strategy"]

REACH = math.log(20.0)
"""Furthest that TPE goes from equal weights, in log α: factors of 1/20 to 20."""


@dataclass(frozen=True)
class Settings:
    """What a strategy starts with.

    Attributes:
        start: log α of the best widths so far, shape (G,).
        told: all (log α, value) so far, larger values are better.
        wider: above 1 where nothing new was found: how much wider to look.
        sigma: first standard deviation of log α, of CMA-ES, for ``wider=1``.
        population: of CMA-ES.
        seed: of the random numbers.
    """

    start: Floats
    told: Sequence[tuple[Floats, float]] = ()
    wider: int = 1
    sigma: float = 0.5
    population: int | None = None
    seed: int = 0


class Strategy(Protocol):
    """An optimiser of log α ∈ R^G, up to a common summand; larger values are better.

    Attributes:
        finished: it has converged, and is to be started anew.
        remembers: it learns from results it did not ask for, if it is started anew with them.
    """

    finished: bool
    remembers: bool

    def ask(self) -> tuple[Any, Floats]:
        """A handle for :meth:`tell`, and log α, shape (G,)."""

    def tell(self, handle: Any, value: float) -> None:
        """The value of what was asked for."""


class CMAES:
    """CMA-ES (Hansen and Ostermeier 2001), from the package ``cmaes``, around ``settings.start``.

    The coordinates are H log α ∈ R^{G−1} with Helmert's matrix H, which takes out the summand that changes nothing.

    Raises:
        MissingPackageError: without the package; names the extra.

    Example:
        >>> strategy = CMAES(Settings(np.zeros(3), sigma=0.1))
        >>> for _ in range(200):
        ...     handle, z = strategy.ask()
        ...     strategy.tell(handle, -float(((z - [1, 0, -1]) ** 2).sum()))
        >>> np.abs(strategy.ask()[1] - [1, 0, -1]).max() < 0.1
        np.True_
    """

    finished = False
    remembers = False

    def __init__(self, settings: Settings) -> None:
        groups = len(settings.start)
        self._basis: Floats = helmert(groups) if groups > 1 else np.zeros((0, 1))
        mean = self._basis @ settings.start
        size = max(len(mean), 2)  # cmaes wants two dimensions; the second then does nothing
        self._optimiser = optional_import("cmaes").CMA(
            mean=np.pad(mean, (0, size - len(mean))),
            sigma=settings.sigma * settings.wider,
            population_size=settings.population,
            seed=settings.seed,
        )
        self._pool: list[tuple[Floats, float]] = []

    def ask(self) -> tuple[Any, Floats]:
        """A handle for :meth:`tell`, and log α, shape (G,)."""
        z = self._optimiser.ask()
        return z, z[: len(self._basis)] @ self._basis

    def tell(self, handle: Any, value: float) -> None:
        """The value of what was asked for; it takes whole generations, and minimises."""
        self._pool.append((handle, -value))
        if len(self._pool) >= self._optimiser.population_size:
            generation = self._pool[: self._optimiser.population_size]
            self._pool = self._pool[self._optimiser.population_size :]
            self._optimiser.tell(generation)
            self.finished = bool(self._optimiser.should_stop())


class TPE:
    """The tree-structured Parzen estimator (Bergstra et al. 2011) of Optuna, over log α in ± log 20.

    It learns from everything told so far. With fewer than ten results (Optuna's default), and for ``wider > 1``, it
    draws uniformly.

    Raises:
        MissingPackageError: without Optuna; names the extra.

    Example:
        >>> strategy = TPE(Settings(np.zeros(2)))
        >>> for _ in range(60):
        ...     handle, z = strategy.ask()
        ...     strategy.tell(handle, -abs(float(z[0] - z[1]) - 1))
        >>> handle, z = strategy.ask()
        >>> abs(z[0] - z[1] - 1) < 2
        np.True_
    """

    finished = False
    remembers = True

    def __init__(self, settings: Settings) -> None:
        optuna = optional_import("optuna")
        self._space = {
            str(i): optuna.distributions.FloatDistribution(-REACH, REACH) for i in range(len(settings.start))
        }
        first = 10 if settings.wider == 1 else sys.maxsize
        sampler = optuna.samplers.TPESampler(n_startup_trials=first, seed=settings.seed, constant_liar=True)
        pruner = optuna.pruners.NopPruner()
        level, _ = optuna.logging.get_verbosity(), optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        optuna.logging.set_verbosity(level)
        for log_weights, value in settings.told:
            z = np.clip(log_weights, -REACH, REACH).tolist()
            params = dict(zip(self._space, z, strict=True))
            self._study.add_trial(optuna.trial.create_trial(params=params, distributions=self._space, value=value))

    def ask(self) -> tuple[Any, Floats]:
        """A handle for :meth:`tell`, and log α, shape (G,)."""
        trial = self._study.ask(self._space)
        return trial, np.array([trial.params[name] for name in self._space])

    def tell(self, handle: Any, value: float) -> None:
        """The value of what was asked for."""
        self._study.tell(handle, value)


STRATEGIES: Mapping[str, Callable[[Settings], Strategy]] = MappingProxyType({"tpe": TPE, "cmaes": CMAES})
"""Strategies by name."""
