"""Optuna: the objective, and what was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.optional import optional_import
from .space import SearchSpace

__all__ = ["Run", "optuna_objective", "requeue_interrupted"]

Run = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""Parameters → metrics: :func:`~tp_importance.automl.prune_trial` with everything but ``params`` filled in."""


def optuna_objective(space: SearchSpace, run: Run, metrics: Sequence[str] = ("default",)) -> Callable[[Any], Any]:
    """An objective for ``study.optimize``; needs no import of Optuna.

    Args:
        space: what to suggest.
        run: ``run(params) → metrics``.
        metrics: what the study optimises, in the order of its directions: ``("default",)``, or
            ``("default", "macs")`` for ``directions=["maximize", "minimize"]``.

    Returns:
        ``objective(trial)``. All metrics become user attributes of the trial; so does the ``error`` of a failing one,
        which is raised again: let ``study.optimize(..., catch=(Exception,))`` go on.

    Raises:
        ValueError: if no metric is named; by the objective, if the metrics lack one.

    Example:
        >>> from tp_importance.automl import Float, Parameter
        >>> space = SearchSpace((Parameter("ratio:0", Float(0, 1)),))
        >>> objective = optuna_objective(space, lambda params: {"default": 1 - params["ratio:0"] ** 2})
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
        >>> study.optimize(objective, n_trials=20)
        >>> study.best_value > 0.9
        True
    """
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics={metrics!r} must be a list of names, e.g. ['default', 'macs']")

    def objective(trial: Any) -> Any:
        params = space.suggest(trial)
        try:
            found = run(params)
            values = [float(found[name]) for name in metrics if name in found]
            if len(values) < len(metrics):
                missing = [name for name in metrics if name not in found]
                raise ValueError(f"the trial gave {sorted(found)}, but the study optimises {missing}, too")
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise
        for name, value in found.items():
            trial.set_user_attr(name, value)
        return values[0] if len(values) == 1 else tuple(values)

    return objective


def requeue_interrupted(study: Any) -> int:
    """Give trials another chance that a killed process left running; call it when no worker is alive.

    They are marked as failed, and their parameters are queued for the next ones. Everything that was finished is in
    the study's storage anyway.

    Args:
        study: an Optuna study with a storage that outlives processes.

    Returns:
        How many there were.

    Raises:
        MissingPackageError: without Optuna; names the extra.
    """
    states = optional_import("optuna.trial").TrialState
    left = study.get_trials(deepcopy=False, states=(states.RUNNING,))
    for trial in left:
        study.tell(trial.number, state=states.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
    return len(left)
