"""Remove masked channels from a trial copy by ``ModelSpeedup`` of NNI 3.0."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import import_nni
from .tracer import legacy_tracer_shim
from .trial import tensors_of

__all__ = ["shrink"]


class _Tracer(torch.fx.Tracer):
    """Symbolic tracing in which arguments without tensors keep their value."""

    def __init__(self, inputs: inspect.BoundArguments) -> None:
        super().__init__()
        self.inputs = inputs

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        bound = copy.copy(self.inputs)
        bound.arguments = {
            name: self.create_proxy("placeholder", name, (), {}) if tensors_of(value) else value
            for name, value in self.inputs.arguments.items()
        }
        return lambda root: root_fn(root, *bound.args, **bound.kwargs), [self.root]


def shrink(trial: nn.Module, inputs: inspect.BoundArguments, masks: Any, compat_shim: bool) -> dict[str, Tensor]:
    """Run ``ModelSpeedup`` on the trial.

    Args:
        trial: the masked copy.
        inputs: of :func:`.trial.bound_inputs`.
        masks: of :func:`.masks.checked_masks`.
        compat_shim: as for :func:`nni_plugins.speedup`.

    Returns:
        The output channels that NNI has found alive, bool, shape (C,), per module that it has replaced.

    Raises:
        RuntimeError: if it fails; names the layer.
    """
    engine = import_nni("nni.compression.speedup").ModelSpeedup
    modules = dict(trial.named_modules())
    silent = logging.Logger("nni", logging.CRITICAL + 1)
    masks = copy.deepcopy(masks)  # NNI edits them
    with legacy_tracer_shim() if compat_shim else contextlib.nullcontext():
        try:
            if compat_shim:
                dummy, graph_module = inputs.args, None
            else:
                dummy = tuple(value for value in inputs.arguments.values() if tensors_of(value))
                graph_module = torch.fx.GraphModule(trial, _Tracer(inputs).trace(trial))
            run = engine(trial, copy.deepcopy(dummy), masks, graph_module=graph_module, logger=silent)
            called = {node.target for node in run.graph_module.graph.nodes if node.op == "call_module"}
        except Exception as error:
            raise RuntimeError(
                f"cannot trace {type(trial).__name__}: {type(error).__name__}: {error}"
                + ("" if compat_shim else ". If its control flow depends on tensors, try compat_shim=True")
            ) from error
    unused = sorted(masks.keys() - called)
    if unused:
        raise RuntimeError(
            f"the forward pass does not call {unused} on the example inputs, so their masks cannot be removed; name "
            "the layers by their first name in model.named_modules(), and leave out unused ones"
        )
    # NNI's own test, "more values than samples", loses layers with a single output
    run.tensor_propagate_check = lambda t: t.numel() >= run.batch_size and t.numel() % run.batch_size == 0
    for info in run.node_infos.values():
        info._output_randomize = None  # the name under which NNI forgets values read last by .size() or .dim()
    try:
        run.speedup_model()
    except Exception as error:
        raise RuntimeError(
            f"NNI's ModelSpeedup failed at {_layer_at_fault(error)}: {type(error).__name__}: {error}"
        ) from error
    trial.eval()  # NNI's new modules are in train mode
    replaced = [name for name, module in modules.items() if trial.get_submodule(name) is not module]
    return {name: _alive(run, name, modules[name]) for name in replaced}


def _alive(run: Any, name: str, module: nn.Module) -> Tensor:
    """The output channels that are no constants, in any call of the module."""
    outputs = [i.output_masks for node, i in run.node_infos.items() if node.op == "call_module" and node.target == name]
    dim = -1 if isinstance(module, nn.Linear) else 1
    alive = [mask.transpose(0, dim).flatten(1).any(1) for mask in outputs if isinstance(mask, Tensor)]
    return torch.stack(alive).any(0) if alive else torch.ones(0, dtype=torch.bool, device="cpu")


def _layer_at_fault(error: Exception) -> str:
    """The graph node that NNI was working on: its errors name none."""
    layer, traceback = "an unknown layer", error.__traceback__
    while traceback is not None:
        node = traceback.tb_frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node):
            layer = f"{node.op} {node.target!r}"
        traceback = traceback.tb_next
    return layer
