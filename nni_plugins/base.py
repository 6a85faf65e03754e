"""An NNI pruner around any data-driven importance of ``tp_importance``: thin, masks in, masks out.

Groups, statistics, curves and allocation are those of :class:`tp_importance.BudgetPruner`; this class only reads the
config_list, puts masks on NNI's wrappers and obeys its schedules.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tp_importance import Budget, BudgetPruner, ChannelGroup, Plan, StatisticalImportance
from tp_importance.batches import iterate, reference_tensor, split_batch, to_model

from ._compat import import_nni

_basic = import_nni("nni.compression.pruning.basic_pruner")
_config = import_nni("nni.compression.base.config")

__all__ = ["ImportancePruner"]

Config = list[dict[str, Any]]
Masks = dict[str, dict[str, Tensor]]

_REFUSED = {
    "sparse_threshold": "give sparse_ratio or budget=",
    "global_group_id": "a ranking over layers is what budget= does: pass Budget(macs=...) or Budget(params=...)",
    "min_sparse_ratio": "leave it out; max_sparse_ratio is honoured",
}


class ImportancePruner(_basic._NormPruner):  # type: ignore[misc, name-defined]
    """Mask the least important channels of every coupled group, by ratio or to a budget.

    The masks cover the producing layers and, aligned to them, batch norms and depthwise convolutions, so that the
    masked model computes what the sped-up one will. All members of a coupled group get the same channels.
    Conforms to NNI's ``Pruner``: ``compress()`` needs no argument and leaves the model wrapped, works fused
    (``from_compressor``) and inside ``LinearPruner`` and ``AGPPruner``, which then also schedule the budget.

    Args:
        model: the network.
        config_list: which layers, and ``sparse_ratio``: with ``budget`` it only selects layers.
        evaluator: NNI evaluator, for fusion and schedules.
        existed_wrappers: NNI's own; used by ``from_compressor``.
        loader: re-iterable of batches for the statistics.
        importance: what values the channels.
        budget: what the pruned network may cost.
        example_inputs: default: the first samples of the loader.
        **options: ``round_to``, ``allocator``, ``label_fn``, ... of :class:`tp_importance.BudgetPruner`.

    Attributes:
        left_out: groups that were selected and cannot be pruned, with the reason.
        plan: what the last masks remove.

    Raises:
        ValueError: for a config_list NNI refuses or that asks for what this pruner does not do, different ratios
            inside one coupled group, or nothing that could be pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Config,
        evaluator: Any = None,
        existed_wrappers: dict[str, Any] | None = None,
        *,
        loader: Iterable[Any],
        importance: StatisticalImportance,
        budget: Budget | None = None,
        example_inputs: Any = None,
        **options: Any,
    ) -> None:
        ratios, ceilings = _selected(model, config_list)
        skipped = [m for n, m in model.named_modules() if _has_channels(m) and n not in ratios]
        if example_inputs is None:
            example_inputs = _first_samples(model, loader)
        self._budget = budget
        self._planner = BudgetPruner(
            model,
            example_inputs,
            loader,
            importance=importance,
            budget=budget or Budget(macs=1.0),
            ignored_layers=skipped,
            **options,
        )
        groups = self._planner.groups
        self.left_out = {
            e.name: e.reason for e in groups.excluded if "ignored_layers" not in e.reason and "output" not in e.reason
        }
        if not len(groups):
            raise ValueError(
                f"config_list selects no coupled group that can be pruned; left out: {self.left_out or 'all outputs'}. "
                "Select every layer that shares channels with those you want to prune"
            )
        if self.left_out:
            warnings.warn(f"left alone, though selected: {self.left_out}", stacklevel=3)
        self._goal = {g.name: _common(g, ratios, "sparse_ratio") for g in groups}
        self._ceiling = {g.name: min(ceilings.get(m.name, 1.0) for m in g.producers) for g in groups}
        self._planner.limit_ratios(self._ceiling)
        self.plan: Plan | None = None
        super().__init__(model, [*config_list, *_aligned(model, groups, ratios)], evaluator, existed_wrappers)

    @classmethod
    def from_compressor(
        cls, compressor: Any, new_config_list: Config, *args: Any, evaluator: Any = None, **kwargs: Any
    ) -> ImportancePruner:
        """Share the wrappers and the evaluator of another NNI compressor, so that both train together.

        Args:
            compressor: the other compressor.
            new_config_list: config_list of this pruner.
            args: as for the constructor.
            evaluator: used if the other has none.
            kwargs: ``loader``, ``budget``, ... as for the constructor.
        """
        base = super(_basic._NormPruner, cls)
        return base.from_compressor(compressor, new_config_list, *args, evaluator=evaluator, **kwargs)

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """Mask the model; returns it, still wrapped, and the masks for :func:`nni_plugins.speedup`."""
        return super().compress(max_steps, max_epochs)

    def _validate_config(self) -> None:
        try:
            super()._validate_config()
        except Exception as error:  # SchemaError and the like say little and derive from Exception
            raise ValueError(f"NNI refuses the config_list: {error}") from error

    def _collect_data(self) -> dict[str, Any]:
        self._planner.collect()
        return self._planner.curves()

    def _calculate_metrics(self, data: dict[str, Any]) -> Masks:
        """Position in the order of removal per filter, shape (C, 1, ...): smaller goes first."""
        metrics: Masks = {}
        for group in self._planner.groups:
            rank = np.empty(group.n_units)
            rank[data[group.name].order] = np.arange(group.n_units)
            for m in group.producers:
                metrics.setdefault(m.name, {})["weight"] = self._spread(m, rank[m.units], 0.0)
        return metrics

    def _generate_sparsity(self, metrics: Masks) -> Masks:
        removed = self._removed()
        masks: Masks = {}
        for group in self._planner.groups:
            gone = np.zeros(group.n_units, bool)
            gone[removed[group.name]] = True
            for m in group.members:
                if m.role != "out" or m.name not in self._target_spaces:
                    continue
                keep = self._spread(m, (~gone[m.units]).astype(np.float64), 1.0)
                mine = masks.setdefault(m.name, {})
                for target, space in self._target_spaces[m.name].items():
                    if space.target is not None:
                        new = keep if target == "weight" else keep.flatten()
                        mine[target] = mine[target] * new if target in mine else new
        return masks

    def _removed(self) -> dict[str, list[int]]:
        """Units to mask now: the goal scaled by how far a schedule has come."""
        curves = self._planner.curves()
        progress = self._progress()
        if self._budget is not None:
            dense = self._planner.dense.as_dict()
            limits = self._budget.limits(self._planner.dense)
            now = {f: max(dense[f] - int(progress * max(dense[f] - v, 0)), min(v, dense[f])) for f, v in limits.items()}
            self.plan = self._planner.plan(Budget(**now))
            return self.plan.removed
        removed = {}
        for g in self._planner.groups:
            count = min(int(g.n_units * progress * self._goal[g.name]), g.n_units - g.min_units)
            count = min(count, int(g.n_units * self._ceiling[g.name]))
            removed[g.name] = curves[g.name].removed(g.n_units - count)
        self.plan = self._planner.plan_of(removed)
        return removed

    def _progress(self) -> float:
        """Fraction of the goal NNI's scheduler has reached; 1 without a scheduler."""
        for group in self._planner.groups:
            for m in group.producers:
                goal, space = self._goal[group.name], self._target_spaces[m.name]["weight"]
                if goal > 0 and space.sparse_ratio is not None:
                    return min(space.sparse_ratio / goal, 1.0)
        return 1.0

    def _spread(self, member: Any, values: np.ndarray, rest: float) -> Tensor:
        """Values per channel in the shape of a weight, 1 in all other dimensions."""
        weight = self._target_spaces[member.name]["weight"].target
        full = torch.full((member.width,), rest, dtype=torch.float32, device=weight.device)
        full[torch.from_numpy(member.channels).to(weight.device)] = torch.from_numpy(values).to(full)
        transposed = getattr(self.bound_model.get_submodule(member.name), "transposed", False)
        dim = 1 if transposed and weight.shape[1] == member.width else 0
        return full.view([-1 if d == dim else 1 for d in range(weight.dim())])


def _has_channels(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def _selected(model: nn.Module, config_list: Config) -> tuple[dict[str, float], dict[str, float]]:
    """``sparse_ratio`` and ``max_sparse_ratio`` per selected conv or linear layer; the first config wins."""
    ratios: dict[str, float] = {}
    ceilings: dict[str, float] = {}
    if not isinstance(config_list, (list, tuple)) or not all(isinstance(c, Mapping) for c in config_list):
        raise ValueError("config_list must be a list of dicts, e.g. [{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}]")
    for config in _config.trans_legacy_config_list(list(config_list)):
        setting = {**config, **config.get("target_settings", {}).get("weight", {})}
        for key, remedy in _REFUSED.items():
            if setting.get(key) is not None:
                raise ValueError(f"{key}={setting[key]!r} in config_list is not supported: {remedy}")
        ratio = setting.get("sparse_ratio")
        if ratio is None:
            continue
        if isinstance(ratio, bool) or not isinstance(ratio, float) or not 0.0 <= ratio < 1.0:
            raise ValueError(f"sparse_ratio={ratio!r} must be a float in [0, 1), e.g. 0.5: a layer cannot go entirely")
        modules, _, _ = _config.select_modules_by_config(model, dict(config))
        if not modules:
            raise ValueError(f"config {config!r} selects no module of {type(model).__name__}")
        for name, module in modules.items():
            if _has_channels(module) and name not in ratios:
                ratios[name], ceilings[name] = ratio, float(setting.get("max_sparse_ratio") or 1.0)
    return ratios, ceilings


def _common(group: ChannelGroup, ratios: Mapping[str, float], what: str) -> float:
    found = {m.name: ratios[m.name] for m in group.members if m.role == "out" and m.name in ratios}
    if len(set(found.values())) > 1:
        raise ValueError(f"{what} differs inside one coupled group: {found}; these layers share their channels")
    return next(iter(found.values()))


def _aligned(model: nn.Module, groups: Iterable[ChannelGroup], ratios: Mapping[str, float]) -> Config:
    """Config entries that put batch norms behind a group under its masks (METHODS: masked is after BN)."""
    entries: Config = []
    seen: set[str] = set()
    for group in groups:
        first = group.producers[0].name
        for m in group.members:
            module = model.get_submodule(m.name) if m.name in dict(model.named_modules()) else None
            if m.kind != "carrier" or not isinstance(module, nn.modules.batchnorm._BatchNorm) or m.name in seen:
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


def _first_samples(model: nn.Module, loader: Iterable[Any], count: int = 2) -> Any:
    """Example inputs from the first batch: its first samples, on the device of the model."""
    batch = next(iterate(loader), None)
    if batch is None:
        raise ValueError("the loader gave no batch, so there are no example inputs; pass example_inputs=")
    args, kwargs, _ = split_batch(batch)
    few = {k: v[:count] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    inputs = few if kwargs else tuple(a[:count] if isinstance(a, Tensor) else a for a in args)
    return to_model(reference_tensor(model), inputs)
