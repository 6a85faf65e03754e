"""Repairs of NNI 3.0's launcher and of its tuner process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._compat import import_nni

__all__ = ["patient_launcher", "report_resumed_trials", "report_tuner_errors"]


@contextmanager
def patient_launcher(seconds: int = 60) -> Iterator[None]:
    """Let NNI wait longer for its server than three tries, inside the ``with`` block only: a busy machine needs it.

    Args:
        seconds: about how long.

    Yields:
        Nothing.
    """
    launcher: Any = import_nni("nni.experiment.launcher")
    check = launcher._check_rest_server
    launcher._check_rest_server = lambda port, url_prefix=None: check(port, retry=seconds, url_prefix=url_prefix)
    try:
        yield
    finally:
        launcher._check_rest_server = check


def report_resumed_trials(tuner: Any) -> None:
    """Let a tuner hear of the trials that NNI runs again when an experiment is resumed; changes NNI for good.

    NNI 3.0 tells it their results, but neither that they run nor that they failed. It also numbers new parameters from
    the last of these trials on, so that a number may belong to two trials.

    Args:
        tuner: in NNI's tuner process; with ``next_parameter_id``, ``resume_trials(running)`` and ``trial_end``.

    Source: ``nni/runtime/msg_dispatcher.py`` and ``nni/recoverable.py`` of NNI 3.0.
    """
    module: Any = import_nni("nni.runtime.msg_dispatcher")
    add, end = module.MsgDispatcher.handle_add_customized_trial, module.MsgDispatcher.handle_trial_end

    def handle_add_customized_trial(self: Any, data: Any) -> None:
        add(self, data)
        module._next_parameter_id = max(module._next_parameter_id, tuner.next_parameter_id)
        tuner.resume_trials(self.recovered_trial_params)

    def handle_trial_end(self: Any, data: Any) -> None:
        number = import_nni().load(data["hyper_params"])["parameter_id"]
        if number in self.recovered_trial_params:
            tuner.trial_end(number, data["event"] == "SUCCEEDED")
        else:
            end(self, data)

    module.MsgDispatcher.handle_add_customized_trial = handle_add_customized_trial
    module.MsgDispatcher.handle_trial_end = handle_trial_end


def report_tuner_errors() -> None:
    """Let an error of the tuner end the experiment; changes NNI for good, so only for NNI's tuner process.

    NNI 3.0 writes it to a log, and the thread that hears of new commands waits for one more: after a wrong search
    space for ever.

    Source: ``nni/runtime/msg_dispatcher_base.py`` of NNI 3.0.
    """
    base: Any = import_nni("nni.runtime.msg_dispatcher_base").MsgDispatcherBase
    process = base.process_command

    def process_command(self: Any, command: Any, data: Any) -> None:
        try:
            process(self, command, data)
        except Exception as error:
            self.report_error(f"{type(error).__name__}: {error}")
            raise

    base.process_command = process_command
