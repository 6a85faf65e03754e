"""Export to ONNX, tried in onnxruntime."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core.arguments import checked_model
from ..core.batches import sample_count, tensors_in
from ..core.files import written_at_once
from ..core.forward import fresh_inputs, run_model
from ..core.optional import optional_import
from ..core.progress import phase, shown
from ..core.untouched import untouched
from ..graph.comparison import difference

__all__ = ["export_onnx"]


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float = 1e-3,
    progress: bool | None = None,
) -> None:
    """Write a network in eval mode to an ONNX file that gives what the network gives.

    The file is run in onnxruntime before it appears under its name: on the example inputs and, with a dynamic batch, on
    one sample more. Whatever fails, an old file of that name stays. The network stays as it is.

    Args:
        model: the network, on any device.
        example_inputs: tensor, tuple or dict, batch dimension first; a dynamic batch takes at least two samples.
        path: of the file; weights are inside.
        dynamic_batch: whether the file takes any number of samples.
        opset: version of the operators; default: that of torch.
        tolerance: largest difference of outputs, relative to the largest entry of each.
        progress: show a progress bar; by default in a terminal.

    Raises:
        MissingPackageError: without onnx, onnxscript and onnxruntime (the extra ``onnx``).
        RuntimeError: if torch cannot export the network, onnxruntime cannot run the file, or outputs differ. What the
            network itself raises, on one sample more say, stays what it is.
        TypeError: if the model is none or compiled.
        ValueError: if the example inputs have fewer samples than are needed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> net, path = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), Path(tempfile.mkdtemp(), "net.onnx")
        >>> export_onnx(net, torch.randn(2, 3, 8, 8), path)  # doctest: +SKIP
        >>> path.exists()  # doctest: +SKIP
        True
    """
    checked_model(model)
    runtime = optional_import("onnxruntime")
    for package in ("onnx", "onnxscript"):  # which torch imports
        optional_import(package)
    samples = sample_count(tensors_in(example_inputs))
    if dynamic_batch and (samples is None or samples < 2):
        raise ValueError(
            f"example_inputs have {samples or 'no common number of'} sample(s), but a dynamic batch is recognised from "
            "two on: give two, or dynamic_batch=False"
        )
    with shown(progress), untouched(model), torch.no_grad():
        model.eval()
        tried = [example_inputs, _one_more(example_inputs, samples)] if dynamic_batch else [example_inputs]
        wanted = [_outputs(model, inputs) for inputs in tried]
        with phase("exporting") as running:
            data = _exported(model, example_inputs, dynamic_batch, opset)
            running.note(megabytes=len(data) // 2**20)
        with phase("comparing with onnxruntime", batches=len(tried)):
            try:
                session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
            except Exception as error:
                raise RuntimeError(f"onnxruntime does not take the file: {error}") from error
            for inputs, outputs in zip(tried, wanted, strict=True):
                _compare(session, inputs, outputs, tolerance)
    with written_at_once(path) as file:
        file.write(data)


def _exported(model: nn.Module, example_inputs: Any, dynamic: bool, opset: int | None) -> bytes:
    inputs = fresh_inputs(example_inputs)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = () if kwargs else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    batch = torch.export.Dim("batch")
    shapes = tree_map(lambda x: {0: batch} if isinstance(x, Tensor) and x.dim() else None, kwargs or args)
    target = io.BytesIO()
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs or None,
                dynamo=True,
                dynamic_shapes=shapes if dynamic else None,
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            program.save(target)  # type: ignore[arg-type]  # it takes files, too
    except Exception as error:
        remedy = "; dynamic_batch=False may help, or another formulation of the layer it names" if dynamic else ""
        raise RuntimeError(f"torch cannot export the {type(model).__name__}: {error}{remedy}") from error
    return target.getvalue()


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    try:
        return [t.cpu() for t in tensors_in(run_model(model, inputs))]
    except Exception as error:
        n = sample_count(tensors_in(inputs))
        error.add_note(
            f"raised by the {type(model).__name__} on {n} samples; if it takes one number, dynamic_batch=False"
        )
        raise


def _compare(session: Any, inputs: Any, wanted: list[Tensor], tolerance: float) -> None:
    given = {i.name: t.cpu().numpy() for i, t in zip(session.get_inputs(), tensors_in(inputs), strict=True)}
    try:
        found = [torch.from_numpy(y) for y in session.run(None, given)]
    except Exception as error:
        n = sample_count(tensors_in(inputs))
        raise RuntimeError(
            f"onnxruntime cannot run the file on {n} samples: {error}; if it was written for one number of samples, as "
            "torch does where a network asks for it, give dynamic_batch=False"
        ) from error
    if len(found) != len(wanted):
        raise RuntimeError(f"the file gives {len(found)} outputs, the network {len(wanted)}")
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if reason := difference(a, b, tolerance):
            raise RuntimeError(f"output {i} of the file {reason} in onnxruntime, on {sample_count([a])} samples")


def _one_more(inputs: Any, samples: int | None) -> Any:
    """The same samples, the first one twice."""

    def grown(x: Any) -> Any:
        return torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.dim() and len(x) == samples else x

    return tree_map(grown, inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch says about its own exporter is of no use to anybody here; errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
