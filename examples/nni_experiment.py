"""A real NNI experiment that prunes: local trials, two at a time, and a tuner that never leaves the budget.

    python examples/nni_experiment.py            # 12 trials, a table, and outputs/nni_experiment.csv

The digits network of examples/quickstart.py is trained once; the statistics of four methods are collected once and
shared by file. Every trial is a process of its own. The web page is at the address that is printed, on this machine
only, while the experiment runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))
import quickstart

import nni_plugins
from nni_plugins._compat import import_nni
from tp_importance import Budget
from tp_importance.automl import BudgetProblem, prune_trial

METHODS = ["catro", "itpruner", "psap", "magnitude"]


def trial(folder: Path, macs: float) -> None:
    """What NNI starts: one network, pruned and tested."""
    torch.set_num_threads(1)
    _, calibration, test = quickstart.digits(0)
    model = quickstart.build()
    model.load_state_dict(torch.load(folder / "dense.pt", weights_only=True))
    nni_plugins.nni_trial(
        partial(
            prune_trial,
            model,
            example_inputs=calibration[0][0][:2],
            loader=calibration,
            evaluate=partial(quickstart.accuracy, loader=test),
            budget=Budget(macs=macs),
            statistics=folder / "statistics",
            latency_seconds=0.05,
        )
    )


def prepare(folder: Path, macs: float, epochs: int) -> BudgetProblem:
    """Train the network and write what all trials and the tuner need."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    training, calibration, _ = quickstart.digits(0)
    model = quickstart.build()
    quickstart.train(model, training, epochs, 0.05, 0)
    torch.save(model.state_dict(), folder / "dense.pt")
    problem = BudgetProblem.prepare(
        model,
        calibration[0][0][:2],
        calibration,
        budget=Budget(macs=macs),
        methods=METHODS,
        statistics=folder / "statistics",
    )
    problem.save(folder / "problem.json")
    return problem


def run(folder: Path, trials: int, macs: float, epochs: int, seconds: float, broken: str = "") -> list[dict[str, Any]]:
    """Prepare, run the experiment to its end, stop it; one row per trial. ``broken``: a shell prefix, for tests."""
    problem = prepare(folder, macs, epochs)
    with nni_plugins.registered_tuner() as name:
        experiment = import_nni("nni.experiment").Experiment("local")
        config = experiment.config
        config.experiment_working_directory = folder / "experiments"
        config.trial_code_directory = Path(__file__).parent
        config.trial_command = f"{broken}{sys.executable} nni_experiment.py --trial {folder} --macs {macs}"
        config.trial_concurrency = 2
        config.max_trial_number = trials
        config.search_space = problem.search_space().to_nni()
        config.tuner.name = name
        config.tuner.class_args = {"problem": str(folder / "problem.json"), "seed": 0}
        config.training_service.use_active_gpu = False
        return nni_plugins.run_experiment(experiment, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--macs", type=float, default=0.3, help="fraction of the MACs to keep (default 0.3)")
    parser.add_argument("--epochs", type=int, default=10, help="training epochs of the dense network (default 10)")
    parser.add_argument("--seconds", type=float, default=900, help="longest time for the experiment (default 900)")
    parser.add_argument("--out", type=Path, default=Path("outputs/nni_experiment.csv"))
    parser.add_argument("--trial", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial is not None:
        trial(args.trial, args.macs)
        return
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), args.trials, args.macs, args.epochs, args.seconds)
    keys = ("sequence", "status", "seconds")
    table = pd.DataFrame([{**{k: row[k] for k in keys}, **row["params"], **row["metrics"]} for row in rows])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)
    print(table.rename(columns=lambda name: name.removeprefix("width:")).to_string(index=False))
    done = table[table.status == "SUCCEEDED"]
    print(f"\n{len(done)} of {len(table)} trials succeeded; best {done.default.max():.1f} %\ntable: {args.out}")


if __name__ == "__main__":
    main()
