"""Statistics collected once and shared by file between the trials of a search, also between processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..allocation.curves import Curve
from ..core.files import read_json, write_json, written_at_once
from ..errors import StaleStatisticsError
from ..graph.groups import PrunableGroups
from ..graph.verify import verify_groups

__all__ = ["CurveStore", "Valuation", "fingerprint"]

FORMAT = "tp_importance.curves.2"


@dataclass(frozen=True, eq=False)
class Valuation:
    """What a method thinks of the groups of a network: all that any budget needs.

    Attributes:
        curves: value curve per group name; also the importance that a
            :class:`~tp_importance.BudgetPruner` takes.
        weights: weights of the convex program per group name, for methods that have some.
        default_allocator: where the widths come from if the search gives none.
        seconds: what it took to collect.
    """

    values: Mapping[str, Curve]
    weights: Mapping[str, float] | None = None
    default_allocator: str = "greedy"
    seconds: float = field(default=0.0, compare=False)

    def curves(self, groups: PrunableGroups | None = None) -> dict[str, Curve]:
        """The curves, checked against the groups of the network as it is now.

        Raises:
            StaleStatisticsError: if a group is not there, or has another number of units.
        """
        for group in groups or ():
            curve = self.values.get(group.name)
            if curve is None or len(curve.order) != group.n_units:
                found = "no curve" if curve is None else f"a curve of {len(curve.order)} units"
                raise StaleStatisticsError(
                    f"the statistics have {found} for group {group.name} of {group.n_units} units; they are of another "
                    "network or were collected with other options: use another folder"
                )
        return dict(self.values)


class CurveStore:
    """A folder in which trials find what others have collected: one file per method and its options, one per verdict.

    Files are JSON, or ``npz`` without pickled objects, written in one step, so any number of processes may share the
    folder. They carry a fingerprint of the network's weights; those of other weights are never used. Which images they
    were collected on, and with which ``loss_fn``, is not known to them: keep one folder per calibration set and loss.

    Args:
        folder: made when needed.
        model: the network as it is before pruning.

    Example:
        >>> import tempfile
        >>> net, folder = nn.Linear(2, 2), tempfile.mkdtemp()
        >>> made = Valuation({"0": Curve(np.array([2.0, 1.0, 0.0]), np.array([1, 0]))})
        >>> for _ in range(2):  # the second time it is read
        ...     found = CurveStore(folder, net).get("catro", {}, lambda: made)
        >>> found is made, found.values["0"].order.tolist()
        (False, [1, 0])
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint(model)

    def path(self, method: str, options: Mapping[str, Any]) -> Path:
        """File for a method with certain options."""
        key = json.dumps([self.fingerprint, method, options], sort_keys=True, default=str)
        return self.folder / f"{method}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"

    def get(self, method: str, options: Mapping[str, Any], collect: Callable[[], Valuation]) -> Valuation:
        """What is stored, or what ``collect()`` gives, which is then stored.

        Args:
            method: name of the method.
            options: whatever the statistics depend on, plain values.
            collect: called if there is no file yet.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.path(method, options)
        if path.exists():
            return _read(path)
        found = collect()
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, found, {"method": method, "options": dict(options), "fingerprint": self.fingerprint})
        return found

    def verify(self, groups: PrunableGroups, example_inputs: Any) -> Mapping[str, str]:
        """The verdict of :mod:`tp_importance.graph.verify`, once for all trials; for ``BudgetPruner(..., verify=...)``.

        The verdict is kept for these weights, these groups, and the shapes that the layers see.

        Args:
            groups: the groups to verify.
            example_inputs: tensor, tuple or dict, batch dimension first.

        Returns:
            Reason per unsafe group.

        Raises:
            ValueError: if the file is damaged.
        """
        digest = hashlib.sha256(self.fingerprint.encode())
        for group in groups:
            for m in group.members:
                digest.update(f"{group.name} {group.unit_size} {m.name} {m.role} {m.kind}".encode())
                digest.update(m.channels.tobytes() + m.units.tobytes())
        for call in groups.trace.calls:
            digest.update(f"{call.name} {call.in_shape} {call.out_shape}".encode())
        path = self.folder / f"verified-{digest.hexdigest()[:16]}.json"
        if path.exists():
            try:
                known = read_json(path).get("reasons")
                if not isinstance(known, dict) or not all(isinstance(reason, str) for reason in known.values()):
                    raise ValueError("it has no reason per group")
                return known
            except ValueError as error:
                raise _damaged(path, error) from error
        reasons = verify_groups(groups, example_inputs)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"reasons": dict(reasons)})
        return reasons


def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes and values of all parameters and buffers.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = fingerprint(net)
        >>> _ = nn.init.zeros_(net.weight)
        >>> fingerprint(net) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(path: Path, found: Valuation, header: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {}
    for i, curve in enumerate(found.values.values()):
        arrays |= {f"loss{i}": curve.loss, f"order{i}": curve.order, f"constant{i}": curve.constant}
        if len(curve.kept):  # sets that are not nested, one after the other
            widths = sorted(curve.kept)
            arrays |= {f"kept{i}": np.concatenate([curve.kept[w] for w in widths]), f"widths{i}": np.array(widths)}
    weights = None if found.weights is None else dict(found.weights)
    text = {**header, "format": FORMAT, "groups": list(found.values), "weights": weights, "seconds": found.seconds}
    text["allocator"] = found.default_allocator
    with written_at_once(path) as file:
        np.savez_compressed(file, header=np.array(json.dumps(text, default=str)), **arrays)


def _read(path: Path) -> Valuation:
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            if header.get("format") != FORMAT:
                raise ValueError("it is no file of this version of the package")
            values = {name: _curve(file, i) for i, name in enumerate(header["groups"])}
            return Valuation(values, header["weights"], header["allocator"], header["seconds"])
    except Exception as error:
        raise _damaged(path, error) from error


def _curve(file: Any, i: int) -> Curve:
    kept: dict[int, Any] = {}
    if f"kept{i}" in file:
        widths = file[f"widths{i}"].tolist()
        kept = dict(zip(widths, np.split(file[f"kept{i}"], np.cumsum(widths)[:-1]), strict=True))
    return Curve(file[f"loss{i}"], file[f"order{i}"], kept, file[f"constant{i}"])


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); delete it")
