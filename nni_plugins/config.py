"""Read NNI's config_list: which layers it selects, and what it asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tp_importance import Budget
from tp_importance.methods.resconv import ResConv2d, resconv_layers

from ._compat import import_nni

_config = import_nni("nni.compression.base.config")

__all__ = ["Config", "Masks", "checked_configs", "chosen_convolutions", "require_chosen"]

Config = list[dict[str, Any]]
Masks = dict[str, dict[str, Tensor]]

_REFUSED = {
    "sparse_threshold": "give sparse_ratio or budget=",
    "global_group_id": "a ranking over layers is what budget= does: pass Budget(macs=...) or Budget(params=...)",
    "group_id": "total_sparsity is what budget= does: pass Budget(macs=...) or Budget(params=...)",
    "min_sparse_ratio": "leave it out; max_sparse_ratio is honoured",
}


def checked_configs(
    model: Any, config_list: Config, budget: Budget | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, nn.Module]]]:
    """Every config in NNI's present format, what it says about weights, and the modules it selects.

    Args:
        model: the network, or anything with its ``named_modules``.
        config_list: as the user gave it; left alone.
        budget: with one, ``sparse_ratio`` may be absent.

    Raises:
        ValueError: for what NNI refuses, names that do not exist, and options that no pruner of this package obeys.
    """
    if not isinstance(config_list, (list, tuple)) or not all(isinstance(c, Mapping) for c in config_list):
        raise ValueError("config_list must be a list of dicts, e.g. [{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}]")
    configs = [dict(config) for config in _config.trans_legacy_config_list(list(config_list))]
    names = dict(model.named_modules(remove_duplicate=False))
    first_name = {module: name for name, module in reversed(names.items())}
    aliases = [name for name, module in names.items() if first_name[module] != name]  # NNI would wrap them twice
    for config in configs:
        setting = _checked_setting(config, budget)
        unknown = sorted(set(config.get("op_names", ())).difference(names))
        if unknown:
            raise ValueError(f"op_names names {unknown}, which {type(model).__name__} does not have")
        if "op_names" in config:
            config["op_names"] = [first_name[names[name]] for name in config["op_names"]]
        if aliases:
            config["exclude_op_names"] = [*config.get("exclude_op_names", ()), *aliases]
        yield config, setting, _config.select_modules_by_config(model, config)[0]


def _checked_setting(config: dict[str, Any], budget: Budget | None) -> dict[str, Any]:
    """What a config says about weights; refuses what NNI refuses and what our pruners do not do."""
    targets = config.get("target_settings")
    weight = targets.get("weight") if isinstance(targets, Mapping) else None
    setting = {**config, **weight} if isinstance(weight, Mapping) else dict(config)
    for key, remedy in _REFUSED.items():
        if setting.get(key) is not None:
            raise ValueError(f"{key}={setting[key]!r} in config_list is not supported: {remedy}")
    granularity = setting.get("granularity", "default")
    if granularity not in ("default", "out_channel"):
        raise ValueError(f"granularity={granularity!r} is not supported: whole filters are pruned, 'out_channel'")
    ratio = setting.get("sparse_ratio")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, float) or not 0.0 <= ratio < 1.0):
        raise ValueError(f"sparse_ratio={ratio!r} must be a float in [0, 1), e.g. 0.5: a layer cannot go entirely")
    if ratio == 0.0 and budget is not None:
        raise ValueError(
            "sparse_ratio=0.0 together with a budget is ambiguous: leave sparse_ratio out to let the budget decide, or "
            "exclude the layers to keep them"
        )
    try:
        _config.default_config_schema("pruning").validate(config)
    except Exception as error:  # SchemaError and the like say little and derive from Exception
        raise ValueError(f"NNI refuses the config_list: {error}") from error
    return setting


class _Unconverted:
    """The modules of a network as they were before its conversion, for NNI's selection."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_modules(self, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        layers = set(resconv_layers(self.model))
        for name, module in self.model.named_modules(**options):
            if isinstance(module, ResConv2d):
                yield name, module.conv
            elif name.rpartition(".")[0] not in layers:
                yield name, module


def chosen_convolutions(model: nn.Module, config_list: Config, budget: Any) -> tuple[set[str], set[str]]:
    """Names of the convolutions that config_list selects, and of those among them it calls by their names.

    Names and types are those before a conversion.

    Raises:
        ValueError: as :func:`checked_configs`, for options that ask for a part of a layer, or if nothing is selected.
    """
    chosen: set[str] = set()
    named: set[str] = set()
    for config, setting, modules in checked_configs(_Unconverted(model), config_list, budget):
        if setting.get("max_sparse_ratio") is not None:
            raise ValueError("max_sparse_ratio in config_list is not supported: a layer goes entirely or stays")
        if not {"weight", "bias"}.issuperset(config.get("target_names") or ()):
            raise ValueError(f"target_names={config['target_names']!r} is not supported: leave it out, layers go whole")
        found = {name for name, module in modules.items() if isinstance(module, nn.Conv2d)}
        chosen |= found
        named |= found.intersection(config.get("op_names", ()))
    if not chosen:
        raise ValueError("config_list selects no nn.Conv2d, so there is no layer to remove")
    return chosen, named


def require_chosen(layers: list[str], chosen: set[str]) -> None:
    """Refuse a network that was converted at more places than config_list selects."""
    rest = [name for name in layers if name not in chosen]
    if rest:
        raise ValueError(
            f"layer {rest[0]} is a ResConv2d already and config_list does not select it; select it, or keep it out of "
            "the conversion: convert_to_resconv(..., ignored_layers=[...])"
        )
