"""A tiny NNI experiment in a process of its own, for tests that kill it: nni_driver.py FOLDER SECONDS [ID to resume].

Every trial takes these SECONDS.

Prints a line of JSON per look: the port and the trials so far; the last one says ``"ended": true``.
"""

import json
import signal
import sys
from functools import partial
from pathlib import Path

from nni.experiment import Experiment

import nni_plugins
from tp_importance.automl import BudgetProblem

TRIAL = """
import pathlib, sys, time, nni
params = nni.get_next_parameter()
if not pathlib.Path("first").exists():  # the first trial fails
    pathlib.Path("first").touch()
    sys.exit("no luck")
time.sleep(float(sys.argv[1]))
nni.report_final_result({"default": float(params["width:0.0"])})
"""


def main(folder: Path, seconds: str, resume: str | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    experiment = Experiment("local" if resume is None else None, resume)
    if resume is None:
        config = experiment.config
        config.experiment_working_directory = folder / "experiments"
        config.trial_code_directory = folder
        config.trial_command = f"{sys.executable} trial.py {seconds}"
        config.trial_concurrency = 2
        config.max_trial_number = 7
        config.search_space = BudgetProblem.load(folder / "problem.json").search_space().to_nni()
        config.tuner.name = "PruningBudget"
        config.tuner.class_args = {"problem": str(folder / "problem.json")}
        (folder / "trial.py").write_text(TRIAL)

    def show(rows: list[dict], ended: bool = False) -> bool:
        line = {"id": experiment.id, "port": experiment.port, "rows": rows, "ended": ended}
        print(json.dumps(line), flush=True)
        return False

    print(json.dumps({"id": experiment.id, "port": None, "rows": [], "ended": False}), flush=True)
    with nni_plugins.registered_tuner():
        run = partial(nni_plugins.run_experiment, experiment, seconds=600, resume=resume is not None, poll=0.5)
        show(run(until=show), ended=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
