"""A long training in pieces gives what it gives in one go, whenever it is interrupted."""

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tasks
from benchmarks.experiment import find
from benchmarks.long_training import Shallower, Start, WhileTraining, trained
from helpers.states import same_state, state
from tp_importance import count_ops

FACTORS = {"reg": 1e-3, "s": 1.0, "a": 0.0, "scalar_lr": 0.1}
RUN = SimpleNamespace(device="cpu", data_root=None, npz=None, n_test=200)


def network(kind, arm, folder, pieces_per_call, distil):
    """Calls until it is done, each of so many pieces."""
    task = tasks.task("digits", RUN)
    for _ in range(10):
        options = FACTORS if kind is Shallower else {}
        start = kind(task, folder, arm, 0.6, 0, task.fresh, **options)
        left = itertools.count(pieces_per_call, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # short trainings, untrained factors
            model = trained(start, 4, 64, seed=0, distil=distil, going=lambda left=left: next(left) > 0, lr=0.01)
        if model is not None:
            return task, model
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    ("kind", "arm", "distil"),
    [(Start, "L1", True), (WhileTraining, "PSAP, while training", False), (Shallower, "layers, L1", False)],
)
def test_in_pieces_as_in_one_go(kind, arm, distil, tmp_path):
    torch.set_num_threads(1)
    task, whole = network(kind, arm, tmp_path / "whole", 9, distil)
    _, pieces = network(kind, arm, tmp_path / "pieces", 1, distil)
    assert same_state(pieces, state(whole))
    assert count_ops(whole, task.inputs)[0] <= 0.6 * count_ops(task.model, task.inputs)[0]


def test_a_call_whose_time_is_up_leaves_the_cell_to_the_next(tmp_path, capsys):
    out, small = tmp_path / "long.jsonl", ["--smoke", "--out", str(tmp_path / "long.jsonl"), "--arms", "L1"]
    small += ["--distils", "0", "--work", str(tmp_path)]
    with pytest.raises(SystemExit, match="there are no results"):
        find("long").main([*small, "--minutes", "0"])
    assert "time is up; the next call goes on" in capsys.readouterr().out and not out.exists()
    find("long").main([*small, "--minutes", "5"])
    assert "| digits | L1 |" in capsys.readouterr().out
