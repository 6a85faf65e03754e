"""PSAP in other people's trainers: callbacks for PyTorch Lightning and the Hugging Face Trainer.

Neither package is needed to import this module, and neither is installed with this one.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ...checkpoints.checkpoint import checksums_written
from ...core.files import check_archive, written_at_once
from ...pruning.report import PruningReport
from .pruner import PSAPPruner

__all__ = ["huggingface_callback", "lightning_callback"]

When = Literal["end", "frozen"]
STATE_FILE = "psap.pt"


def lightning_callback(pruner: PSAPPruner, *, finish: When = "end", average: Any = None) -> Any:
    """A callback for the ``Trainer`` of PyTorch Lightning; one optimizer step is one step of the schedule.

    The number of steps is ``trainer.estimated_stepping_batches``, accumulation included. The state of the schedule is
    saved in Lightning's checkpoints. ``callback.report`` is the pruning report in the end.

    Args:
        pruner: built on the ``LightningModule`` or on the network inside it, not started.
        finish: remove the masked channels at the end of the training, or as soon as the masks are final.
        average: as for :meth:`PSAPPruner.finish`.

    Raises:
        RuntimeError: if neither ``lightning`` nor ``pytorch_lightning`` can be imported.
        TypeError: if ``pruner`` is no :class:`PSAPPruner`.
        ValueError: for another ``finish``.

    Example:
        >>> pruner = PSAPPruner(module, x, budget=Budget(macs=0.5))  # doctest: +SKIP
        >>> Trainer(max_epochs=30, callbacks=[lightning_callback(pruner)]).fit(module, loader)  # doctest: +SKIP
    """
    base = _imported(("lightning.pytorch", "pytorch_lightning"), "Callback", "lightning")
    return type("PSAPCallback", (_LightningHooks, base), {})(pruner, finish, average)


def huggingface_callback(
    pruner: PSAPPruner, *, finish: When = "end", average: Any = None, resume_from: str | os.PathLike[str] | None = None
) -> Any:
    """A callback for the ``Trainer`` of Hugging Face ``transformers``.

    The number of steps is ``state.max_steps``. With every checkpoint the state of the schedule is written beside it, as
    ``psap.pt``. ``callback.report`` is the pruning report in the end.

    Args:
        pruner: built on the model that is trained, not started.
        finish: remove the masked channels at the end of the training, or as soon as the masks are final.
        average: as for :meth:`PSAPPruner.finish`.
        resume_from: the checkpoint folder that ``trainer.train(resume_from_checkpoint=...)`` is given.

    Raises:
        RuntimeError: if ``transformers`` cannot be imported.
        TypeError: if ``pruner`` is no :class:`PSAPPruner`.
        ValueError: for another ``finish``, or a checkpoint without ``psap.pt`` or with a damaged one.

    Example:
        >>> pruner = PSAPPruner(model, inputs, budget=Budget(macs=0.5))  # doctest: +SKIP
        >>> Trainer(model, args, callbacks=[huggingface_callback(pruner)], ...).train()  # doctest: +SKIP
    """
    base = _imported(("transformers",), "TrainerCallback", "transformers")
    callback = type("PSAPCallback", (_HuggingFaceHooks, base), {})(pruner, finish, average)
    if resume_from is not None:
        path = Path(resume_from) / STATE_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint was not written with this callback")
        try:
            with open(path, "rb") as file:
                check_archive(file)
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}); it may be damaged: resume from another "
                "checkpoint"
            ) from error
        pruner.load_state_dict(state)
    return callback


class _Hooks:
    """What both trainers share."""

    def __init__(self, pruner: PSAPPruner, finish: When, average: Any) -> None:
        super().__init__()
        if not isinstance(pruner, PSAPPruner):
            raise TypeError(f"pruner must be a PSAPPruner, not {type(pruner).__name__}")
        if finish not in ("end", "frozen"):
            raise ValueError(f"finish={finish!r} must be 'end' or 'frozen'")
        self.pruner = pruner
        self.report: PruningReport | None = None
        self._finish, self._average = finish, average

    def _step(self) -> None:
        if self.report is None:
            self.pruner.step()
            if self._finish == "frozen" and self.pruner.frozen:
                self.report = self.pruner.finish(average=self._average)

    def _end(self) -> None:
        if self.report is None:
            if not self.pruner.frozen:
                warnings.warn(
                    f"the training ended early ({self.pruner.progress}); the rest is pruned at once", stacklevel=3
                )
            self.report = self.pruner.finish(average=self._average, at_once=True)


class _LightningHooks(_Hooks):
    _steps_seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        if not 1 <= total < float("inf"):  # infinite with neither max_steps nor max_epochs
            raise ValueError(f"the Trainer expects {total} optimizer steps; give it max_epochs or max_steps")
        self._steps_seen = trainer.global_step
        self.pruner.start(_optimizers(trainer.optimizers), total_steps=int(total))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step > self._steps_seen:  # else gradients are accumulated
            self._steps_seen = trainer.global_step
            self._step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.report is not None else {"psap": self.pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "psap" not in state_dict:
            raise ValueError("the checkpoint was written after the channels were removed; load it with load_pruned()")
        self.pruner.load_state_dict(state_dict["psap"])


class _HuggingFaceHooks(_Hooks):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruner.start(_optimizers([kwargs["optimizer"]]), total_steps=int(state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.report is None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            with written_at_once(folder / STATE_FILE) as file, checksums_written():
                torch.save(self.pruner.state_dict(), file)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()


def _optimizers(found: Sequence[Any]) -> list[Any]:
    """The torch optimizers inside what trainers wrap around them."""
    return [inner if isinstance(inner := getattr(o, "optimizer", o), torch.optim.Optimizer) else o for o in found]


def _imported(modules: Sequence[str], name: str, package: str) -> Any:
    reasons = []
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:  # a broken installation raises whatever it likes
            reasons.append(f"{module}: {type(error).__name__}: {error}")
    raise RuntimeError(f"this callback needs {package} ({'; '.join(reasons)}); pip install {package}")
