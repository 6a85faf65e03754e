"""Two engines that remove masked channels, tried on copies of the network: NNI's ``ModelSpeedup`` and our own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tp_importance.core.progress import LOGGER
from tp_importance.graph.reparametrised import computed_tensors

from .._compat import NNIUnavailableError
from .groups import remove_groups
from .masks import apply_masks
from .model_speedup import shrink
from .result import Changes, changes_of, check_widths, output_difference, width_changes
from .trial import run_trial, trial_copy

__all__ = ["ENGINES", "Job", "Removal", "tried_removal"]

ENGINES = {"nni": "NNI's ModelSpeedup", "groups": "removal of coupled groups"}
"""What removes channels, in the order in which ``"auto"`` tries it."""


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
    """

    engine: str
    changes: Sequence[Changes]
    difference: str | None


def tried_removal(job: Job, engine: str) -> Removal:
    """Try the removal on copies, by one engine or by the first that computes what the masked network computes.

    Args:
        job: what to remove.
        engine: one of :data:`ENGINES`, or ``"auto"``.

    Returns:
        The first removal without a difference. Of our own surgery, or of an engine that was named, also one with a
        difference.

    Raises:
        NNIUnavailableError: if NNI is the engine and cannot be imported.
        RuntimeError: if the masked network does not run, or every engine fails; gives the reason of each.
    """
    before = run_trial(job.masked(), job.inputs)
    reasons: dict[str, str] = {}
    for name in ENGINES if engine == "auto" else (engine,):
        try:
            removal = (_by_nni if name == "nni" else _by_groups)(job, before)
        except RuntimeError as error:
            if isinstance(error, NNIUnavailableError) and engine == "nni":
                raise
            reasons[name], cause = str(error), error
        else:
            if removal.difference is None or name == engine or name == "groups":
                return removal
            reasons[name], cause = removal.difference, None
        LOGGER.info("%s does not do: %s", ENGINES[name], reasons[name])
    remedy = 'Remedy: engine="auto", which also tries the removal of coupled groups. ' if engine == "nni" else ""
    said = reasons[engine] if len(reasons) == 1 else ". ".join(f"{ENGINES[n]}: {why}" for n, why in reasons.items())
    raise RuntimeError(f"{said}. {remedy}The model is unchanged.") from cause


def _by_nni(job: Job, before: list[Tensor]) -> Removal:
    trial = job.masked()
    try:
        replaced = shrink(trial, job.inputs, job.masks, job.compat_shim)
    except NNIUnavailableError:
        raise
    except RuntimeError as error:
        found = [c.reason(name) for name, module in job.model.named_modules() for c in computed_tensors(module)]
        if not found:
            raise
        raise RuntimeError(f"{error}. NNI knows parameters only: {'; '.join(found)}") from error
    check_widths(trial, job.masks)
    difference = output_difference(before, run_trial(trial, job.inputs))
    return Removal("nni", changes_of(job.model, trial, replaced), difference)


def _by_groups(job: Job, before: list[Tensor]) -> Removal:
    trial = trial_copy(job.model)
    remove_groups(trial, job.inputs, job.masks)
    changes = width_changes(job.model, trial)
    check_widths(trial, job.masks)
    return Removal("groups", changes, output_difference(before, run_trial(trial, job.inputs)))
