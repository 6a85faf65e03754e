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
from torch.utils._pytree import tree_map

from tp_importance import Budget, BudgetPruner, ChannelGroup, Plan, StatisticalImportance
from tp_importance.allocation.greedy import require_reachable
from tp_importance.core.batches import split_batch
from tp_importance.core.devices import reference_tensor, to_model
from tp_importance.core.loaders import iterate
from tp_importance.core.processes import warned_once
from tp_importance.graph.cost import LATENCY
from tp_importance.graph.groups import PrunableGroups, Verifier
from tp_importance.graph.host_groups import build_groups
from tp_importance.graph.reparametrised import computed_tensors
from tp_importance.graph.verify import verify_groups

from ._compat import import_nni
from .config import Config, Masks, SharedWrappers, checked_configs, require_unwrapped

_basic = import_nni("nni.compression.pruning.basic_pruner")

__all__ = ["ImportancePruner"]

_PLACEHOLDER = 0.5
"""``sparse_ratio`` of layers that are only selected, for a budget: NNI's schedules need something to scale."""


class ImportancePruner(SharedWrappers, _basic._NormPruner):  # type: ignore[name-defined]
    """Mask the least important channels of every coupled group, by ratio or to a budget.

    The masks cover the producing layers and, aligned to them, batch norms and depthwise convolutions, so that the
    masked model computes what the sped-up one will. All members of a coupled group get the same channels.
    Conforms to NNI's ``Pruner``: ``compress()`` needs no argument and leaves the model wrapped, works fused
    (``from_compressor``) and inside ``LinearPruner`` and ``AGPPruner``, which then also schedule the budget.

    Args:
        model: the network.
        config_list: which layers, and ``sparse_ratio``; with ``budget`` it only selects layers and may leave the ratio
            out. Other options of NNI's that ask for more than whole filters are refused.
        evaluator: NNI evaluator, for fusion and schedules.
        existed_wrappers: NNI's own; used by ``from_compressor``.
        loader: re-iterable of batches for the statistics.
        importance: what values the channels.
        budget: what the pruned network may cost; a latency is predicted for ``example_inputs`` as they are, and
            ``plan.latency_ms`` says what. Time the network after speedup yourself.
        example_inputs: default: the first samples of the loader.
        **options: ``round_to``, ``allocator``, ``label_fn``, ``progress``, ... of :class:`tp_importance.BudgetPruner`.

    Attributes:
        left_out: groups that were selected and cannot be pruned, with the reason.
        plan: what the last masks remove.

    Raises:
        BudgetError: if the budget cannot be reached.
        RuntimeError: if the model is still wrapped by another compressor.
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
        verify: bool | Verifier = True,
        **options: Any,
    ) -> None:
        require_unwrapped(model)
        config_list, ratios, ceilings = _selected(model, config_list, budget)
        skipped = [m for n, m in model.named_modules() if _has_channels(m) and n not in ratios]
        if example_inputs is None:
            example_inputs = _first_samples(model, loader, whole=options.get("forward_fn") is not None)
        self._budget = budget
        self._planner = BudgetPruner(
            model,
            example_inputs,
            loader,
            importance=importance,
            budget=budget or Budget(macs=1.0),
            ignored_layers=skipped,
            verify=_maskable(verify),
            **options,
        )
        groups = self._planner.groups
        self.left_out = _left_out(self._planner, ratios, options.get("num_heads"))
        if not len(groups):
            raise ValueError(
                f"config_list selects no coupled group that can be pruned; left out: {self.left_out or 'all outputs'}. "
                "Select every layer that shares channels with those you want to prune"
            )
        if self.left_out:
            warnings.warn(f"left alone, though selected: {self.left_out}", stacklevel=3)
        self._goal = {g.name: _common(g, ratios, "sparse_ratio") for g in groups}
        most = options.get("max_pruning_ratio", 1.0)
        mosts = most if isinstance(most, Mapping) else dict.fromkeys(groups.names, most)
        self._ceiling = {
            g.name: min([mosts.get(g.name, 1.0), *(ceilings.get(m.name, 1.0) for m in g.producers)]) for g in groups
        }
        self._planner.limit_ratios(self._ceiling)
        self._space = self._planner.space
        if budget is not None:
            self._require_reachable(budget)
        self.plan: Plan | None = None
        self._check_options()
        _require_free(groups, existed_wrappers or {})
        try:
            super().__init__(model, [*config_list, *_aligned(model, groups, ratios)], evaluator, existed_wrappers)
        except BaseException as error:
            self._release()
            if isinstance(error, (AssertionError, KeyError)):  # NNI meets a module type or target it does not know
                raise ValueError(f"NNI refuses the model, config_list or evaluator: {error!r}") from error
            raise
        self.interval_steps = 1  # fused without a schedule: prune after the first step (NNI's -1 means never)

    @warned_once()
    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """Mask the model; returns it, still wrapped, and the masks for :func:`nni_plugins.speedup`."""
        result = super().compress(max_steps, max_epochs)
        if self.plan is not None and self.plan.is_noop and any(self._goal.values()):
            cause = (
                f"a sparse_ratio of {max(self._goal.values())} removes no whole channel, or round_to and "
                "max_sparse_ratio leave no room for it"
                if self._budget is None
                else f"the network already meets the budget ({self.plan.cost})"
            )
            warnings.warn(f"nothing is masked: {cause}", stacklevel=2)
        return result

    def _collect_data(self) -> dict[str, Any]:
        # wrappers leave the masked tensors of the last pass on the modules; those of this pass must not stay
        modules = [wrapper.module for wrapper in self._module_wrappers.values()]
        before = [(module, dict(module._buffers)) for module in modules]
        try:
            self._planner.collect()
        finally:
            for module, buffers in before:
                module._buffers.update(buffers)
        return self._planner.curves()

    def _calculate_metrics(self, data: dict[str, Any]) -> Masks:
        """Position in the order of removal per filter, shape (C, 1, ...): smaller goes first."""
        metrics: Masks = {}
        for group in self._planner.groups:
            rank = np.empty(group.n_units)
            rank[data[group.name].order] = np.arange(group.n_units)
            for m in group.producers:
                mine = metrics.setdefault(m.name, {})  # a split layer is part of several groups
                mine["weight"] = mine.get("weight", 0.0) + self._spread(m, rank[m.units], 0.0)
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
            self.plan = self._planner.plan(self._budget_at(progress))
            return self.plan.removed
        removed = {}
        for g, levels in zip(self._planner.groups, self._space.levels, strict=True):
            left = g.n_units - int(g.n_units * progress * self._goal[g.name])
            removed[g.name] = curves[g.name].removed(
                int(levels[min(int(np.searchsorted(levels, left)), len(levels) - 1)])
            )
        self.plan = self._planner.plan_of(removed)
        return removed

    def _budget_at(self, progress: float) -> Budget:
        """The budget of a schedule: on its way from the dense cost to the limits."""
        assert self._budget is not None
        planner = self._planner
        limits, full = planner.limits(self._budget), planner.cost_model.full
        dense = planner.cost_model.spent(full, limits)
        now = {}
        for name, limit in limits.items():
            taken = progress * max(dense[name] - limit, 0)
            whole = taken if name == LATENCY else int(taken)
            now[name] = max(dense[name] - whole, min(limit, dense[name]))
        return Budget(**now)

    def _check_options(self) -> None:
        """For subclasses: raise before the model is wrapped, which NNI undoes with new parameters."""

    def _release(self) -> None:
        """Unwrap what a failed constructor has wrapped."""
        for wrapper in getattr(self, "_module_wrappers", {}).values():
            wrapped = getattr(wrapper.module, "_nni_wrapper", None) is wrapper
            if wrapped:
                wrapper.unwrap()

    def _require_reachable(self, budget: Budget) -> None:
        """Refuse a budget now rather than at the end of a schedule."""
        limits = self._planner.limits(budget)  # measures a latency, which wrapped layers would not have
        require_reachable(
            self._planner.cost_model,
            self._space,
            limits,
            {
                "max_pruning_ratio": "raise max_sparse_ratio",
                "ignored": "select more layers",
                "reason": "config_list does not select it",
            },
        )

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


def _has_channels(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def _selected(
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
        layers = [name for name, module in modules.items() if _has_channels(module)]
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


def _left_out(planner: BudgetPruner, ratios: Mapping[str, float], num_heads: Any) -> dict[str, str]:
    """Groups with a selected layer that are not pruned; that outputs of the network stay goes without saying."""
    groups = planner.groups
    if not groups.excluded:
        return {}
    unignored = build_groups(groups.trace, None, num_heads, groups.options)
    members = {g.name: g.members for g in unignored}
    hard = {e.name: e.reason for e in unignored.excluded}
    modules = dict(groups.trace.model.named_modules())
    left_out = {}
    for e in groups.excluded:
        out = [m.name for m in members.get(e.name, ()) if m.role == "out" and _has_channels(modules.get(m.name))]
        layers = out or [e.name.split("/")[0]]
        unselected = [name for name in layers if name not in ratios]
        reason = hard.get(e.name, e.reason)
        if reason == "produces the network's output" or len(unselected) == len(layers):
            continue
        if unselected:
            reason = f"shares its channels with {', '.join(unselected)}, which config_list does not select"
        left_out[e.name] = reason
    return left_out


def _maskable(verify: bool | Verifier) -> Verifier:
    """``verify`` for groups all of whose layers have plain parameters: NNI masks nothing else and cuts nothing else."""

    def check(groups: PrunableGroups, example_inputs: Any) -> Mapping[str, str]:
        model = groups.trace.model
        layers = {n: found[0] for n, m in model.named_modules() if (found := computed_tensors(m))}
        fixed = {g.name: layers[m.name].reason(m.name) for g in groups for m in g.members if m.name in layers}
        rest = groups.exclude(fixed)
        judge = verify if callable(verify) else verify_groups
        return {**(judge(rest, example_inputs) if verify and len(rest) else {}), **fixed}

    return check


def _require_free(groups: Iterable[ChannelGroup], wrappers: Mapping[str, Any]) -> None:
    """NNI keeps the first pruner's settings of a shared wrapper, so that the second one would do nothing."""
    members = dict.fromkeys(m.name for g in groups for m in g.members if m.role == "out")
    taken = [name for name in members if name in wrappers and wrappers[name].pruning_target_spaces]
    if taken:
        raise ValueError(f"{', '.join(taken)} already have masks of the other compressor; prune them with one pruner")


def _common(group: ChannelGroup, ratios: Mapping[str, float], what: str) -> float:
    found = {m.name: ratios[m.name] for m in group.members if m.role == "out" and m.name in ratios}
    if len(set(found.values())) > 1:
        raise ValueError(f"{what} differs inside one coupled group: {found}; these layers share their channels")
    return next(iter(found.values()))


def _aligned(model: nn.Module, groups: Iterable[ChannelGroup], ratios: Mapping[str, float]) -> Config:
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


def _first_samples(model: nn.Module, loader: Iterable[Any], *, whole: bool = False, count: int = 2) -> Any:
    """Example inputs from the first batch: its first samples, on the device of the model, or all as it is."""
    batch = next(iterate(loader), None)
    if batch is None:
        raise ValueError("the loader gave no batch, so there are no example inputs; pass example_inputs=")
    if whole:
        return batch
    args, kwargs, _ = split_batch(batch)
    inputs = tree_map(lambda x: x[:count] if isinstance(x, Tensor) and x.dim() else x, kwargs or args)
    return to_model(reference_tensor(model), inputs)
