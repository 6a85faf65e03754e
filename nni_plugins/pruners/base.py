"""Masks for coupled groups on NNI's wrappers: thin, masks in, masks out.

Groups, cost and limits are those of :class:`tp_importance.pruning.target.PruningTarget`; this class only reads the
config_list, puts masks on NNI's wrappers and obeys its schedules. What goes, a subclass says.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tp_importance import Budget
from tp_importance.allocation.limits import require_reachable
from tp_importance.core.loaders import check_loader
from tp_importance.core.options import hand_on, split_options
from tp_importance.core.processes import levels_up, warned_once
from tp_importance.graph.cost import LATENCY
from tp_importance.graph.groups import Verifier
from tp_importance.pruning.plan import Plan
from tp_importance.pruning.target import PruningTarget

from .._compat import import_nni
from ..config import Config, Masks
from ..surgery.masked_norms import MaskedNorms
from ..wrappers import SharedWrappers, require_unwrapped
from .selection import (
    aligned_norms,
    common_ratio,
    first_samples,
    has_channels,
    left_out,
    maskable,
    require_unmasked,
    selected_layers,
)

_basic = import_nni("nni.compression.pruning.basic_pruner")

__all__ = ["MaskingPruner"]


class MaskingPruner(SharedWrappers, _basic._NormPruner):  # type: ignore[name-defined]
    """Mask units of coupled groups, by ratio or to a budget; subclasses say which.

    The masks cover the producing layers and, aligned to them, batch norms and depthwise convolutions, so that the
    masked model computes what the sped-up one will. Where layer norms and other statistics run over masked channels,
    masks of weights cannot say that; while the model is wrapped, hooks let these run over the kept channels and keep
    what is masked from the layers that read it. All members of a coupled group get the same channels.
    Conforms to NNI's ``Pruner``: ``compress()`` needs no argument and leaves the model wrapped, works fused
    (``from_compressor``) and inside ``LinearPruner`` and ``AGPPruner``, which then also schedule the budget.

    Args:
        model: the network.
        config_list: which layers, and ``sparse_ratio``; with ``budget`` it only selects layers and may leave the ratio
            out. Other options of NNI's that ask for more than whole filters are refused.
        evaluator: NNI evaluator, for fusion and schedules.
        existed_wrappers: NNI's own; used by ``from_compressor``.
        loader: re-iterable of batches.
        budget: what the pruned network may cost; a latency is predicted for ``example_inputs`` as they are, and
            ``plan.latency_ms`` says what. Time the network after speedup yourself.
        example_inputs: default: the first samples of the loader.
        verify: as for :func:`tp_importance.prunable_groups`.
        **options: see :class:`tp_importance.pruning.target.PruningTarget`.

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
        budget: Budget | None = None,
        example_inputs: Any = None,
        verify: bool | Verifier = True,
        **options: Any,
    ) -> None:
        require_unwrapped(model)
        (for_target,) = split_options(type(self), options, PruningTarget, leave=("ignored_layers",))
        check_loader(loader)
        config_list, ratios, ceilings = selected_layers(model, config_list, budget)
        skipped = [m for n, m in model.named_modules() if has_channels(m) and n not in ratios]
        if example_inputs is None:
            example_inputs = first_samples(model, loader, whole=options.get("forward_fn") is not None)
        self._budget = budget
        checked = maskable(verify)
        self._target = PruningTarget(model, example_inputs, ignored_layers=skipped, verify=checked, **for_target)
        groups = self._target.groups
        self.left_out = left_out(groups, ratios, options.get("num_heads"))
        if not len(groups):
            raise ValueError(
                f"config_list selects no coupled group that can be pruned; left out: {self.left_out or 'all outputs'}. "
                "Select every layer that shares channels with those you want to prune"
            )
        if self.left_out:
            warnings.warn(f"left alone, though selected: {self.left_out}", stacklevel=levels_up())
        self._goal = {g.name: common_ratio(g, ratios, "sparse_ratio") for g in groups}
        most = options.get("max_pruning_ratio", 1.0)
        mosts = most if isinstance(most, Mapping) else dict.fromkeys(groups.names, most)
        self._ceiling = {
            g.name: min([mosts.get(g.name, 1.0), *(ceilings.get(m.name, 1.0) for m in g.producers)]) for g in groups
        }
        self._target.limit_ratios(self._ceiling)
        self._space = self._target.space
        if budget is not None:
            self._require_reachable(budget)
        self.plan: Plan | None = None
        self._check_options()
        require_unmasked(groups, existed_wrappers or {})
        try:
            super().__init__(model, [*config_list, *aligned_norms(model, groups, ratios)], evaluator, existed_wrappers)
        except BaseException as error:
            self._release()
            if isinstance(error, (AssertionError, KeyError)):  # NNI meets a module type or target it does not know
                raise ValueError(f"NNI refuses the model, config_list or evaluator: {error!r}") from error
            raise
        self._masked_norms = MaskedNorms(groups)
        self.interval_steps = 1  # fused without a schedule: prune after the first step (NNI's -1 means never)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            hand_on(cls, cls.__mro__[1])

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

    def update_masks(self, masks: Masks) -> None:
        """Put masks on the wrappers; statistics over channels (layer norms, ...) run over those that are kept."""
        super().update_masks(masks)
        self._masked_norms.set(self.get_masks())

    def wrap_model(self) -> None:
        """Put the wrappers on."""
        super().wrap_model()
        if hasattr(self, "_masked_norms"):  # NNI's constructor wraps
            self._masked_norms.set(self.get_masks())

    def unwrap_model(self) -> None:
        """Take the wrappers off; the network is the dense one again."""
        if hasattr(self, "_masked_norms"):
            self._masked_norms.remove()
        super().unwrap_model()

    @abc.abstractmethod
    def _removed(self) -> dict[str, list[int]]:
        """Units to mask now, per group; sets :attr:`plan`."""

    def _calculate_metrics(self, data: dict[str, Any]) -> Masks:
        """One value per filter, shape (C, 1, ...): smaller goes first."""
        metrics: Masks = {}
        for group in self._target.groups:
            value = data[group.name]
            for m in group.producers:
                mine = metrics.setdefault(m.name, {})  # a split layer is part of several groups
                mine["weight"] = mine.get("weight", 0.0) + self._spread(m, value[m.units], 0.0)
        return metrics

    def _generate_sparsity(self, metrics: Masks) -> Masks:
        removed = self._removed()
        masks: Masks = {}
        for group in self._target.groups:
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

    def _budget_at(self, progress: float) -> Budget:
        """The budget of a schedule: on its way from the dense cost to the limits."""
        assert self._budget is not None
        limits, full = self._target.limits(self._budget), self._target.cost_model.full
        dense = self._target.cost_model.spent(full, limits)
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
        limits = self._target.limits(budget)  # measures a latency, which wrapped layers would not have
        require_reachable(
            self._target.cost_model,
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
        for group in self._target.groups:
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


hand_on(MaskingPruner, PruningTarget, leave=("ignored_layers",))
