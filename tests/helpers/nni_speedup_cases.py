"""Masks of networks and what they compute, for tests of speedup."""

import pytest
import torch
from torch import Tensor, nn

nni = pytest.importorskip("nni")

from nni.compression.utils import auto_set_denpendency_group_ids  # noqa: E402

from tp_importance.graph.groups import PrunableGroups  # noqa: E402

Masks = dict[str, dict[str, Tensor]]


def masks_of(model: nn.Module, removed: dict[str, list[int]]) -> Masks:
    """Masks of all parameters of the modules named, zero in the given rows."""
    masks: Masks = {}
    for name, rows in removed.items():
        for target, parameter in model.get_submodule(name).named_parameters():
            masks.setdefault(name, {})[target] = torch.ones_like(parameter)
            masks[name][target][rows] = 0.0
    return masks


def masks_of_units(groups: PrunableGroups, removed: dict[str, list[int]]) -> Masks:
    """Masks of everything that makes or hands on the channels of some units: weights and biases, row by row."""
    model, masks = groups.trace.model, Masks()
    for name, units in removed.items():
        for m in groups[name].members:
            module = dict(model.named_modules()).get(m.name)
            for target, tensor in module.named_parameters(recurse=False) if m.role == "out" and module else ():
                dim = 1 if target == "weight" and getattr(module, "transposed", False) else 0
                mask = masks.setdefault(m.name, {}).setdefault(target, torch.ones_like(tensor))
                mask.index_fill_(dim, torch.as_tensor(m.positions(units)), 0.0)
    return masks


def masked_output(model: nn.Module, masks: Masks, *inputs: Tensor) -> Tensor:
    """What the masked model computes; the model is left as it was."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, targets in masks.items():
        for target, mask in targets.items():
            weights[f"{name}.{target}"] *= mask
    with torch.no_grad():
        return torch.func.functional_call(model, weights, inputs)


def sources_of_batchnorm(model: nn.Module) -> dict[str, str]:
    """The convolution in front of each batch norm."""
    modules = dict(model.named_modules())
    return {
        node.target: node.args[0].target
        for node in torch.fx.symbolic_trace(model).graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d)
    }


def config_list(model: nn.Module, x: Tensor, ratio: float, align: bool = True) -> list[dict]:
    configs = [{"op_types": ["Conv2d"], "sparse_ratio": ratio}]
    configs = auto_set_denpendency_group_ids(model, configs, x)
    for bn, conv in sources_of_batchnorm(model).items():
        setting = {"align": {"module_name": conv, "target_name": "weight", "dims": [0]}}
        if align:
            configs.append({"op_names": [bn], "target_settings": {"weight": setting, "bias": setting}})
    return configs
