"""Replace attention modules whose code wires the sizes of heads by modules that keep them as attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import checked_model
from ..core.batches import tensors_in
from ..core.forward import ForwardFn, run_model
from ..core.guards import HOOKS, transaction
from ..core.stale_optimizers import replacing
from ..errors import TracingError
from ..graph.classes import ignored_modules
from ..graph.option_checks import check_ignored
from ..graph.replacement import COMPUTE_WEIGHTS, calls_counted, passing, replace_modules, report_text
from .rewriters import REWRITERS, Rewriter

__all__ = ["ExplicitReport", "explicit_attention"]

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of the largest output; what else there is has a few digits only."""
_SHOWN = 3
"""How many names an error lists."""
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class ExplicitReport:
    """What :func:`explicit_attention` did.

    Attributes:
        rewritten: per module that was replaced, the class that it had.
        left_out: per module of such a class that was left alone, why.
    """

    rewritten: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return report_text("rewrote", "modules", self.rewritten, self.left_out)


@torch.inference_mode(False)  # what is made there could take no gradient
def explicit_attention(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ignored_layers: Sequence[nn.Module | nn.Parameter | type] | None = None,
    forward_fn: ForwardFn | None = None,
    rewriters: Mapping[type[nn.Module], Rewriter] | None = None,
) -> ExplicitReport:
    """Make the sizes of attention attributes, in place, where the code derives them from the width of its input.

    Code that computes the size of a head as ``width // heads`` gets another size, and not fewer heads, when a head
    goes; so no head can be removed. The modules that take its place compute the same from ordinary linear layers, and
    keep the number of heads, the sizes of queries, keys and values and the factor of the products as numbers of their
    own. Rewritten are

    * ``torch.nn.MultiheadAttention``, also inside ``nn.TransformerEncoderLayer`` and torchvision's ViT;
    * ``ShiftedWindowAttention``, ``ShiftedWindowAttentionV2`` (Swin) and ``RelativePositionalMultiHeadAttention``
      (MaxViT) of torchvision;
    * ``Conv1D`` of transformers (GPT-2), a linear layer with its weight the other way round;
    * ``Attention`` and ``AAttn`` of ultralytics;
    * the attention of timm's BEiT, EVA-02, DINOv3, ViTs with relative positions, PVT v2, Twins, XCiT, EdgeNeXt,
      CrossViT, CAFormer and Swin V2, the windows of its DaViT and the class attention of its CaiT;

    and what ``rewriters`` names. The output stays, in training as well (with the same random numbers wherever dropout
    sees tensors of the same shape), gradients flow as before, and forward and backward hooks stay on the new modules.
    Names of parameters change, except in ultralytics, and weights of transformers are transposed: load weights of the
    old network first. :func:`~tp_importance.load_pruned` takes the factory of the network as it was; where layers of
    ultralytics, of BEiT, EVA, ViTs with relative positions, PVT v2, Twins or of ``rewriters`` were rewritten, the
    factory must call this function.

    Args:
        model: the network; build the optimizer afterwards.
        example_inputs: tensor, tuple of positional or dict of keyword arguments, batch dimension first. If they are
            given, the network runs before and afterwards in eval mode, and the outputs are compared: to 1e-4 of the
            largest in float32, 1e-10 in float64.
        ignored_layers: modules (with everything inside), parameters or module types to leave alone.
        forward_fn: ``forward_fn(model, example_inputs)``; default calls the model.
        rewriters: functions by exact type of module, which get a module and return the new one without changing the
            old; they may use its layers and parameters. A ``ValueError`` leaves the module alone, with its text as the
            reason. They come before ours.

    Returns:
        An :class:`ExplicitReport`. Left out, with the reason, are modules of derived classes, those with an
        ``add_bias_kv`` or ``add_zero_attn``, those whose weights are computed or shared with something else, those with
        hooks that would be lost, and the model itself.

    Raises:
        TypeError: if the model is none, or compiled, or ``rewriters`` is no mapping of types to functions.
        TracingError: if the network does not run on the example inputs.
        ValueError: if the network does not run with the new modules, still calls an old one, or returns something else.
            The model is then as before.

    Example:
        >>> layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> print(explicit_attention(layer, torch.randn(2, 5, 32)))
        rewrote 1 of 1 modules
          self_attn: torch.nn.modules.activation.MultiheadAttention
        >>> layer.self_attn.num_heads, layer.self_attn.head_dim, layer.self_attn.q_proj
        (4, 8, Linear(in_features=32, out_features=32, bias=True))
    """
    check_ignored(checked_model(model), ignored_layers)
    if example_inputs is None and forward_fn is not None:
        raise ValueError("forward_fn is for the pass on example_inputs; give them, too")
    rewriting = _Rewriting(model, _by_name(rewriters), ignored_modules(model, ignored_layers))
    report = rewriting.report()
    if not rewriting.new:
        return report
    before = None if example_inputs is None else _outputs(model, example_inputs, forward_fn)
    guard = transaction(model)
    with replacing(model), guard:
        replace_modules(model, rewriting.new)
        for old, new in rewriting.new.items():
            new._is_full_backward_hook = old._is_full_backward_hook
            for kind in HOOKS:
                vars(new)[kind] = vars(old)[kind].copy()
        if before is not None:
            _check(model, rewriting, before, example_inputs, forward_fn)
        guard.commit()
        for old, new in rewriting.new.items():  # the handle of a hook looks for it in this very dict
            vars(new).update({kind: vars(old)[kind] for kind in HOOKS})
    return report


def _by_name(rewriters: Any) -> dict[str, Rewriter]:
    if rewriters is None:
        return REWRITERS
    if not isinstance(rewriters, Mapping):
        raise TypeError(f"rewriters must map types of modules to functions, not {rewriters!r}")
    for cls, function in rewriters.items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module) and callable(function)):
            raise TypeError(f"rewriters must map types of modules to functions, not {cls!r} to {function!r}")
    return REWRITERS | {_class_name(cls): function for cls, function in rewriters.items()}


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class _Rewriting:
    """Which modules are replaced by which.

    Attributes:
        names: qualified name per module.
        new: the new module per old one.
    """

    def __init__(self, model: nn.Module, rewriters: Mapping[str, Rewriter], ignored: set[nn.Module]) -> None:
        self.names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        self.new: dict[nn.Module, nn.Module] = {}
        self._left: dict[nn.Module, str] = {}
        inside: set[nn.Module] = set()
        for module, name in self.names.items():
            if module in ignored or module in inside:
                continue
            known = [c for c in map(_class_name, type(module).__mro__) if c in rewriters]
            if not known:
                continue
            try:
                if known[0] != _class_name(type(module)):
                    raise ValueError(f"its class {type(module).__name__} may compute something else than {known[0]}")
                if not name:
                    raise ValueError("it is the model itself: put it into an nn.Sequential")
                _check_plain(module)
                new = _made(rewriters[known[0]], module)
                _check_kept(module, new)
            except ValueError as error:
                self._left[module] = str(error)
                continue
            self.new[module] = new
            inside.update(module.modules())
        self._tie()

    def report(self) -> ExplicitReport:
        """What is going to be done."""
        rewritten = {name: _class_name(type(m)) for m, name in self.names.items() if m in self.new}
        return ExplicitReport(rewritten, {self.names[m]: reason for m, reason in self._left.items()})

    def listed(self) -> str:
        """The first names, and how many more there are."""
        names = [self.names[old] for old in self.new]
        return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

    def _tie(self) -> None:
        """Modules that share all their parameters share the new ones; sharing of another kind cannot be kept."""
        owners: dict[int, set[nn.Module]] = {}
        for module in self.names:
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), set()).add(module)
        twins: dict[Any, list[nn.Module]] = {}
        for old in self.new:
            twins.setdefault((type(old), *((n, id(p)) for n, p in old.named_parameters())), []).append(old)
        for group in twins.values():
            first = self.new[group[0]]
            kept = {id(p) for p in first.parameters()}
            known = {part for old in group for part in old.modules()}
            shared = [
                f"its {name} is shared with {self.names[other] or 'the model itself'}"
                for name, p in group[0].named_parameters()
                if id(p) not in kept
                for other in owners[id(p)] - known
            ]
            for old in group:
                if shared:
                    del self.new[old]
                    self._left[old] = shared[0]
                elif old is not group[0]:
                    _share(self.new[old], first)


def _share(module: nn.Module, with_module: nn.Module) -> None:
    """Give a module the parameters of another one of its kind."""
    for name, part in module.named_modules():
        part._parameters.update(with_module.get_submodule(name)._parameters)


def _check_plain(module: nn.Module) -> None:
    """Raise ``ValueError`` if what a module computes is not said by its class and its parameters."""
    if "forward" in vars(module):
        raise ValueError("its forward was replaced")
    for name, part in module.named_modules():
        if hasattr(part, "parametrizations") or any(
            isinstance(hook, COMPUTE_WEIGHTS) for hook in part._forward_pre_hooks.values()
        ):
            raise ValueError(f"a weight {f'of its layer {name} ' if name else ''}is computed; make it plain")
    if any(vars(module).get(kind) for kind in _STATE_HOOKS):
        raise ValueError("it has hooks on its state dict, which know the old names")


def _made(rewriter: Rewriter, module: nn.Module) -> nn.Module:
    new = rewriter(module)
    if not isinstance(new, nn.Module) or new is module:
        raise TypeError(f"the rewriter of {type(module).__name__} must return a new module, not {new!r}")
    return new


def _check_kept(old: nn.Module, new: nn.Module) -> None:
    """Raise ``ValueError`` if layers inside ``old`` that are not in ``new`` do more than to hold parameters."""
    kept = set(new.modules())
    for name, part in old.named_modules():
        if part is old or part in kept:
            continue
        if any(vars(part).get(kind) for kind in HOOKS):
            raise ValueError(f"its layer {name} has hooks, which would be lost")
        if list(part.parameters()) and type(part) not in _LINEAR:
            raise ValueError(f"its layer {name} is a {type(part).__name__}")


def _outputs(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None) -> list[Tensor]:
    try:
        with passing(model):
            return [t.clone() for t in tensors_in(run_model(model, example_inputs, forward_fn))]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TracingError(
            f"{type(model).__name__} does not run on example_inputs: {type(error).__name__}: {error}. Check "
            "device, dtype and shape; give forward_fn for unusual signatures"
        ) from error


def _check(
    model: nn.Module, rewriting: _Rewriting, before: list[Tensor], example_inputs: Any, forward_fn: ForwardFn | None
) -> None:
    """Raise ``ValueError`` unless the network computes with the new modules what it did."""
    names = rewriting.listed()
    with passing(model), calls_counted(rewriting.new) as calls:
        try:
            after = list(tensors_in(run_model(model, example_inputs, forward_fn)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} does not run with new modules in place of {names} ({type(error).__name__}: "
                f"{error}); the model is as before. Pass those that other code looks into in ignored_layers"
            ) from error
    if calls:
        raise ValueError(
            f"{type(model).__name__} still calls the old module {rewriting.names[calls[0]]} after it was replaced; "
            "keep modules in attributes or an nn.ModuleList, not in a list, or pass it in ignored_layers"
        )
    if len(before) != len(after) or not all(map(_agree, before, after)):
        raise ValueError(
            f"the outputs of {type(model).__name__} differ with new modules in place of {names}; the model is as "
            "before. Are the outputs random in eval mode?"
        )


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    finite = a.isfinite()
    most = a[finite].abs().amax() if finite.any() else a.new_zeros(())
    limit = _TOLERANCES.get(a.dtype, 5e-2) * most
    return bool(((a - b).abs() <= limit).logical_or(a == b).logical_or(a.isnan() & b.isnan()).all())
