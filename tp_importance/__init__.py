"""Structured pruning of PyTorch networks to a budget, as plugins for Torch-Pruning.

The way is one-directional: loader → statistics → loss curves → widths under the budget → surgery → report; each has a
folder: :mod:`.statistics`, :mod:`.allocation`, :mod:`.graph`, :mod:`.pruning`. Methods are in :mod:`.methods`.

Here is what a user types. What an extension needs stays in its folder (docs/methods/adding-a-method.md).
"""

from importlib.metadata import PackageNotFoundError, version

from .attention.explicit import explicit_attention
from .budget import Budget
from .checkpoints.checkpoint import load_pruned, save_pruned
from .core.positions import PaddedForward
from .errors import BudgetError
from .export.onnx import export_onnx
from .graph.baking import bake_weights
from .graph.counting import count_ops
from .graph.discovery import prunable_groups
from .graph.layer_pruners import channel_pruners
from .host_pruners import label_groups
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
from .pruning.pruner import BudgetPruner
from .pruning.registry import register_method
from .recovery.distillation import Distiller
from .recovery.recover import recover
from .recovery.settings import Recovery
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
    "Distiller",
    "GradientImportance",
    "ITPruner",
    "ITPrunerImportance",
    "LatencyTable",
    "OBSImportance",
    "OBSPruner",
    "PSAPImportance",
    "PSAPPruner",
    "PSAPSchedule",
    "PaddedForward",
    "Recovery",
    "Refit",
    "ResConvImportance",
    "ResConvPruner",
    "StatisticalImportance",
    "__version__",
    "bake_weights",
    "channel_pruners",
    "convert_to_resconv",
    "count_ops",
    "explicit_attention",
    "export_onnx",
    "fuse",
    "label_groups",
    "load_pruned",
    "measure_latency",
    "prunable_groups",
    "prune",
    "recalibrate_batchnorm",
    "recover",
    "refitted_step",
    "register_method",
    "save_pruned",
    "slice_classifier",
]
