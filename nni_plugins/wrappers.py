"""NNI's wrappers around layers: found, refused, shared with another compressor, and taken off for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from tp_importance.core.arguments import checked_model
from tp_importance.core.guards import Guard
from tp_importance.methods.resconv.block import conv_problem

from ._compat import import_nni
from .config import Config, Masks

_compressor = import_nni("nni.compression.base.compressor")

__all__ = [
    "SharedWrappers",
    "on_modules",
    "require_convertible",
    "require_free",
    "require_unwrapped",
    "unwrapped",
    "wrapped_layer",
]


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Take all of NNI's wrappers off, whoever put them on; trained values stay."""
    wrappers = [m._nni_wrapper for m in model.modules() if isinstance(getattr(m, "_nni_wrapper", None), nn.Module)]
    for wrapper in wrappers:
        wrapper.unwrap()  # type: ignore[operator, union-attr]
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.wrap()  # type: ignore[operator, union-attr]


class on_modules(Guard):
    """Where NNI has taken a parameter away to its wrapper, put it back for a moment."""

    def __init__(self, modules: Iterable[nn.Module], target: str) -> None:
        super().__init__()
        self._modules, self._target = modules, target

    def _note(self) -> None:
        self._stale = [(m, m._buffers[self._target]) for m in self._modules if self._target in m._buffers]
        for module, _ in self._stale:
            del module._buffers[self._target]
            module._parameters[self._target] = getattr(module._nni_wrapper, self._target)

    def _restore(self, failed: bool) -> None:
        for module, buffer in self._stale:
            module._parameters.pop(self._target, None)
            module._buffers[self._target] = buffer


class SharedWrappers:
    """Fusing with another compressor, and masks that can be saved; goes before NNI's class in the bases."""

    @classmethod
    def from_compressor(
        cls, compressor: Any, new_config_list: Config, *args: Any, evaluator: Any = None, **kwargs: Any
    ) -> Any:
        """Share the wrappers and the evaluator of another NNI compressor, so that both train together.

        Args:
            compressor: the other compressor.
            new_config_list: config_list of this pruner.
            args: as for the constructor.
            evaluator: used if the other has none.
            kwargs: ``loader``, ``budget``, ... as for the constructor.
        """
        base = _compressor.Compressor.from_compressor.__func__  # NNI's own pruners refuse keywords
        was_wrapped = compressor._is_wrapped
        try:
            return base(cls, compressor, new_config_list, *args, evaluator=evaluator, **kwargs)
        except BaseException:
            if was_wrapped and not compressor._is_wrapped:
                compressor.wrap_model()  # as it was
            raise

    def get_masks(self) -> Masks:
        """Copies of all masks; plain dicts, so that ``torch.load`` reads them with ``weights_only=True``."""
        masks: Masks = super().get_masks()  # type: ignore[misc]
        return {name: dict(targets) for name, targets in masks.items()}


def wrapped_layer(model: nn.Module) -> str | None:
    """Name of the first wrapper that a compressor has put into the model and not taken out again."""
    return next((name for name, _ in model.named_modules() if name.split(".")[-1] == "_nni_wrapper"), None)


def require_unwrapped(model: nn.Module) -> None:
    """Refuse a model that another compressor still wraps.

    Raises:
        RuntimeError: naming the layer and both ways out.
        TypeError: for a model that is none, compiled or wrapped (``DistributedDataParallel``, ...).
    """
    checked_model(model)
    wrapped = wrapped_layer(model)
    if wrapped is not None:
        raise RuntimeError(
            f"the model is still wrapped by NNI, at {wrapped!r}; call unwrap_model() of that compressor first, or "
            "share its wrappers by from_compressor(compressor, config_list, loader=...)"
        )


_WRAPPED = (
    "layer {} is wrapped by the other compressor, and this pruner would rebuild it: call "
    "convert_to_resconv(model, example_inputs) first, then make the other compressor and share its wrappers"
)


def require_convertible(names: Iterable[str], model: nn.Module, wrappers: Mapping[str, Any]) -> None:
    """Refuse another compressor's wrappers on convolutions that are still to be converted."""
    for name in names:
        module = model.get_submodule(name)
        if name in wrappers and isinstance(module, nn.Conv2d) and conv_problem(module) is None:
            raise ValueError(_WRAPPED.format(name))


def require_free(names: list[str], model: nn.Module, wrappers: dict[str, Any]) -> None:
    """Refuse another compressor's wrappers on layers that were converted just now, or with masks."""
    pruned = [name for name, wrapper in wrappers.items() if wrapper.pruning_target_spaces]
    if pruned:
        raise ValueError(
            f"layer {pruned[0]} has masks of another pruner: remove layers first, and prune channels of what speedup "
            "leaves; shortcuts tie channels together"
        )
    moved = [n for n in names if n in wrappers and wrappers[n].module is not model.get_submodule(n)]
    if moved:
        raise ValueError(_WRAPPED.format(moved[0]))
