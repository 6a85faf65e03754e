"""The only place that imports NNI, and the only place that patches it.

NNI 3.0 (October 2023) is the last release. Importing it can fail because of packages the user never asked for: its
optional imports catch nothing but ``ImportError``, so a torchvision or lightning that is installed yet broken takes
every ``nni.compression`` import down with it. And its concrete tracer does not run on torch >= 2.2 or Python >= 3.11.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

__all__ = [
    "SUPPORTED_NNI",
    "NNIUnavailableError",
    "import_nni",
    "legacy_tracer_shim",
    "patient_launcher",
    "report_resumed_trials",
    "report_tuner_errors",
]

SUPPORTED_NNI = "3.0"
INSTALL_HINT = 'pip install "tp-importance[nni]"'


class NNIUnavailableError(ImportError, RuntimeError):
    """NNI cannot be imported; the message carries the original reason and the command that installs it."""


def import_nni(name: str = "nni") -> ModuleType:
    """Import NNI or one of its modules; on failure say why and what to install.

    Args:
        name: dotted module name, ``"nni"`` or below it, e.g. ``"nni.compression.speedup"``.

    Returns:
        The imported module.

    Raises:
        NNIUnavailableError: The import failed, for whatever reason (also an ``ImportError`` and a ``RuntimeError``).

    Example:
        >>> import_nni("nni.compression.utils").Scaling.__name__  # doctest: +SKIP
        'Scaling'
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old torch interfaces, on every first import
            return importlib.import_module(name)
    except Exception as error:  # a broken optional dependency of NNI raises whatever it likes
        raise NNIUnavailableError(
            f"cannot import {name!r}, reason: {type(error).__name__}: {error}. The NNI adapters need NNI "
            f"{SUPPORTED_NNI} and its pins: {INSTALL_HINT}. If it is installed, repair or remove the package named in "
            "the reason."
        ) from error


def _require_supported_nni() -> None:
    version = getattr(import_nni(), "__version__", "unknown")
    if version != SUPPORTED_NNI:
        raise RuntimeError(
            f"legacy_tracer_shim() repairs the tracer of NNI {SUPPORTED_NNI} only, found NNI {version} "
            f"(torch {torch.__version__}, Python {sys.version.split()[0]}). Install it with {INSTALL_HINT}, "
            "or use the default symbolic tracing (compat_shim=False)."
        )


def _instructions(code: Any) -> list[dis.Instruction]:
    """Instructions of ``code`` such that ``[f_lasti // 2]`` is the current one, inline caches included."""
    return list(dis.get_instructions(code, show_caches=True))


def _repaired_trace(tracer_module: ModuleType) -> Any:
    """``ConcreteTracer.trace``, recompiled to know the tensor base class under its name since torch 2.2."""
    old, new = "startswith('_TensorBase')", "startswith(('_TensorBase', 'TensorBase'))"
    source = textwrap.dedent(inspect.getsource(tracer_module.ConcreteTracer.trace))
    if source.count(old) != 1:
        raise RuntimeError(
            f"the installed NNI calls itself {SUPPORTED_NNI}, but its ConcreteTracer.trace is not the released one "
            f"({source.count(old)} places test for '_TensorBase', 1 expected). Reinstall it: {INSTALL_HINT}."
        )
    scope: dict[str, Any] = {}
    exec(compile(source.replace(old, new), tracer_module.__file__ or "<nni>", "exec"), tracer_module.__dict__, scope)
    return scope["trace"]


@contextmanager
def _class_attributes_kept(*classes: type) -> Iterator[None]:
    """Undo on exit every attribute added to, changed on or removed from ``classes``."""
    before = {cls: dict(vars(cls)) for cls in classes}
    try:
        yield
    finally:
        for cls, saved in before.items():
            now = dict(vars(cls))
            for name in now.keys() - saved.keys():
                delattr(cls, name)
            for name, value in saved.items():
                if now.get(name) is not value:
                    setattr(cls, name, value)


@contextmanager
def legacy_tracer_shim() -> Iterator[None]:
    """Make NNI 3.0's concrete tracer run on torch >= 2.2 and Python >= 3.11, inside the ``with`` block only.

    Three repairs: the tracer tests qualified names for ``_TensorBase``, now ``TensorBase``; its replacement for
    ``torch.fx.Node.is_impure`` lacks today's second argument; it finds the calling instruction at ``f_lasti // 2``
    while ``dis`` hides inline caches, and does not know the conditional jumps of Python 3.11. On exit the patches are
    gone, and so is what a trace leaves behind by itself (573 attributes on ``torch.Tensor``, a replaced
    ``torch.nn.Module.__getattribute__``, ``torch.autograd.Function`` without its ``apply``). Not thread-safe.

    Yields:
        Nothing.

    Raises:
        NNIUnavailableError: NNI cannot be imported.
        RuntimeError: The installed NNI is not version 3.0.

    Example:
        >>> with legacy_tracer_shim():  # doctest: +SKIP
        ...     graph_module = concrete_trace(model, (x,))

    Source: ``nni/common/concrete_trace_utils/{concrete_tracer,concrete_proxy}.py`` of NNI 3.0.
    """
    _require_supported_nni()
    tracer: Any = import_nni("nni.common.concrete_trace_utils.concrete_tracer")
    proxy: Any = import_nni("nni.common.concrete_trace_utils.concrete_proxy")
    is_impure = tracer.node_is_impure_wrapper
    conditional_jumps = tuple(code for name, code in dis.opmap.items() if "JUMP" in name and "IF" in name)
    patches: list[tuple[Any, str, Any]] = [
        (tracer.ConcreteTracer, "trace", _repaired_trace(tracer)),
        (tracer, "node_is_impure_wrapper", lambda node, *_: is_impure(node)),
        (proxy, "dis", SimpleNamespace(get_instructions=_instructions, Instruction=dis.Instruction)),
        (proxy.ConcreteProxy, "jump_opcodes", conditional_jumps),
    ]
    saved = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    with _class_attributes_kept(torch.Tensor, torch.nn.Module, torch.autograd.Function):
        try:
            for owner, name, value in patches:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in saved:
                setattr(owner, name, value)


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
