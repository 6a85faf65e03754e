"""Physically smaller networks from NNI's masks: a safe way to call ``ModelSpeedup`` of NNI 3.0, and our own removal.

NNI rewrites the model while it infers which channels are dead: it overwrites parameters with random numbers, draws
from the global generator, puts new modules in train mode, edits the masks, prints, and stops halfway on errors. All
of that happens to a copy here. Only when the copy runs and has the widths that the masks ask for are the smaller
tensors put into the model.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import nn

from tp_importance.core.arguments import checked_model
from tp_importance.core.guards import transaction
from tp_importance.core.progress import phase
from tp_importance.core.stale_optimizers import replacing
from tp_importance.methods.resconv import resconv_layers

from ..wrappers import wrapped_layer
from .engines import ENGINES, Job, tried_removal
from .layers import remove_masked_layers
from .masks import Masks, as_masks, checked_masks
from .trial import bound_inputs, isolated

__all__ = ["speedup"]


def speedup(
    model: nn.Module,
    example_inputs: Any,
    masks: Masks,
    *,
    engine: Literal["auto", "nni", "groups"] = "auto",
    compat_shim: bool = False,
) -> nn.Module:
    """Remove the masked channels from the network, in place.

    A mask ``M`` of a parameter ``W`` keeps row ``c`` if any ``M[c, …] = 1``; with the masks of all coupled layers in
    agreement, the layer is left with ``|{c : M[c, …] ≠ 0}|`` of its channels, consumers lose the matching inputs, and
    batch norms and depthwise convolutions follow. The result computes what the masked model computed if the batch
    norm (and bias) of a removed channel is masked as well (``align`` in NNI's config_list); otherwise the masked
    model still has a constant ``β − γμ/σ`` there, and a warning says by how much the outputs differ (as an error, by
    ``warnings.simplefilter("error")``, it leaves the model unchanged).

    Two engines can do it, on copies first. ``"nni"`` is NNI's ``ModelSpeedup``: it follows constants through a
    symbolic trace and replaces modules. ``"groups"`` is our own: a unit of the coupled groups of the network
    (:func:`tp_importance.prunable_groups`) goes if all layers that make it mask its channels, or all that read it, and
    nothing but masked channels goes. It needs no symbolic trace, so it also serves where NNI fails: control flow on
    tensors, channels that are reshaped or permuted, raw and parametrised weights, transformer and ConvNeXt blocks. It
    demands that this removal is masking at the input of every layer, and that the masks of all layers that share
    channels agree; of a grouped convolution every group loses the same positions, while NNI lets each lose its own.
    ``"auto"``, the default, takes NNI's result if masked channels that are also zero behind unmasked batch norms and
    biases give the same outputs, and else our own. Which one it was is logged (logger ``tp_importance``, level
    ``INFO``).

    In a network of :class:`nni_plugins.ResConvPruner` whole layers go, which ``ModelSpeedup`` cannot do: every
    residual convolution whose mask of s is 0 is removed, its factor a folded into its neighbours, and the others are
    fused. Such a network does not lose channels at the same time: prune those of the plain one that is left.

    Modules stay the same objects with their hooks and train or eval mode. Parameters that shrink are new objects,
    ``requires_grad`` as before, without gradient: build the optimizer afterwards. Works on frozen models and under
    ``torch.no_grad()``. On any error the model is unchanged. Global random state, ``masks`` and ``example_inputs``
    are left alone.

    Args:
        model: the network that was pruned, after ``pruner.unwrap_model()``.
        example_inputs: tensor, tuple or list of positional arguments, or dict of keyword arguments; first dimension
            of every tensor is the batch. Arguments without tensors are fixed at their value.
        masks: ``{module name: {parameter name: mask or None}}`` as returned by ``compress()`` of an NNI pruner; a
            mask of zeros and ones has the parameter's shape or 1 in broadcast dimensions, e.g. ``C × 1 × 1 × 1``.
            For layers, ``{layer: {"s": mask of shape (1,)}}``.
        engine: ``"auto"``, ``"nni"`` or ``"groups"``, see above. Layers are removed by our own code in any case.
        compat_shim: for NNI's engine: trace with NNI's concrete tracer under
            :func:`~nni_plugins.surgery.tracer.legacy_tracer_shim`, for networks whose control flow ``torch.fx`` cannot
            trace. The branches taken on ``example_inputs`` are assumed. NNI 3.0 only.

    Returns:
        ``model`` itself, smaller.

    Raises:
        NNIUnavailableError: NNI cannot be imported, and ``engine="nni"``.
        TypeError: ``example_inputs`` do not fit the signature of the model's ``forward``, ``masks`` are not a dict of
            dicts of tensors, or the model is compiled or wrapped (``DistributedDataParallel``, ...).
        ValueError: the masks are empty or remove nothing, name an unknown module or parameter, have a wrong shape,
            are not made of zeros and ones, are not structured, remove a whole layer, or contradict each other; or
            ``engine`` is unknown.
        RuntimeError: the model still holds NNI wrappers, or the engine fails or leaves other widths than the masks ask
            for. With ``"auto"`` both engines have failed, or NNI's computes something else; the error says why each.

    Example:
        >>> model, masks = pruner.compress()  # doctest: +SKIP
        >>> pruner.unwrap_model()  # doctest: +SKIP
        >>> speedup(model, torch.randn(2, 3, 32, 32), masks)  # doctest: +SKIP

    Source: ``nni/compression/speedup/model_speedup.py`` of NNI 3.0.
    """
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"engine={engine!r} is unknown; choose 'auto', {', '.join(map(repr, ENGINES))}")
    if compat_shim and engine == "groups":
        raise ValueError("compat_shim repairs NNI's tracer, which engine='groups' does not use; leave one of them out")
    wrapped = wrapped_layer(checked_model(model))
    if wrapped is not None:
        raise RuntimeError(f"the model is still wrapped by NNI, at {wrapped!r}; call pruner.unwrap_model() first")
    if resconv_layers(model):
        with phase("removing layers"), replacing(model):
            return remove_masked_layers(model, example_inputs, as_masks(masks))
    full_masks = checked_masks(model, masks)
    with phase("removing channels") as running:
        with torch.inference_mode(False), torch.enable_grad(), isolated(model):
            job = Job(model, bound_inputs(model, example_inputs), full_masks, compat_shim)
            removal = tried_removal(job, engine)
        running.note(engine=removal.engine)
    if removal.difference is not None:
        warnings.warn(removal.difference, stacklevel=2)
    step = transaction(model)
    with step, replacing(model):
        step.commit()
        for change in removal.changes:
            change.make()
    return model
