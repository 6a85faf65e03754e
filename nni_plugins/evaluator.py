"""Keep NNI's evaluator in order while a pruner changes what is under it.

NNI rebuilds the optimizer by the names of its parameters, which moves and additions of parameters must not escape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from tp_importance.core.guards import preserved, transaction

from ._compat import import_nni

__all__ = ["evaluator_kept", "hold_scalars", "unchanged_on_error"]

_utils = import_nni("nni.compression.utils")


@contextmanager
def evaluator_kept(evaluator: Any) -> Iterator[None]:
    """Undo on an error what a pruner's constructor does to the evaluator.

    Raises:
        TypeError: if it is no ``TorchEvaluator``.
    """
    if evaluator is not None and not isinstance(evaluator, _utils.TorchEvaluator):
        raise TypeError(
            f"evaluator is a {type(evaluator).__name__}; of NNI's evaluators only TorchEvaluator is supported, as this "
            "pruner needs the optimizer itself after every step"
        )
    before = dict(vars(evaluator)) if evaluator is not None else {}
    helpers = [(helper, dict(vars(helper))) for helper in before.get("_optimizer_helpers", ())]
    try:
        yield
    except BaseException:
        for changed, attributes in [(evaluator, before), *helpers]:
            if changed is not None:
                vars(changed).clear()
                vars(changed).update(attributes)
        raise


def hold_scalars(evaluator: Any, model: nn.Module, before: Mapping[str, nn.Parameter], scalars: list[str]) -> None:
    """Make the evaluator's first optimizer hold ``scalars``, without weight decay, and know moved parameters.

    Args:
        evaluator: a ``TorchEvaluator`` or ``None``.
        model: the network after parameters were moved and added; not wrapped.
        before: its parameters before that, by name.
        scalars: names of parameters.

    Raises:
        ValueError: if the first optimizer holds nothing of the model, or another one holds a scalar: NNI lets a
            pruner act after the steps of the first only.
    """
    if evaluator is None:
        return
    moved: dict[str, str] = {}
    if evaluator._initialization_complete:  # by another compressor, from the names there were
        now = {id(p): name for name, p in model.named_parameters()}
        moved = {name: now[id(p)] for name, p in before.items() if id(p) in now}
    else:
        evaluator._init_optimizer_helpers(model)
    names = dict(model.named_parameters())
    first, *others = evaluator._optimizer_helpers
    for helper in (first, *others):
        groups = [{**g, "params": [moved.get(n, n) for n in g["params"]]} for g in _groups(helper)]
        _set_groups(helper, groups)
    for helper in others:
        held = [n for g in _groups(helper) for n in g["params"] if n in scalars]
        if held:
            raise ValueError(
                f"{held[0]} is in another optimizer of the evaluator than its first; put it there, as NNI lets pruners "
                "act after the steps of the first only"
            )
    groups = _groups(first)
    if not any(n in names for g in groups for n in g["params"]):
        raise ValueError(
            f"the evaluator's optimizer holds no parameter of this {type(model).__name__}: build it by "
            "nni.trace(torch.optim.SGD)(model.parameters(), ...) on this very model"
        )
    own = [[n for n in g["params"] if n in scalars] for g in groups]
    rest = [{**g, "params": [n for n in g["params"] if n not in scalars]} for g in groups]
    missing = [n for n in scalars if not any(n in mine for mine in own)]
    apart = [{**g, "params": mine} for g, mine in zip(groups, own, strict=True)] + [{"params": missing}]
    _set_groups(first, [g for g in (*rest, *({**g, "weight_decay": 0.0} for g in apart)) if g["params"]])


def _groups(helper: Any) -> list[dict[str, Any]]:
    """Parameter groups that hold names."""
    return helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0]


def _set_groups(helper: Any, groups: list[dict[str, Any]]) -> None:
    if "params" in helper.kwargs:
        helper.kwargs = {**helper.kwargs, "params": groups}
    else:
        helper.args = [groups, *helper.args[1:]]


@contextmanager
def unchanged_on_error(model: nn.Module, evaluator: Any) -> Iterator[None]:
    """Put modes and hooks back on every exit, structure and values on errors; the evaluator is free afterwards.

    Holds a copy of all parameters and buffers.
    """
    try:
        with preserved(model), transaction(model, (*model.parameters(), *model.buffers())):
            yield
    finally:
        if getattr(evaluator, "model", None) is not None:
            if evaluator._optimizers is None:  # it failed to build them, which unbinding does not foresee
                evaluator.model = None
            else:
                evaluator.unbind_model()
