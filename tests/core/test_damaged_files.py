"""Files besides checkpoints: damaged, changed or malformed ones are refused by name, never believed."""

import json
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

from tp_importance import Budget
from tp_importance.allocation.curves import Curve
from tp_importance.automl import BudgetProblem
from tp_importance.automl.statistics import CurveStore, Valuation
from tp_importance.core.files import json_digest, read_json, write_json
from tp_importance.graph.counting import Call
from tp_importance.graph.discovery import prunable_groups
from tp_importance.latency.table import LatencyTable, conditions_of, timed_layer

X = torch.randn(1, 3, 9, 9)


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))


def latency_table(folder):
    path, layer = folder / "table.json", nn.Linear(8, 2)
    clock = iter(np.random.default_rng(0).random(1000))
    table = LatencyTable(path, measure=lambda *_, **__: types.SimpleNamespace(median_ms=next(clock)))
    table.use(conditions_of(layer, torch.zeros(1, 8))).grid(timed_layer(layer, Call("fc", (4, 8), (4, 2), 64)))
    table.save()

    def read():
        """Conditions that differ are refused by ``use``."""
        found = LatencyTable(path)
        try:
            found.use(table.conditions)
        except ValueError as error:
            raise ValueError(f"{error}, delete it") from error
        return found._steps, found._ms

    return path, read


def search_problem(folder):
    path = folder / "problem.json"
    BudgetProblem.prepare(network(), X, budget=Budget(macs=0.5), methods=["magnitude"]).save(path)

    def read():
        problem = BudgetProblem.load(path)
        arrays = [np.asarray(v).tolist() for k, v in vars(problem.cost).items() if k != "latency"]
        levels = [v.tolist() for v in problem.space.levels]
        return arrays, levels, problem.limits, problem.losses, {k: v.tolist() for k, v in problem.starts.items()}

    return path, read


def verdict(folder):
    """Which groups must be left alone."""
    model = network()
    groups, store = prunable_groups(model, X, verify=False), CurveStore(folder, model)
    store.verify(groups, X)
    (path,) = folder.glob("verified-*.json")
    content = read_json(path)
    write_json(path, {**content, "reasons": {groups.names[0]: "unsafe"}})
    return path, lambda: store.verify(groups, X)


def curves(folder):
    made = {str(i): Curve(np.arange(9.0)[::-1], np.random.default_rng(i).permutation(8)) for i in range(3)}
    store = CurveStore(folder, nn.Linear(2, 2))

    def read():
        found = store.get("catro", {}, lambda: Valuation(made, {"0": 1.5}, 2.0))
        return {n: (c.loss.tolist(), c.order.tolist()) for n, c in found.values.items()}, found.weights, found.seconds

    read()
    return store.path("catro", {}), read


KINDS = pytest.mark.parametrize("kind", [latency_table, search_problem, verdict, curves])


@KINDS
def test_flipped_bits_read_right_or_not_at_all(kind, tmp_path):
    path, read = kind(tmp_path)
    whole, expected = path.read_bytes(), read()
    random.seed(0)
    refused = 0
    for _ in range(150):
        at = random.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            assert read() == expected
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and ("delete it" in str(error) or "prepare(" in str(error))
    for length in (0, 1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            read()
    assert refused > 60
    path.write_bytes(whole)
    assert read() == expected


@pytest.mark.parametrize("kind", [latency_table, search_problem, verdict])
def test_entries_that_are_missing_or_wrong(kind, tmp_path):
    """By a hand that computes the digest again."""
    path, read = kind(tmp_path)
    content = json.loads(path.read_text())
    del content["sha256"]
    for key in content:
        for wrong in (KeyError, None, 3, "x", [1], {"a": None}):
            changed = {k: v for k, v in content.items() if k != key or wrong is not KeyError}
            if wrong is not KeyError:
                changed[key] = wrong
            sealed = [changed.get("stairs"), changed.get("ms")] if kind is latency_table else changed
            path.write_text(json.dumps({**changed, "sha256": json_digest(sealed)}))
            with pytest.raises(ValueError, match=path.name):
                read()


def test_a_time_changed_by_hand(tmp_path):
    path, read = latency_table(tmp_path)
    content = json.loads(path.read_text())
    key = next(iter(content["ms"]))
    content["ms"][key] = dict.fromkeys(content["ms"][key], 1.0)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"table.json is damaged.*delete it to measure again"):
        read()


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b'{"a": 1}', b'{"a": 1, "sha256": null}', b"3"])
def test_other_json(tmp_path, text):
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "x")
