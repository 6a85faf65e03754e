"""Structured pruning of PyTorch networks to a budget, as plugins for Torch-Pruning.

The way is one-directional: loader → statistics → loss curves → widths under the budget → surgery → report; each has a
folder: :mod:`.statistics`, :mod:`.allocation`, :mod:`.graph`, :mod:`.pruning`. Methods are in :mod:`.methods`.

Here is what a user types. What an extension needs stays in its folder (docs/extending.md).
"""

from importlib.metadata import PackageNotFoundError, version

from .budget import Budget, Cost
from .checkpoints.checkpoint import load_pruned, save_pruned
from .errors import BudgetError, NotCollectedError, StaleStatisticsError, TracingError
from .graph.counting import count_ops
from .graph.discovery import prunable_groups
from .graph.layer_pruners import channel_pruners
from .latency.measure import measure_latency
from .latency.table import LatencyTable
from .methods.catro import CATROImportance, CATROPruner
from .methods.itpruner import ITPruner, ITPrunerImportance
from .methods.obs import OBSImportance, OBSPruner
from .methods.psap import PSAPImportance, PSAPPruner, PSAPSchedule
from .methods.resconv import ResConvImportance, ResConvPruner, convert_to_resconv, fuse
from .one_shot import prune
from .pruning.gradient_importance import GradientImportance
from .pruning.importance import StatisticalImportance
from .pruning.plan import Plan
from .pruning.pruner import BudgetPruner
from .pruning.registry import register_method
from .pruning.report import PruningReport
from .pruning.sweep import plot_sweep, sweep_frame
from .recovery.distillation import Distiller
from .recovery.subtask import slice_classifier
from .refitted_step import refitted_step
from .refitting.settings import Refit
from .statistics.batchnorm import recalibrate_batchnorm

try:
    __version__ = version("tp-importance")  # that of pyproject.toml, as it was installed
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0+unknown"

__all__ = [
    "Budget",
    "BudgetError",
    "BudgetPruner",
    "CATROImportance",
    "CATROPruner",
    "Cost",
    "Distiller",
    "GradientImportance",
    "ITPruner",
    "ITPrunerImportance",
    "LatencyTable",
    "NotCollectedError",
    "OBSImportance",
    "OBSPruner",
    "PSAPImportance",
    "PSAPPruner",
    "PSAPSchedule",
    "Plan",
    "PruningReport",
    "Refit",
    "ResConvImportance",
    "ResConvPruner",
    "StaleStatisticsError",
    "StatisticalImportance",
    "TracingError",
    "__version__",
    "channel_pruners",
    "convert_to_resconv",
    "count_ops",
    "fuse",
    "load_pruned",
    "measure_latency",
    "plot_sweep",
    "prunable_groups",
    "prune",
    "recalibrate_batchnorm",
    "refitted_step",
    "register_method",
    "save_pruned",
    "slice_classifier",
    "sweep_frame",
]

# TEMPORARY until the tests import these from their folders
from .allocation.curves import Curve, curve_from_scores, value_curves  # noqa: E402
from .allocation.greedy import greedy, greedy_path  # noqa: E402
from .allocation.lagrange import LagrangeAllocator, lagrange  # noqa: E402
from .allocation.program import ProgramAllocator  # noqa: E402
from .allocation.proportional import uniform  # noqa: E402
from .allocation.registry import ALLOCATORS  # noqa: E402
from .allocation.space import WidthSpace  # noqa: E402
from .graph.cost import CostModel  # noqa: E402
from .graph.groups import ChannelGroup, Excluded, PrunableGroups  # noqa: E402
from .latency.measure import Latency  # noqa: E402
from .latency.model import LatencyModel  # noqa: E402
from .methods.psap import PSAPHistory  # noqa: E402
from .methods.resconv import LayerPlan, LayerReport, ResConv2d, remove_layers  # noqa: E402
from .one_shot import OneShot  # noqa: E402
from .recovery.distillation import distillation_loss  # noqa: E402
from .refitting.refit import refit_consumers  # noqa: E402
from .refitting.report import RefitReport  # noqa: E402
from .statistics.observe import Observed, Watch, observe  # noqa: E402
