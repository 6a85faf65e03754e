"""The methods of :mod:`tp_importance` as pruners for NNI 3.0.

Importing this package needs NNI: ``pip install "tp-importance[nni]"``.
"""

from pathlib import Path

from .base import ImportancePruner
from .catro import CATROPruner
from .experiment import experiment_running, nni_trial, run_experiment, trial_table
from .itpruner import ITPruner
from .obs import OBSPruner
from .psap import PSAPPruner
from .refit import refit_masks
from .resconv import ResConvPruner
from .speedup import speedup
from .tuner import BudgetTuner, BudgetTunerValidator, register_tuner, registered_tuner, unregister_tuner

ALGORITHMS = Path(__file__).with_name("algorithms.yml")
"""Meta file for ``nnictl algo register --meta``."""

__all__ = [
    "ALGORITHMS",
    "BudgetTuner",
    "BudgetTunerValidator",
    "CATROPruner",
    "ITPruner",
    "ImportancePruner",
    "OBSPruner",
    "PSAPPruner",
    "ResConvPruner",
    "experiment_running",
    "nni_trial",
    "refit_masks",
    "register_tuner",
    "registered_tuner",
    "run_experiment",
    "speedup",
    "trial_table",
    "unregister_tuner",
]
