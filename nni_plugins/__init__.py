"""The methods of :mod:`tp_importance` as pruners for NNI 3.0.

Importing this package needs NNI: ``pip install "tp-importance[nni]"``.
"""

from pathlib import Path

from .pruners.catro import CATROPruner
from .pruners.importance import ImportancePruner
from .pruners.itpruner import ITPruner
from .pruners.obs import OBSPruner
from .pruners.psap import PSAPPruner
from .pruners.resconv import ResConvPruner
from .refit import refit_masks
from .search.experiment import experiment_running, nni_trial, run_experiment, trial_table
from .search.tuner import BudgetTuner, BudgetTunerValidator, register_tuner, registered_tuner, unregister_tuner
from .surgery.speedup import speedup

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
