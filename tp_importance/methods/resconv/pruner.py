"""Remove whole layers to a budget: ResConv's pruner (arXiv 2011.14356)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...allocation.greedy import count_hint
from ...budget import Budget, Cost
from ...core.arguments import checked_budget, checked_model
from ...core.eval_mode import warn_in_eval_mode
from ...core.guards import transaction
from ...core.processes import levels_up, warned_once
from ...core.progress import phase, shown, shows_progress
from ...core.stale_optimizers import replacing
from ...errors import BudgetError
from ...graph.counting import count_ops
from ...pruning.pruner import bytes_per_parameter
from ...refitting.settings import Refit
from ...statistics.batchnorm import recalibrate_batchnorm
from ...statistics.dense_reference import DenseReference
from ...statistics.running_statistics import has_batch_norm
from .block import ConversionReport, ResConv2d, convert_to_resconv, resconv_layers
from .block import fuse as fuse_layers
from .costs import LayerClock, LayerCosts
from .fusion import cheapest_removal, soft_threshold
from .losses import LayerImportance, output_losses, removal_controls, scale_losses
from .removal import RemovalReport, remove_layers
from .report import LayerReport, LayerRow

__all__ = ["LayerPlan", "ResConvPruner"]

ATTEMPTS = 12
"""Measurements towards a latency budget; the last one removes all layers, so what is called unreachable was tried."""
LOSSES = {"scale": scale_losses, "output": output_losses}


@dataclass(frozen=True)
class LayerPlan:
    """What :meth:`ResConvPruner.step` would do.

    Attributes:
        removed: layers to remove, in the order of the network.
        losses: what is lost with each layer, also with those that stay.
        cost: exact cost of the network that is left, fused.
        dense: cost of the network before it was converted.
        limits: absolute limits of the budget.
        controls: per removed layer what it hands on, see :func:`.removal_controls`; empty without data.
        latency_ms: for a latency budget ``dense``, ``limit``, ``predicted`` (sum of layers) and ``measured``.
        savings: per cost field, what the removal of each layer saves of the fused network.
    """

    removed: list[str]
    losses: dict[str, float]
    cost: Cost
    dense: Cost
    limits: dict[str, int]
    controls: dict[str, float]
    latency_ms: dict[str, float] = field(default_factory=dict)
    savings: dict[str, dict[str, int]] = field(default_factory=dict)


class ResConvPruner:
    r"""Make a CNN shallower: train with a scaling factor per layer, remove layers to a budget, fuse the rest.

    The constructor converts the model in place (unless it is converted), which leaves its function as it was. Training
    is yours; in the manner of Torch-Pruning's sparse-training pruners, one call a step drives the factors s to 0:

    .. code-block:: python

        pruner = ResConvPruner(model, x, loader, budget=Budget(macs=0.5), reg=1e-3)
        optimizer = torch.optim.SGD(pruner.parameter_groups(weight_decay=5e-4), lr=0.1, momentum=0.9)
        for images, labels in loader:
            loss_fn(model(images), labels).backward()
            optimizer.step()
            pruner.regularize(optimizer)  # after the step: it is a proximal one
            optimizer.zero_grad()
        report = pruner.step()  # removes, folds, fuses: a plain Conv/BN/ReLU network

    A factor that no gradient holds falls from 1 to 0 in :math:`1 / (lr \cdot reg)` steps.

    Layers are removed so that the total loss is least (a knapsack, solved exactly) and the cost of the *resulting*
    network is within the budget. One layer is the smallest step, so the result may lie well below it; the report
    says so.

    Args:
        model: the network.
        example_inputs: tensor, tuple or dict, batch dimension first; latency is measured on them.
        loader: re-iterable of batches, a few hundred samples, for the losses of layers, for what untrained layers hand
            on, and for recalibration; default: losses are measured on the example inputs.
        budget: what the network may cost; fractions refer to the network before conversion. ``latency`` and
            ``latency_ms`` are measured.
        reg: λ of :math:`\lambda |s|`, see :meth:`regularize`.
        importance: ``"scale"`` (:func:`.scale_losses`), ``"output"`` (:func:`.output_losses`, ours), or a function
            ``(model, {name: layer}) → {name: loss}``.
        s: initial layer scaling factor, if the model is not converted yet.
        a: initial information control, if the model is not converted yet; 1 for training from scratch.
        ignored_layers: modules, parameters or module types to leave alone.
        forward_fn: ``forward_fn(model, example_inputs)``, also called with the loader's batches.
        min_run_time: seconds per latency measurement.
        progress: show a progress bar for every phase, see :mod:`tp_importance.core.progress`.

    Attributes:
        dense: cost of the network before conversion.
        conversion: which layers were converted, and why the others were not.
        history: reports of the steps so far.

    Raises:
        TypeError: if ``budget`` is no :class:`~tp_importance.Budget`, or the model is none or compiled.
        ValueError: for bad options, or if no convolution is eligible.

    Example:
        >>> def conv():
        ...     return nn.Conv2d(4, 4, 3, padding=1)
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
        >>> pruner = ResConvPruner(net, torch.randn(1, 3, 8, 8), budget=Budget(macs=0.75), a=0.5)
        >>> _ = nn.init.zeros_(pruner.layers["2"].s)
        >>> pruner.step().removed, pruner.model[2]
        (['2'], Identity())

    Source: paper, abstract (scaling factor with L1, fusing); the block, ranking and removal are ours.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any] | None = None,
        *,
        budget: Budget,
        reg: float = 1e-3,
        importance: str | LayerImportance = "scale",
        s: float = 1.0,
        a: float = 0.0,
        ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        min_run_time: float = 0.5,
        progress: bool = False,
    ) -> None:
        checked_model(model)
        self._progress, self._seen_in_eval = progress, False
        self.budget = checked_budget(budget)
        if isinstance(reg, bool) or not isinstance(reg, (int, float)) or not 0 <= reg < float("inf"):
            raise ValueError(f"reg={reg!r} must be a finite number >= 0, e.g. 1e-3")
        if not callable(importance) and importance not in LOSSES:
            raise ValueError(f"importance={importance!r} is unknown; choose one of {sorted(LOSSES)} or pass a function")
        self.model, self.loader, self.reg = model, loader, float(reg)
        self._example_inputs, self._forward_fn, self._min_run_time = example_inputs, forward_fn, min_run_time
        self._importance = importance
        if not resconv_layers(model):
            left, run = ignored_layers, forward_fn
            with phase("converting", progress=progress) as running:
                convert_to_resconv(model, example_inputs, s=s, a=a, ignored_layers=left, forward_fn=run)
                running.note(layers=len(self.layers))
        by_hand = ConversionReport(list(self.layers), {}, {})
        self.conversion: ConversionReport = getattr(model, "resconv_report", by_hand)
        self.dense: Cost = LayerCosts.of(model, example_inputs, forward_fn).dense
        self._dense_ms: float | None = None
        self.history: list[LayerReport] = []

    @property
    def layers(self) -> dict[str, ResConv2d]:
        """The residual convolutions that are left, by name."""
        return resconv_layers(self.model)

    def parameter_groups(self, *, weight_decay: float = 0.0, **scalars: Any) -> list[dict[str, Any]]:
        """Parameters for an optimizer: no weight decay on s and a, else it would do what L1 is for.

        It stays on γ and β of the batch norms; without it they would grow to cancel s.

        Args:
            weight_decay: of all other parameters.
            **scalars: further options of the group with s and a, ``lr`` say.
        """
        scales = [p for layer in self.layers.values() for p in (layer.s, layer.a)]
        own = {id(p) for p in scales}
        rest = [p for p in self.model.parameters() if id(p) not in own]
        return [
            {"params": rest, "weight_decay": weight_decay},
            {"params": scales, "weight_decay": 0.0, **scalars},
        ]

    @torch.no_grad()
    def regularize(self, optimizer: torch.optim.Optimizer) -> None:
        r"""Proximal step of :math:`\lambda |s|`; call it after ``optimizer.step()``, once.

        .. math:: s \leftarrow sign(s) \max(|s| - lr \cdot \lambda, 0), \qquad a \leftarrow \max(a, 0)

        with the learning rate of the parameter group of s. Where s has become 0 its momentum is put to 0.
        Torch-Pruning's ``regularize(model)`` works on gradients before the step; this must not, or s would never be
        exactly 0.

        Args:
            optimizer: any optimizer of torch that holds the factors.

        Raises:
            TypeError: if ``optimizer`` is none.
            ValueError: if it does not hold the factors (it was built before the conversion).

        Warns:
            UserWarning: once, if the network is trained in eval mode, where a training diverges.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"regularize takes the optimizer, not a {type(optimizer).__name__}: call regularize(optimizer) after "
                "optimizer.step()"
            )
        rate = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        if not self._seen_in_eval:
            self._seen_in_eval = warn_in_eval_mode(self.model, stacklevel=4)
        layers = self._require_layers()
        missing = [name for name, layer in layers.items() if layer.s.requires_grad and id(layer.s) not in rate]
        if missing:
            raise ValueError(
                f"the optimizer does not hold the factor of layer {missing[0]}; build it after the pruner, from "
                "pruner.parameter_groups()"
            )
        for layer in layers.values():
            if layer.s.requires_grad:
                layer.s.copy_(soft_threshold(layer.s, rate[id(layer.s)] * self.reg))
                _stop_momentum(optimizer.state.get(layer.s, {}), layer.s)
            layer.a.clamp_(min=0)

    @shows_progress
    def losses(self) -> dict[str, float]:
        """What is lost with each layer, in the order of the network.

        Raises:
            RuntimeError: after the model was fused.
            ValueError: if the importance gives a value that is missing, negative or not finite, or for bad data.
        """
        layers = self._require_layers()
        if callable(self._importance):
            found = dict(self._importance(self.model, layers))
        else:
            measure = LOSSES[self._importance]
            found = measure(self.model, layers, self.loader, self._example_inputs, self._forward_fn)
        for name in layers:
            if not (np.isfinite(found.get(name, np.nan)) and found[name] >= 0):
                raise ValueError(
                    f"importance gives {found.get(name)} for layer {name}; it must be a finite number >= 0"
                )
        return {name: float(found[name]) for name in layers}

    @warned_once()
    def plan(self, budget: Budget | None = None) -> LayerPlan:
        """Which layers would go; the model is not touched. A latency budget is measured on copies.

        Args:
            budget: default: the pruner's.

        Raises:
            BudgetError: if the budget cannot be reached; names the least reachable cost.
            RuntimeError: after the model was fused.
        """
        chosen = checked_budget(self.budget if budget is None else budget)
        losses, costs = self.losses(), LayerCosts.of(self.model, self._example_inputs, self._forward_fn)
        limits, least = chosen.marked_limits(self.dense), costs.without(list(losses)).as_dict()
        for f, limit in limits.items():
            if least[f] > limit:
                raise BudgetError(
                    f"the budget of {limit} {f} cannot be reached by removing layers: with all {len(losses)} removed "
                    f"{least[f]} {f} are left. Give at least {least[f]}, or prune channels after fusing"
                    + self._left_out()
                    + count_hint(f, limit, self.dense.as_dict()[f])
                )
        needed = {f: float(costs.fused.as_dict()[f] - limit) for f, limit in limits.items()}
        if chosen.is_measured:
            return self._timed_plan(chosen, losses, costs, needed, limits)
        with phase("choosing layers", progress=self._progress, layers=len(losses)):
            gone = _cheapest(losses, costs.savings, needed)
        controls = self._controls(gone)
        return LayerPlan(gone, losses, costs.without(gone), self.dense, limits, controls, savings=costs.savings)

    @warned_once()
    @torch.inference_mode(False)  # what is made there could take no gradient
    def step(
        self, budget: Budget | None = None, *, fuse: bool = True, refit: Refit | str | bool | None = None
    ) -> LayerReport:
        """Remove layers, fold what they hand on into their neighbours, and fuse the others; in place.

        Works in eval mode whatever the mode of the model, and restores it. Build the optimizer anew afterwards.

        Args:
            budget: default: the pruner's.
            fuse: turn the layers that stay into ordinary convolutions. With ``False`` they keep shortcut and batch
                norm, so that training can go on; call :func:`~tp_importance.fuse` at the end.
            refit: ``"batchnorm"``: move the batch norm statistics by the change that the removal makes on the pruner's
                loader, before fusing; see :class:`~tp_importance.Refit`. No layer gets new weights by least squares.

        Returns:
            :class:`~tp_importance.methods.resconv.LayerReport`.

        Raises:
            BudgetError: if the budget cannot be reached.
            RuntimeError: if the result does not cost or compute what was planned, or after the model was fused; the
                model is then as before.
            ValueError: if the refit has no loader, or is one of channels.

        Warns:
            UserWarning: if nothing needs to be removed, or (without data) a removed layer with a = 0 becomes the
                identity.
        """
        settings = Refit.of(refit)
        if settings is not None and settings.solves:
            raise ValueError(f"refit={settings.mode!r} is for channels; after layers went give refit='batchnorm'")
        if settings is not None and self.loader is None:
            raise ValueError("refit='batchnorm' needs data: pass loader= to the pruner")
        plan, run = self.plan(budget), self._forward_fn
        rows = self._rows(plan)
        modes = {n: m.training for n, m in self.model.named_modules(remove_duplicate=False)}
        if not plan.removed:
            warnings.warn(
                f"the network already meets the budget ({plan.cost}); no layer is removed", stacklevel=levels_up()
            )
        done = RemovalReport([], {}, {})
        step = transaction(self.model, self.model.buffers())  # statistics are written in place
        with shown(self._progress), step, replacing(self.model):
            if plan.removed:
                reference = DenseReference.of(self.model) if settings and has_batch_norm(self.model) else None
                with phase("removing layers", layers=len(plan.removed), before=self.dense, after=plan.cost):
                    factors = plan.controls or plan.removed
                    done = remove_layers(self.model, self._example_inputs, factors, forward_fn=run)
                if reference is not None and self.loader is not None:
                    recalibrate_batchnorm(self.model, self.loader, reference=reference, forward_fn=run)
            if fuse and self.layers:
                fuse_layers(self.model.eval())
            cost = Cost(*count_ops(self.model, self._example_inputs, forward_fn=run))
            if cost.macs != plan.cost.macs or (fuse and cost != plan.cost):
                raise RuntimeError(f"the network costs {cost} without the layers, planned were {plan.cost}")
            for name, module in self.model.named_modules():
                module.training = modes[name]
            report = LayerReport(
                rows=rows,
                dense=self.dense,
                cost=cost,
                limits=plan.limits,
                bytes_per_param=bytes_per_parameter(self.model),
                left_out=dict(self.conversion.left_out),
                collapsed=done.collapsed,
                kept_scales=done.kept_scales,
                latency_ms=plan.latency_ms,
            )
            step.commit()
            self.history.append(report)
        return report

    def report(self) -> LayerReport:
        """Report of the last :meth:`step`.

        Raises:
            RuntimeError: before the first step.
        """
        if not self.history:
            raise RuntimeError("no layer was removed yet: call step() first, or plan() to see what it would do")
        return self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the states of model and optimizer; plain values."""
        return {"layers": list(self.layers), "dense": self.dense.as_dict(), "dense_ms": self._dense_ms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` after the same conversion, removals included.

        Raises:
            ValueError: if the model has other residual convolutions.
        """
        if list(state["layers"]) != list(self.layers):
            other = set(state["layers"]).symmetric_difference(self.layers)
            raise ValueError(f"the state is of another network: layers {sorted(other)[:3]} are not in both")
        self.dense, self._dense_ms = Cost(**state["dense"]), state["dense_ms"]

    def _require_layers(self) -> dict[str, ResConv2d]:
        layers = self.layers
        if not layers:
            raise RuntimeError("the model has no ResConv2d any more (it was fused); make a new pruner to go on")
        return layers

    @shows_progress
    def _controls(self, removed: list[str]) -> dict[str, float]:
        """Factors of layers to remove; empty without data, where those with a = 0 become the identity."""
        if self.loader is None:
            return {}
        chosen = {name: layer for name, layer in self.layers.items() if name in removed}
        return removal_controls(self.model, chosen, self.loader, self._example_inputs, self._forward_fn)

    def _rows(self, plan: LayerPlan) -> list[LayerRow]:
        return [
            LayerRow(
                name,
                layer.s.item(),
                layer.a.item(),
                plan.savings["macs"][name],
                plan.savings["params"][name],
                plan.losses[name],
                name in plan.removed,
            )
            for name, layer in self.layers.items()
        ]

    @shows_progress
    @phase("measuring latency")
    def _timed_plan(
        self,
        budget: Budget,
        losses: dict[str, float],
        costs: LayerCosts,
        needed: dict[str, float],
        limits: dict[str, int],
    ) -> LayerPlan:
        """Plan by the times of single layers, measure the result, and ask for more as long as it is too slow."""
        clock = LayerClock(self.model, self._example_inputs, self._forward_fn, self._min_run_time)
        if self._dense_ms is None:
            self._dense_ms = clock.dense_ms
        limit = budget.latency_limit(self._dense_ms)
        assert limit is not None
        now, each = clock.without_ms([]), clock.layers_ms()
        short, gone, measured = now - limit, list[str](), now
        for attempt in range(ATTEMPTS):
            whole = sum(each.values()) * (1 - 1e-9)  # whatever the order of summation
            asked = {**needed, "latency_ms": whole if attempt == ATTEMPTS - 1 else min(short, whole)}
            gone = _cheapest(losses, {**costs.savings, "latency_ms": each}, asked)
            predicted = now - sum(each[name] for name in gone)
            measured = clock.without_ms(gone) if gone else now
            if measured <= limit:
                found = {"dense": self._dense_ms, "limit": limit, "predicted": predicted, "measured": measured}
                controls = self._controls(gone)
                left = costs.without(gone)
                return LayerPlan(gone, losses, left, self.dense, limits, controls, found, costs.savings)
            if len(gone) == len(losses):
                break
            short = now - predicted + max(measured - limit, 0.5 * min(each[n] for n in losses if n not in gone))
        raise BudgetError(
            f"the latency budget of {limit:.3f} ms cannot be reached by removing layers: {measured:.3f} ms were "
            f"measured with {len(gone)} of {len(losses)} removed (dense: {self._dense_ms:.3f} ms). Allow more, or "
            "prune channels after fusing" + self._left_out()
        )

    def _left_out(self) -> str:
        """The first layers that cannot go, with the reasons."""
        named = [f"{name} ({reason})" for name, reason in self.conversion.left_out.items()]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return f". Left out: {', '.join(named[:3])}{more}" if named else ""


def _cheapest(
    losses: dict[str, float], savings: Mapping[str, Mapping[str, float]], needed: Mapping[str, float]
) -> list[str]:
    names = list(losses)
    rows = {f: [saving[n] for n in names] for f, saving in savings.items()}
    return [names[i] for i in cheapest_removal(list(losses.values()), rows, needed)]


def _stop_momentum(state: Mapping[str, Any], s: Tensor) -> None:
    """Zero the first moments where s is 0, or it would be carried through."""
    for key in ("momentum_buffer", "exp_avg"):
        moment = state.get(key)
        if isinstance(moment, Tensor) and moment.shape == s.shape:
            moment.masked_fill_(s == 0, 0.0)
