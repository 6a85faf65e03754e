"""Physically smaller networks from NNI's masks: a safe way to call ``ModelSpeedup`` of NNI 3.0.

NNI rewrites the model while it infers which channels are dead: it overwrites parameters with random numbers, draws
from the global generator, puts new modules in train mode, edits the masks, prints, and stops halfway on errors. All
of that happens to a copy here. Only when the copy runs and has the widths that the masks ask for are the smaller
tensors put into the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_importance.core.arguments import checked_model
from tp_importance.core.guards import transaction
from tp_importance.core.progress import phase
from tp_importance.core.stale_optimizers import replacing
from tp_importance.graph.reparametrised import computed_tensors
from tp_importance.methods.resconv import resconv_layers

from ..wrappers import wrapped_layer
from .channels import shrink
from .layers import remove_masked_layers
from .masks import Masks, apply_masks, as_masks, checked_masks
from .result import changes_of, check_widths, compare_outputs
from .trial import bound_inputs, isolated, run_trial, trial_copy

__all__ = ["speedup"]


def speedup(model: nn.Module, example_inputs: Any, masks: Masks, *, compat_shim: bool = False) -> nn.Module:
    """Remove the masked channels from the network, in place.

    A mask ``M`` of a parameter ``W`` keeps row ``c`` if any ``M[c, …] = 1``; with the masks of all coupled layers in
    agreement, the layer is left with ``|{c : M[c, …] ≠ 0}|`` of its channels, consumers lose the matching inputs, and
    batch norms and depthwise convolutions follow. The result computes what the masked model computed if the batch
    norm (and bias) of a removed channel is masked as well (``align`` in NNI's config_list); otherwise the masked
    model still has a constant ``β − γμ/σ`` there, and a warning says by how much the outputs differ (as an error, by
    ``warnings.simplefilter("error")``, it leaves the model unchanged).

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
        compat_shim: trace with NNI's concrete tracer under :func:`~nni_plugins.surgery.tracer.legacy_tracer_shim`, for
            networks whose control flow ``torch.fx`` cannot trace. The branches taken on ``example_inputs`` are
            assumed. NNI 3.0 only. Removing layers needs no such trace and takes no notice.

    Returns:
        ``model`` itself, smaller.

    Raises:
        NNIUnavailableError: NNI cannot be imported.
        TypeError: ``example_inputs`` do not fit the signature of the model's ``forward``, ``masks`` are not a dict of
            dicts of tensors, or the model is compiled or wrapped (``DistributedDataParallel``, ...).
        ValueError: the masks are empty or remove nothing, name an unknown module or parameter, have a wrong shape,
            are not made of zeros and ones, are not structured, remove a whole layer, or contradict each other.
        RuntimeError: the model still holds NNI wrappers, cannot be traced, or NNI fails or leaves other widths than
            the masks ask for.

    Example:
        >>> model, masks = pruner.compress()  # doctest: +SKIP
        >>> pruner.unwrap_model()  # doctest: +SKIP
        >>> speedup(model, torch.randn(2, 3, 32, 32), masks)  # doctest: +SKIP

    Source: ``nni/compression/speedup/model_speedup.py`` of NNI 3.0.
    """
    wrapped = wrapped_layer(checked_model(model))
    if wrapped is not None:
        raise RuntimeError(f"the model is still wrapped by NNI, at {wrapped!r}; call pruner.unwrap_model() first")
    if resconv_layers(model):
        with phase("removing layers"), replacing(model):
            return remove_masked_layers(model, example_inputs, as_masks(masks))
    full_masks = checked_masks(model, masks)
    with phase("removing channels"), torch.inference_mode(False), torch.enable_grad(), isolated(model):
        inputs = bound_inputs(model, example_inputs)
        trial = trial_copy(model)
        apply_masks(trial, full_masks)
        before = run_trial(trial, inputs)
        try:
            replaced = shrink(trial, inputs, full_masks, compat_shim)
        except RuntimeError as error:
            found = [c.reason(name) for name, module in model.named_modules() for c in computed_tensors(module)]
            if not found:
                raise
            raise RuntimeError(f"{error} NNI knows parameters only: {'; '.join(found)}") from error
        check_widths(trial, full_masks)
        compare_outputs(before, run_trial(trial, inputs))
        changes = changes_of(model, trial, replaced)
    step = transaction(model)
    with step, replacing(model):
        step.commit()
        for module, attributes, parameters, buffers in changes:
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
    return model
