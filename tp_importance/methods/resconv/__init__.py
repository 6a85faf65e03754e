"""ResConv: layers that can be removed, through a residual connection around each that fuses (arXiv 2011.14356).

The way is conversion (:mod:`.block`) → training, yours → losses (:mod:`.losses`) and exact costs (:mod:`.costs`) → the
cheapest set of layers → removal (:mod:`.removal`) and folding (:mod:`.folding`) → fusing → report.
"""

from .block import ConversionReport, ResConv2d, Scale, convert_to_resconv, fuse, resconv_layers
from .importance import ResConvImportance
from .losses import LayerImportance, output_losses, removal_controls, scale_losses
from .pruner import LayerPlan, ResConvPruner
from .removal import RemovalReport, remove_layers
from .report import LayerReport, LayerRow

__all__ = [
    "ConversionReport",
    "LayerImportance",
    "LayerPlan",
    "LayerReport",
    "LayerRow",
    "RemovalReport",
    "ResConv2d",
    "ResConvImportance",
    "ResConvPruner",
    "Scale",
    "convert_to_resconv",
    "fuse",
    "output_losses",
    "removal_controls",
    "remove_layers",
    "resconv_layers",
    "scale_losses",
]
