"""ResConv: layers that can be removed, through a residual connection around each that fuses (arXiv 2011.14356).

The way is conversion (:mod:`.conversion`) → training, yours (:mod:`.training`) → losses (:mod:`.losses`) and exact
costs (:mod:`.costs`) → the cheapest set of layers (:mod:`.plan`) → removal (:mod:`.removal`) and folding
(:mod:`.folding`) → fusing → report.
"""

from ...pruning.domains import Choice
from ...pruning.registry import Job, register_method
from .block import ResConv2d, Scale, resconv_layers
from .conversion import ConversionReport, convert_to_resconv, fuse
from .importance import ResConvImportance
from .losses import LayerImportance, output_losses, removal_controls, scale_losses
from .plan import LayerPlan
from .pruner import ResConvPruner
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


def _prune_layers(job: Job) -> None:
    """Whole layers go, the rest is trained with its shortcuts and fused."""
    # it looks at no labels, and checks every removal by itself
    options = {key: value for key, value in job.pruner_options.items() if key not in ("label_fn", "verify")}
    pruner = ResConvPruner(
        job.model,
        job.example_inputs,
        job.loader,
        budget=job.whole_budget("resconv", modes=("batchnorm", "sequential")),
        **job.options,
        **options,
    )
    plan = pruner.plan()
    if plan.removed:
        # while tensors are on the scale of the dense network
        job.recovered = pruner.apply(plan, fuse=False, refit=job.repair, recover=job.recovery).recovery
    job.finish()
    if pruner.layers:
        fuse(job.model.eval())


register_method(
    "resconv", prune=_prune_layers, options={"importance": Choice(("output", "scale"))}, instead="ResConvPruner"
)
