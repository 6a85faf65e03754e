"""Structured-pruning methods from the literature as plugins for Torch-Pruning, and what they share.

The way through the package is one-directional: loader → statistics (:mod:`.observe`) → value curves
(:mod:`.curves`) → widths under a budget (:mod:`.allocation`) → surgery by the host (:mod:`.surgery`) → report.
"""

from importlib.metadata import PackageNotFoundError, version

from .allocation import ALLOCATORS, WidthSpace, greedy, greedy_path, uniform
from .budget import Budget, Cost
from .calibrate import recalibrate_batchnorm
from .catro import CATROImportance, CATROPruner
from .checkpoint import load_pruned, save_pruned
from .compensated_step import compensated_step
from .compensation import Compensation, compensate
from .cost import CostModel
from .curves import Curve, curve_from_scores, value_curves
from .distillation import Distiller, distillation_loss
from .errors import BudgetError, NotCollectedError, StaleStatisticsError, TracingError
from .groups import ChannelGroup, Excluded, PrunableGroups, prunable_groups
from .importance import StatisticalImportance
from .itpruner import ITPruner, ITPrunerImportance
from .lagrange import LagrangeAllocator, lagrange
from .latency import Latency, measure_latency
from .latency_model import LatencyModel
from .latency_table import LatencyTable
from .layer_pruners import channel_pruners
from .obs import OBSImportance, OBSPruner
from .observe import Observed, Watch, observe
from .one_shot import OneShot, prune
from .plan import Plan
from .program import ProgramAllocator
from .pruner import BudgetPruner
from .psap import PSAPPruner
from .psap_history import PSAPHistory
from .psap_importance import PSAPImportance
from .psap_schedule import PSAPSchedule
from .report import CompensationReport, PruningReport
from .resconv import (
    LayerPlan,
    LayerReport,
    ResConv2d,
    ResConvImportance,
    ResConvPruner,
    convert_to_resconv,
    fuse,
    remove_layers,
)
from .subtask import slice_classifier
from .sweep import plot_sweep, sweep_frame
from .tracing import count_ops

try:
    __version__ = version("tp-importance")  # that of pyproject.toml, as it was installed
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0+unknown"

__all__ = [
    "ALLOCATORS",
    "Budget",
    "BudgetError",
    "BudgetPruner",
    "CATROImportance",
    "CATROPruner",
    "ChannelGroup",
    "Compensation",
    "CompensationReport",
    "Cost",
    "CostModel",
    "Curve",
    "Distiller",
    "Excluded",
    "ITPruner",
    "ITPrunerImportance",
    "LagrangeAllocator",
    "Latency",
    "LatencyModel",
    "LatencyTable",
    "LayerPlan",
    "LayerReport",
    "NotCollectedError",
    "OBSImportance",
    "OBSPruner",
    "Observed",
    "OneShot",
    "PSAPHistory",
    "PSAPImportance",
    "PSAPPruner",
    "PSAPSchedule",
    "Plan",
    "ProgramAllocator",
    "PrunableGroups",
    "PruningReport",
    "ResConv2d",
    "ResConvImportance",
    "ResConvPruner",
    "StaleStatisticsError",
    "StatisticalImportance",
    "TracingError",
    "Watch",
    "WidthSpace",
    "__version__",
    "channel_pruners",
    "compensate",
    "compensated_step",
    "convert_to_resconv",
    "count_ops",
    "curve_from_scores",
    "distillation_loss",
    "fuse",
    "greedy",
    "greedy_path",
    "lagrange",
    "load_pruned",
    "measure_latency",
    "observe",
    "plot_sweep",
    "prunable_groups",
    "prune",
    "recalibrate_batchnorm",
    "remove_layers",
    "save_pruned",
    "slice_classifier",
    "sweep_frame",
    "uniform",
    "value_curves",
]
