"""Ray Tune: the trainable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .optuna_study import Run
from .space import SearchSpace, parameters_noted

__all__ = ["ray_trainable"]


def ray_trainable(space: SearchSpace, run: Run) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """A function trainable for ``ray.tune.Tuner(..., param_space=space.to_ray())``; needs no import of Ray.

    Args:
        space: what the configurations come from.
        run: ``run(params) → metrics``; Ray pickles it, so files and folders in it need absolute paths.

    Returns:
        ``trainable(config)``, which checks the configuration and returns the metrics: Ray reports them as the result.
        A failing trial ends as ``ERROR`` with the parameters in its message, the others go on.

    Example:
        >>> from tp_importance.automl import Float, Parameter
        >>> space = SearchSpace((Parameter("ratio:0", Float(0, 1)),))
        >>> ray_trainable(space, lambda params: {"default": 1 - params["ratio:0"]})({"ratio:0": 0.25})
        {'default': 0.75}
    """

    def trainable(config: Mapping[str, Any]) -> dict[str, float]:
        params = space.check(config)
        with parameters_noted(params):
            return {name: float(value) for name, value in run(params).items()}

    return trainable
