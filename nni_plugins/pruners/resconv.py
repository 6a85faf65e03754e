"""ResConv as an NNI pruner: NNI trains, masks say which layers go, and our ``speedup`` removes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tp_importance import Budget
from tp_importance import ResConvPruner as LayerPruner
from tp_importance.core.guards import transaction
from tp_importance.core.processes import warned_once
from tp_importance.core.progress import Phase, phase
from tp_importance.methods.resconv import LayerImportance, LayerPlan, resconv_layers

from .._compat import import_nni
from ..config import Config, Masks, chosen_convolutions, require_chosen
from ..evaluator import evaluator_kept, hold_scalars, unchanged_on_error
from ..surgery.layers import LAYER_TARGET
from ..wrappers import SharedWrappers, on_modules, require_convertible, require_free, require_unwrapped, unwrapped

_compressor = import_nni("nni.compression.base.compressor")
_setting = import_nni("nni.compression.base.setting")
_setting.PruningSetting.register("ResConv2d", {LAYER_TARGET: {"sparse_ratio": None, "apply_method": "mul"}})

__all__ = ["ResConvPruner"]


class ResConvPruner(SharedWrappers, _compressor.Pruner):  # type: ignore[name-defined]
    r"""Remove whole layers to a budget: ResConv (arXiv 2011.14356) with NNI's evaluator and masks.

    The constructor gives every selected convolution that can hold one a shortcut, :math:`y = s \cdot BN(W * x) + a x`,
    in place; with the default scalars the function stays. ``compress(max_steps, max_epochs)`` trains through the
    evaluator, with the proximal step of :math:`\lambda |s|` after every step of its (first) optimizer; then the set of
    layers of least loss that meets the budget gets the mask 0 on its s, so the masked layer hands on :math:`a x`. The
    model is left wrapped. :func:`nni_plugins.speedup` removes those layers and fuses the others: NNI's
    ``ModelSpeedup`` cannot remove a layer. With a convolution masked as a whole it raises EmptyLayerError, and masks
    on s it may simply drop.

    One mask per layer, on s, says all there is to say; masks on convolution and batch norm could not express it for
    batch norms without weights, and would stand in the way of other compressors of the same convolution.

    ``LinearPruner`` and ``AGPPruner`` do not schedule it: one training leads to one budget.

    NNI rebuilds the optimizer by the names of its parameters. Build it, by ``nni.trace``, on the parameters of the
    model before or after the conversion; s and a join it in a group of their own, the last, without weight decay. A
    learning rate schedule with one value per group needs one for that group, too.

    Args:
        model: the network.
        config_list: selects the convolutions that may be converted, by the names and types they have before it. A
            ``sparse_ratio`` may be there and says nothing: the budget decides. What asks for a part of a layer, and
            targets other than ``weight`` and ``bias``, are refused.
        evaluator: a ``TorchEvaluator``; without one there is no training.
        existed_wrappers: NNI's own; used by ``from_compressor``.
        budget: what the network may cost, of MACs, parameters or measured latency; fractions refer to the network
            before conversion.
        example_inputs: tensor, tuple or dict, batch dimension first.
        loader: re-iterable of batches for the losses of the layers; default: the example inputs.
        reg: λ.
        importance: see :class:`tp_importance.ResConvPruner`.
        s: initial layer scaling factor.
        a: initial information control; 1 for training from scratch.
        **options: ``forward_fn``, ``min_run_time``, ``progress`` of :class:`tp_importance.ResConvPruner`.

    Attributes:
        left_out: selected convolutions that cannot hold a shortcut, with the reason.
        plan: what the last masks remove, and what is left then; ``None`` before.

    Raises:
        BudgetError: if the budget cannot be reached.
        RuntimeError: if the model is still wrapped by another compressor.
        TypeError: for another evaluator, or no budget.
        ValueError: for a config_list NNI refuses or this pruner cannot obey, an optimizer that holds nothing of the
            model, another compressor's wrapper on a layer to convert, or nothing that can be converted.
            The model is unchanged on any error.

    Example:
        >>> from nni_plugins import speedup
        >>> def conv():
        ...     return nn.Conv2d(4, 4, 3, padding=1)
        >>> net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), conv(), nn.ReLU(), conv()), torch.randn(1, 3, 8, 8)
        >>> config_list = [{"op_types": ["Conv2d"]}]
        >>> pruner = ResConvPruner(net, config_list, budget=Budget(macs=0.7), example_inputs=x, a=0.5)
        >>> _ = nn.init.zeros_(net[2]._nni_wrapper.s)  # as training would; pass an evaluator and max_steps
        >>> _, masks = pruner.compress()
        >>> masks
        {'2': {'s': tensor([0.])}, '4': {'s': tensor([1.])}}
        >>> pruner.unwrap_model()
        >>> speedup(net, x, masks)[2]
        Identity()
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Config,
        evaluator: Any = None,
        existed_wrappers: dict[str, Any] | None = None,
        *,
        budget: Budget,
        example_inputs: Any,
        loader: Iterable[Any] | None = None,
        reg: float = 1e-3,
        importance: str | LayerImportance = "scale",
        s: float = 1.0,
        a: float = 0.0,
        **options: Any,
    ) -> None:
        require_unwrapped(model)
        chosen, named = chosen_convolutions(model, config_list, budget)
        require_convertible(chosen, model, existed_wrappers or {})
        ignored = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n not in chosen]
        before = dict(model.named_parameters())
        with transaction(model), evaluator_kept(evaluator):
            options |= {"budget": budget, "s": s, "a": a, "ignored_layers": ignored}
            self._planner = LayerPruner(model, example_inputs, loader, reg=reg, importance=importance, **options)
            report, layers = self._planner.conversion, list(self._planner.layers)
            require_chosen(layers, chosen)
            require_free([*layers, *report.batchnorms.values()], model, existed_wrappers or {})
            self.left_out = {name: reason for name, reason in report.left_out.items() if name in chosen}
            missed = {name: reason for name, reason in self.left_out.items() if name in named}
            if missed:
                warnings.warn(f"left alone, though named in config_list: {missed}", stacklevel=2)
            # refuse a budget now rather than after the training
            self._planner.require_reachable()
            scalars = [f"{name}.{scalar}" for name in layers for scalar in ("s", "a")]
            hold_scalars(evaluator, model, before, scalars)
            config = [{"op_names": [name], "target_names": [LAYER_TARGET]} for name in layers]  # in this order
            super().__init__(model, config, evaluator, existed_wrappers)
        self.plan: LayerPlan | None = None
        self._handed_on: dict[str, float] = {}
        self._steps, self._progress, self._running = 0, options.get("progress"), Phase("training")

    @warned_once()
    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """Train, then mask layers until the budget is met.

        Args:
            max_steps: steps of training, handed to the evaluator; without steps and epochs nothing is trained.
            max_epochs: epochs of training, handed to the evaluator.

        Returns:
            The model, still wrapped, and the masks for :func:`nni_plugins.speedup`.

        Raises:
            BudgetError: if the budget cannot be reached.
            RuntimeError: if the model is not wrapped, was sped up, or the evaluator did not step its optimizer.
            ValueError: if there is no evaluator to train, or no length for a training with other compressors.

        On any error the model, weights included, is as before. A masked layer that has a = 0 gets the a it will hand
        on (without a loader 1, with a warning); ``unwrap_model()`` leaves that so.
        """
        train = max_steps is not None or max_epochs is not None
        if train and self.evaluator is None:
            raise ValueError("max_steps and max_epochs need an evaluator that trains; pass evaluator= to the pruner")
        if not train and len(self.fused_compressors) > 1:
            raise ValueError("fused compressors train together: give max_steps or max_epochs")
        if any(getattr(m, "_nni_wrapper", None) is None for m in resconv_layers(self.bound_model).values()):
            raise RuntimeError("the model is not wrapped; call wrap_model() of this pruner first")
        plan, handed_on = self.plan, dict(self._handed_on)
        try:
            with unchanged_on_error(self.bound_model, self.evaluator):
                if train:
                    with phase("training", max_steps, unit="step", progress=self._progress) as self._running:
                        self._fusion_compress(max_steps, max_epochs)
                else:
                    self._fuse_postprocess(None)
        except BaseException:
            self.plan, self._handed_on = plan, handed_on
            raise
        return self.bound_model, self.get_masks()

    # -- what NNI calls

    def _set_default_sparse_granularity(self, target_space: Any) -> None:
        return None

    def _fuse_preprocess(self, evaluator: Any) -> None:
        def proximal() -> None:
            with on_modules(self._planner.layers.values(), LAYER_TARGET):
                self._planner.regularize(evaluator._optimizers[0])
            self._steps += 1
            self._running.advance()

        self._steps = 0
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[proximal])

    def _fuse_postprocess(self, evaluator: Any) -> None:
        if evaluator is not None and not self._steps:
            raise RuntimeError(
                "the evaluator's training function never stepped the optimizer it was given, so nothing was trained: "
                "call step() of that one, and heed max_steps and max_epochs"
            )
        self.update_masks(self.generate_masks())
        for message in self._settle_untrained(trained=evaluator is not None):
            warnings.warn(message, stacklevel=3 if evaluator is None else 4)

    @torch.no_grad()
    def _settle_untrained(self, *, trained: bool) -> list[str]:
        """A masked layer with a = 0 shall hand on what its removal will; returns what there is to warn of."""
        assert self.plan is not None
        messages = []
        for name, layer in self._planner.layers.items():
            removed = name in self.plan.removed
            if removed and layer.a.item() == 0:
                if name not in self.plan.controls:  # no data to choose it by
                    messages.append(f"layer {name} has a=0: masked, it becomes the identity (a is set to 1)")
                layer.a.fill_(self.plan.controls.get(name, 1.0))
                self._handed_on[name] = layer.a.item()
            elif not removed and name in self._handed_on:
                layer.a.masked_fill_(layer.a == self._handed_on.pop(name), 0)  # unless it was trained meanwhile
        if not self.plan.removed:
            messages.append(f"the network already meets the budget ({self.plan.cost}); no layer is masked")
        alive = [name for name in self.plan.removed if self._scale(name).item() != 0]
        if alive and not trained:
            messages.append(
                f"nothing was trained, and {len(alive)} masked layers have s other than 0 ({alive[0]}, say): "
                "give max_steps or max_epochs"
            )
        return messages

    def _collect_data(self) -> Masks:
        """What is lost with each layer, shape (1,)."""
        with unwrapped(self.bound_model):
            self.plan = self._planner.plan()
        return {n: {LAYER_TARGET: torch.tensor([loss], device="cpu")} for n, loss in self.plan.losses.items()}

    def _calculate_metrics(self, data: Masks) -> Masks:
        return data

    def _generate_sparsity(self, metrics: Masks) -> Masks:
        assert self.plan is not None
        return {n: {LAYER_TARGET: torch.full_like(self._scale(n), n not in self.plan.removed)} for n in metrics}

    # -- inside

    def _scale(self, name: str) -> Tensor:
        return self._module_wrappers[name].s.detach()
