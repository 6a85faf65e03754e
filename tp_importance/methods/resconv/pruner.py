"""Remove whole layers to a budget: ResConv's pruner (arXiv 2011.14356)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...budget import Budget, Cost
from ...core.arguments import checked_budget, checked_model
from ...core.eval_mode import warn_in_eval_mode
from ...core.guards import preserved, transaction
from ...core.processes import levels_up, warned_once
from ...core.progress import phase, shown
from ...core.stale_optimizers import replacing
from ...graph.counting import count_ops
from ...pruning.report import bytes_per_parameter
from ...recovery.recover import recover as recover_network
from ...recovery.report import RecoveryReport
from ...recovery.settings import Recovery
from ...refitting.report import RefitReport
from ...refitting.settings import Refit
from ...statistics.batchnorm import recalibrate_batchnorm
from ...statistics.dense_reference import DenseReference
from ...statistics.running_statistics import has_batch_norm
from .block import resconv_layers
from .conversion import ConversionReport, convert_to_resconv
from .conversion import fuse as fuse_layers
from .losses import LayerImportance
from .plan import LOSSES, LayerPlan, LayerPlanner
from .refit import refit_to_removal
from .removal import RemovalReport, remove_layers
from .report import LayerReport, LayerRow
from .training import factors_apart, proximal_step

__all__ = ["ResConvPruner"]


class ResConvPruner(LayerPlanner):
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
        progress: show a bar for every phase; by default in a terminal, see :mod:`tp_importance.core.progress`.

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
        progress: bool | None = None,
    ) -> None:
        checked_model(model)
        checked_budget(budget)
        if isinstance(reg, bool) or not isinstance(reg, (int, float)) or not 0 <= reg < float("inf"):
            raise ValueError(f"reg={reg!r} must be a finite number >= 0, e.g. 1e-3")
        if not callable(importance) and importance not in LOSSES:
            raise ValueError(f"importance={importance!r} is unknown; choose one of {sorted(LOSSES)} or pass a function")
        if not resconv_layers(model):
            left, run = ignored_layers, forward_fn
            with phase("converting", progress=progress) as running:
                convert_to_resconv(model, example_inputs, s=s, a=a, ignored_layers=left, forward_fn=run)
                running.note(layers=len(resconv_layers(model)))
        by_hand = ConversionReport(list(resconv_layers(model)), {}, {})
        super().__init__(
            model,
            example_inputs,
            loader,
            budget=budget,
            importance=importance,
            conversion=getattr(model, "resconv_report", by_hand),
            forward_fn=forward_fn,
            min_run_time=min_run_time,
            progress=progress,
        )
        self.reg, self._seen_in_eval = float(reg), False
        self.history: list[LayerReport] = []

    def parameter_groups(self, *, weight_decay: float = 0.0, **scalars: Any) -> list[dict[str, Any]]:
        """Parameters for an optimizer: no weight decay on s and a, else it would do what L1 is for.

        It stays on γ and β of the batch norms; without it they would grow to cancel s.

        Args:
            weight_decay: of all other parameters.
            **scalars: further options of the group with s and a, ``lr`` say.
        """
        return factors_apart(self.model, self.layers, weight_decay, scalars)

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
        if not self._seen_in_eval:
            self._seen_in_eval = warn_in_eval_mode(self.model, stacklevel=4)
        proximal_step(self._require_layers(), optimizer, self.reg)

    @warned_once()
    def step(
        self,
        budget: Budget | None = None,
        *,
        fuse: bool = True,
        refit: Refit | str | bool | None = None,
        recover: Recovery | bool | float | None = None,
    ) -> LayerReport:
        """Remove layers until the budget is met: :meth:`plan`, then :meth:`apply`.

        Works in eval mode whatever the mode of the model, and restores it. Build the optimizer anew afterwards.

        Args:
            budget: default: the pruner's.
            fuse: turn the layers that stay into ordinary convolutions. With ``False`` they keep shortcut and batch
                norm, so that training can go on; call :func:`~tp_importance.fuse` at the end.
            refit: how the network is repaired on the pruner's loader, before fusing, see :class:`~tp_importance.Refit`.
                ``"sequential"`` (also ``True``): all layers behind the first that goes are refitted by least squares,
                and make up for what is missing in the residual streams. ``"batchnorm"``: only the batch norm statistics
                move, by the change that the removal makes.
            recover: then, before fusing, train the network on the pruner's loader to give what it gave before the step
                (with ``fuse=False`` all but the factors s and a):
                ``True``, a number of minutes or a :class:`~tp_importance.Recovery`; see
                :func:`~tp_importance.recover`.

        Returns:
            :class:`~tp_importance.methods.resconv.LayerReport`.

        Raises:
            BudgetError: if the budget cannot be reached.
            RuntimeError: if the result does not cost or compute what was planned, or after the model was fused; the
                model is then as before.
            ValueError: if refit or recovery have no loader, and for a refit that is for channels.

        Warns:
            UserWarning: if nothing needs to be removed, or (without data) a removed layer with a = 0 becomes the
                identity.
        """
        settings, recovery = self._checked(refit, recover)
        return self.apply(self.plan(budget), fuse=fuse, refit=settings, recover=recovery)

    @warned_once()
    @torch.inference_mode(False)  # what is made there could take no gradient
    def apply(
        self,
        plan: LayerPlan,
        *,
        fuse: bool = True,
        refit: Refit | str | bool | None = None,
        recover: Recovery | bool | float | None = None,
    ) -> LayerReport:
        """Remove the layers of a plan, fold what they hand on into their neighbours, and fuse the others; in place.

        Args:
            plan: of this pruner, made for the model as it is now.
            fuse: as for :meth:`step`.
            refit: as for :meth:`step`.
            recover: as for :meth:`step`.

        Returns:
            :class:`~tp_importance.methods.resconv.LayerReport`.

        Raises:
            RuntimeError: as :meth:`step`.
            ValueError: as :meth:`step`, and for a plan of other layers than there are.
        """
        (settings, recovery), run = self._checked(refit, recover), self._forward_fn
        unknown = sorted(set(plan.losses).symmetric_difference(self._require_layers()))
        if unknown:
            raise ValueError(f"the plan is of another network: layer {unknown[0]} is not in both; call plan() again")
        rows = self._rows(plan)
        modes = {n: m.training for n, m in self.model.named_modules(remove_duplicate=False)}
        if not plan.removed:
            warnings.warn(
                f"the network already meets the budget ({plan.cost}); no layer is removed", stacklevel=levels_up()
            )
        in_place = (*self.model.buffers(), *self.model.parameters())
        step, refitted, recovered, done = transaction(self.model, in_place), None, None, RemovalReport([], {}, {})
        with shown(self._progress), step, replacing(self.model):
            if plan.removed:
                refitted, recovered, done = self._removed(plan, settings, recovery, fuse)
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
                refit=refitted,
                recovery=recovered,
            )
            step.commit()
            self.history.append(report)
        return report

    def _removed(
        self, plan: LayerPlan, settings: Refit | None, recovery: Recovery | None, fuse: bool
    ) -> tuple[RefitReport | None, RecoveryReport | None, RemovalReport]:
        """Refit for a removal, remove, and repair while tensors are still on the scale of the dense network."""
        model, x, loader, run = self.model, self._example_inputs, self.loader, self._forward_fn
        refitted: RefitReport | None = None
        recovered: RecoveryReport | None = None
        follows = settings is not None and settings.follows and has_batch_norm(model)
        reference = DenseReference.of(model) if follows or recovery is not None else None
        if settings is not None and settings.solves and loader is not None:
            given = plan.controls or {name: self.layers[name].a.item() or 1.0 for name in plan.removed}
            refitted = refit_to_removal(model, x, loader, given, settings, forward_fn=run)

        def repair() -> None:
            nonlocal recovered
            if reference is None or loader is None:
                return
            with torch.enable_grad():
                if follows:
                    recalibrate_batchnorm(model, loader, reference=reference, forward_fn=run)
                if recovery is not None:
                    with preserved(model):
                        for layer in resconv_layers(model).values():
                            if not fuse or not layer.conv.weight.requires_grad:  # what the user's training says stays
                                for factor in (layer.s, layer.a):
                                    factor.requires_grad_(False)
                        recovered = recover_network(model, reference.model, loader, recovery, forward_fn=run)

        done = remove_layers(model, x, plan.controls or plan.removed, forward_fn=run, repair=repair)
        return refitted, recovered, done

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

    def _checked(
        self, refit: Refit | str | bool | None, recover: Recovery | bool | float | None
    ) -> tuple[Refit | None, Recovery | None]:
        recovery = Recovery.of(recover)
        if recovery is not None:
            recovery.require_data(self.loader)
        settings = Refit.of(refit)
        if settings is not None and settings.mode == "parallel":
            raise ValueError(
                "refit='parallel' is for channels: what the layers that stay can make up for is only known from one to "
                "the next; give refit='sequential' or 'batchnorm'"
            )
        if settings is not None and settings.solves and not settings.downstream:
            raise ValueError(
                "downstream=False refits only layers that lose inputs, and the removal of layers takes none away: "
                "leave it out of Refit(...)"
            )
        if settings is not None:
            settings.require_data(self.loader)
        return settings, recovery

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
