"""Pruning inside AutoML searches: one pure trial, search spaces, methods by name, and a search that keeps budgets.

The adapters for Optuna and Ray Tune are :mod:`.optuna_study` and :mod:`.ray_tune`; those for NNI are in
:mod:`nni_plugins`. Their packages come with ``pip install "tp-importance[automl]"`` and are imported when used.
"""

from ..methods.hosts import RandomImportance
from ..pruning.domains import Choice, Float, Int
from ..pruning.registry import METHODS, Job, Method, Train, find_method, register_method
from .builder import search_space
from .optuna_study import optuna_objective, requeue_interrupted
from .problem import BudgetProblem
from .ray_tune import ray_trainable
from .search import BudgetSearch, SearchExhaustedError
from .space import Parameter, SearchSpace, flatten
from .statistics import CurveStore, Valuation
from .trial import TrialParameters, prune_trial

__all__ = [
    "METHODS",
    "BudgetProblem",
    "BudgetSearch",
    "Choice",
    "CurveStore",
    "Float",
    "Int",
    "Job",
    "Method",
    "Parameter",
    "RandomImportance",
    "SearchExhaustedError",
    "SearchSpace",
    "Train",
    "TrialParameters",
    "Valuation",
    "find_method",
    "flatten",
    "optuna_objective",
    "prune_trial",
    "ray_trainable",
    "register_method",
    "requeue_interrupted",
    "search_space",
]
