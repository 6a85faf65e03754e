"""NNI 3.0's concrete tracer, which does not run on torch >= 2.2 or Python >= 3.11, repaired for a while."""

from __future__ import annotations

import dis
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .._compat import INSTALL_HINT, SUPPORTED_NNI, import_nni

__all__ = ["legacy_tracer_shim"]


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
