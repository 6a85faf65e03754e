"""Two engines that remove masked channels, tried on copies of the network: NNI's ``ModelSpeedup`` and our own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_importance.core.progress import LOGGER
from tp_importance.graph.masking import masked_units
from tp_importance.graph.reparametrised import computed_tensors

from .._compat import NNIUnavailableError
from .groups import remove_groups
from .masked_norms import under_norms
from .masks import apply_masks
from .model_speedup import shrink
from .result import Changes, changes_of, check_widths, output_difference, width_changes
from .trial import run_trial, trial_copy

__all__ = ["ENGINES", "Job", "Removal", "tried_removal"]

ENGINES = ("nni", "groups")
"""What removes channels, in the order in which ``"auto"`` tries it: NNI's ``ModelSpeedup``, and our own surgery."""


@dataclass(frozen=True)
class Job:
    """What is to be removed from which network.

    Attributes:
        model: the network; it is not changed.
        inputs: of :func:`.trial.bound_inputs`.
        masks: of :func:`.masks.checked_masks`.
        compat_shim: as for :func:`nni_plugins.speedup`.
    """

    model: nn.Module
    inputs: inspect.BoundArguments
    masks: Mapping[str, Mapping[str, Tensor]]
    compat_shim: bool = False

    def masked(self) -> nn.Module:
        """A copy of the network with zeros where the masks have them."""
        trial = trial_copy(self.model)
        apply_masks(trial, self.masks)
        return trial


@dataclass(frozen=True)
class Removal:
    """What has to change in the network; a copy with these changes runs and has the widths the masks ask for.

    Attributes:
        engine: which has done it, of :data:`ENGINES`.
        changes: per module.
        difference: how the outputs of the copy differ from those of the masked network, if they do.
        exact: whether removal is masking all the same: there is no difference once masked channels are also zero behind
            batch norms and biases that the masks leave alone. Our own surgery has verified that beforehand.
    """

    engine: str
    changes: Sequence[Changes]
    difference: str | None = None
    exact: bool = True


def tried_removal(job: Job, engine: str) -> Removal:
    """Try the removal on copies of the network.

    Args:
        job: what to remove.
        engine: one of :data:`ENGINES`, or ``"auto"``: NNI's removal if it is exact, and else our own.

    Returns:
        The removal; of NNI's, if that was asked for, also one that is not exact.

    Raises:
        NNIUnavailableError: if NNI is the engine and cannot be imported.
        RuntimeError: if the masked network does not run or the engine fails; with ``"auto"`` the reasons of both.
    """
    before = run_trial(job.masked(), job.inputs)
    if engine == "auto":
        return _by_either(job, before)
    try:
        return _by_nni(job, before) if engine == "nni" else _by_groups(job, before)
    except (NNIUnavailableError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        remedy = "" if engine == "groups" else 'Remedy: engine="auto", which also tries our own surgery. '
        raise RuntimeError(f"{error}. {remedy}The model is unchanged.") from error


def _by_either(job: Job, before: list[Tensor]) -> Removal:
    remedy = ""
    try:
        removal = _by_nni(job, before)
        if removal.exact:
            return removal
        assert removal.difference is not None
        problem, remedy = removal.difference, " engine='nni' takes its result as it is, with a warning."
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        problem = str(error).rstrip(".")
    LOGGER.info("our own surgery is tried, because of NNI's: %s", problem)
    try:
        return _by_groups(job, before)
    except RuntimeError as error:
        raise RuntimeError(
            "no engine can remove the masked channels, and each has its reason. "
            f"engine='nni': {problem}.{remedy} engine='groups': {error}. The model is unchanged."
        ) from error


def _by_nni(job: Job, before: list[Tensor]) -> Removal:
    trial = job.masked()
    try:
        alive = shrink(trial, job.inputs, job.masks, job.compat_shim)
    except (NNIUnavailableError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        found = [c.reason(name) for name, module in job.model.named_modules() for c in computed_tensors(module)]
        if not found:
            raise
        raise RuntimeError(f"{error}. NNI knows parameters only: {'; '.join(found)}") from error
    check_widths(trial, job.masks)
    after = run_trial(trial, job.inputs)
    difference = output_difference(before, after)
    changes = changes_of(job.model, trial, list(alive))
    if difference is None:
        return Removal("nni", changes)
    reference = job.masked()
    for name, channels in alive.items():
        reference.get_submodule(name).register_forward_hook(partial(_zeroed, channels))
    exact = output_difference(run_trial(reference, job.inputs), after) is None
    return Removal("nni", changes, difference, exact)


def _zeroed(alive: Tensor, module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """The output of a module, zero in the channels that NNI has found constant."""
    dim = -1 if isinstance(module, nn.Linear) else 1
    return output.index_fill(dim, (~alive).nonzero().flatten().to(output.device), 0.0)


def _by_groups(job: Job, before: list[Tensor]) -> Removal:
    trial = trial_copy(job.model)
    groups, removed = remove_groups(trial, job.inputs, job.masks)
    normalised = under_norms(groups)
    if len(normalised):  # of which zeros in the weights are only half of it
        reference = job.masked()
        units = {name: gone for name, gone in removed.items() if name in normalised.names}
        with masked_units(reference, normalised, units):
            before = run_trial(reference, job.inputs)
    changes = width_changes(job.model, trial)
    check_widths(trial, job.masks)
    return Removal("groups", changes, output_difference(before, run_trial(trial, job.inputs)))
