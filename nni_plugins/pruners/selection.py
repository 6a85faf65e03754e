"""From NNI's config_list to coupled groups: which layers, how much of them, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tp_importance import Budget
from tp_importance.core.batches import split_batch
from tp_importance.core.devices import reference_tensor, to_model
from tp_importance.core.loaders import iterate
from tp_importance.graph.classes import build_groups
from tp_importance.graph.groups import ChannelGroup, PrunableGroups, Verifier
from tp_importance.graph.reparametrised import computed_tensors
from tp_importance.graph.verify import verify_groups

from ..config import Config, checked_configs

__all__ = [
    "aligned_norms",
    "common_ratio",
    "first_samples",
    "has_channels",
    "left_out",
    "maskable",
    "require_unmasked",
    "selected_layers",
]

_PLACEHOLDER = 0.5
"""``sparse_ratio`` of layers that are only selected, for a budget: NNI's schedules need something to scale."""


def has_channels(module: nn.Module | None) -> bool:
    """Whether a module makes channels of its own."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def selected_layers(
    model: nn.Module, config_list: Config, budget: Budget | None
) -> tuple[Config, dict[str, float], dict[str, float]]:
    """The checked config_list in NNI's present format, and ``sparse_ratio`` and ``max_sparse_ratio`` per layer.

    Layers are the selected convolutions and linear layers; the first config that names one wins.
    """
    configs: Config = []
    biases: Config = []
    ratios: dict[str, float] = {}
    ceilings: dict[str, float] = {}
    for config, setting, modules in checked_configs(model, config_list, budget):
        configs.append(config)
        layers = [name for name, module in modules.items() if has_channels(module)]
        if setting.get("sparse_ratio") is None:
            if budget is None or not layers:
                continue
            config["sparse_ratio"] = setting["sparse_ratio"] = _PLACEHOLDER
        if not modules:
            raise ValueError(f"config {config!r} selects no module of {type(model).__name__}")
        targets = config.get("target_names") or ["weight", "bias"]
        if layers and ("weight" not in targets or not {"weight", "bias"}.issuperset(targets)):
            raise ValueError(f"target_names={targets!r} is not supported: give ['weight', 'bias'], or leave it out")
        if layers and "bias" not in targets:
            biases.append({"op_names": layers, "target_names": ["bias"]})  # goes with its filter all the same
        for name in layers:
            if name not in ratios:
                ratios[name] = setting["sparse_ratio"]
                ceilings[name] = float(setting.get("max_sparse_ratio") or 1.0)
    if not ratios:
        raise ValueError(
            "config_list gives no convolution or linear layer a sparse_ratio, so there is nothing to prune"
        )
    return [*configs, *biases], ratios, ceilings


def left_out(groups: PrunableGroups, ratios: Mapping[str, float], num_heads: Any) -> dict[str, str]:
    """Groups with a selected layer that are not pruned; that outputs of the network stay goes without saying."""
    if not groups.excluded:
        return {}
    unignored = build_groups(groups.trace, None, num_heads, groups.options)
    members = {g.name: g.members for g in unignored}
    hard = {e.name: e for e in unignored.excluded}
    modules = dict(groups.trace.model.named_modules())
    found = {}
    for e in groups.excluded:
        out = [m.name for m in members.get(e.name, ()) if m.role == "out" and has_channels(modules.get(m.name))]
        layers = out or list(e.layers[:1])
        unselected = [name for name in layers if name not in ratios]
        why = hard.get(e.name, e)
        reason = why.reason
        if why.kind == "output" or len(unselected) == len(layers):
            continue
        if unselected:
            reason = f"shares its channels with {', '.join(unselected)}, which config_list does not select"
        found[e.name] = reason
    return found


def maskable(verify: bool | Verifier) -> Verifier:
    """``verify`` for groups whose channels plain parameters make and hand on: NNI masks nothing else."""

    def check(groups: PrunableGroups, example_inputs: Any) -> Mapping[str, str]:
        model = groups.trace.model
        layers = {n: found[0] for n, m in model.named_modules() if (found := computed_tensors(m))}
        fixed = {
            g.name: layers[m.name].reason(m.name)
            for g in groups
            for m in g.members
            if m.role == "out" and m.name in layers
        }
        rest = groups.exclude(fixed)
        judge = verify if callable(verify) else verify_groups
        return {**(judge(rest, example_inputs) if verify and len(rest) else {}), **fixed}

    return check


def require_unmasked(groups: Iterable[ChannelGroup], wrappers: Mapping[str, Any]) -> None:
    """NNI keeps the first pruner's settings of a shared wrapper, so that the second one would do nothing."""
    members = dict.fromkeys(m.name for g in groups for m in g.members if m.role == "out")
    taken = [name for name in members if name in wrappers and wrappers[name].pruning_target_spaces]
    if taken:
        raise ValueError(f"{', '.join(taken)} already have masks of the other compressor; prune them with one pruner")


def common_ratio(group: ChannelGroup, ratios: Mapping[str, float], what: str) -> float:
    """The one value that all selected members of a group have."""
    found = {m.name: ratios[m.name] for m in group.members if m.role == "out" and m.name in ratios}
    if len(set(found.values())) > 1:
        raise ValueError(f"{what} differs inside one coupled group: {found}; these layers share their channels")
    return next(iter(found.values()))


def aligned_norms(model: nn.Module, groups: Iterable[ChannelGroup], ratios: Mapping[str, float]) -> Config:
    """Config entries that put batch norms behind a group under its masks (masked means behind the batch norm)."""
    entries: Config = []
    seen: set[str] = set()
    for group in groups:
        first = group.producers[0].name
        for m in group.members:
            module = model.get_submodule(m.name) if m.name in dict(model.named_modules()) else None
            if m.kind != "passthrough" or not isinstance(module, nn.modules.batchnorm._BatchNorm) or m.name in seen:
                continue
            if module.affine and type(module).__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
                seen.add(m.name)
                align = {"module_name": first, "target_name": "weight", "dims": [0]}
                entries.append(
                    {
                        "op_names": [m.name],
                        "target_names": ["weight", "bias"],
                        "target_settings": {"weight": {"align": align}},
                    }
                )
    return entries


def first_samples(model: nn.Module, loader: Iterable[Any], *, whole: bool = False, count: int = 2) -> Any:
    """Example inputs from the first batch: its first samples, on the device of the model, or all as it is."""
    batch = next(iterate(loader), None)
    if batch is None:
        raise ValueError("the loader gave no batch, so there are no example inputs; pass example_inputs=")
    if whole:
        return batch
    args, kwargs, _ = split_batch(batch)
    inputs = tree_map(lambda x: x[:count] if isinstance(x, Tensor) and x.dim() else x, kwargs or args)
    return to_model(reference_tensor(model), inputs)
