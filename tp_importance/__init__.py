"""Structured-pruning methods from the literature as plugins for Torch-Pruning, and what they share.

The way through the package is one-directional: loader → statistics (:mod:`.statistics.observe`) → value curves
(:mod:`.allocation.curves`) → widths under a budget (:mod:`.allocation.greedy`) → surgery by the host
(:mod:`.graph.surgery`) → report.
"""

from importlib.metadata import PackageNotFoundError, version

from .allocation.curves import Curve, curve_from_scores, value_curves
from .allocation.greedy import ALLOCATORS, WidthSpace, greedy, greedy_path, uniform
from .allocation.lagrange import LagrangeAllocator, lagrange
from .allocation.program import ProgramAllocator
from .budget import Budget, Cost
from .checkpoints.checkpoint import load_pruned, save_pruned
from .errors import BudgetError, NotCollectedError, StaleStatisticsError, TracingError
from .graph.cost import CostModel
from .graph.counting import count_ops
from .graph.discovery import prunable_groups
from .graph.groups import ChannelGroup, Excluded, PrunableGroups
from .graph.layer_pruners import channel_pruners
from .latency.measure import Latency, measure_latency
from .latency.model import LatencyModel
from .latency.table import LatencyTable
from .methods.catro.importance import CATROImportance, CATROPruner
from .methods.itpruner.importance import ITPruner, ITPrunerImportance
from .methods.obs.importance import OBSImportance, OBSPruner
from .methods.psap.history import PSAPHistory
from .methods.psap.importance import PSAPImportance
from .methods.psap.pruner import PSAPPruner
from .methods.psap.schedule import PSAPSchedule
from .methods.resconv import (
    LayerPlan,
    LayerReport,
    ResConv2d,
    ResConvImportance,
    ResConvPruner,
    convert_to_resconv,
    fuse,
    remove_layers,
)
from .one_shot import OneShot, prune
from .pruning.importance import StatisticalImportance
from .pruning.plan import Plan
from .pruning.pruner import BudgetPruner
from .pruning.report import PruningReport
from .pruning.sweep import plot_sweep, sweep_frame
from .recovery.distillation import Distiller, distillation_loss
from .recovery.subtask import slice_classifier
from .refitted_step import refitted_step
from .refitting.refit import refit_consumers
from .refitting.report import RefitReport
from .refitting.settings import Refit
from .statistics.batchnorm import recalibrate_batchnorm
from .statistics.observe import Observed, Watch, observe

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
    "Refit",
    "RefitReport",
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
    "refit_consumers",
    "refitted_step",
    "remove_layers",
    "save_pruned",
    "slice_classifier",
    "sweep_frame",
    "uniform",
    "value_curves",
]
