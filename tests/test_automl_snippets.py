"""The snippets about searches in README.md and docs/automl.md, run as they are printed, though with fewer trials."""

import re
import sys
from pathlib import Path

import pytest
import torch

from networks import NUM_CLASSES, residual
from tp_importance import Budget, count_ops

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def snippet(document, word):
    """The one Python block of a document with that word."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return found


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippets expect to be there; files go to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % NUM_CLASSES
    model = residual().eval()

    def accuracy(net):
        with torch.no_grad():
            return float((net(x).argmax(1) == labels).float().mean())

    return {"model": model, "x": x[:2], "loader": [(x, labels)], "accuracy": accuracy}


def test_readme_optuna(names):
    pytest.importorskip("optuna")
    printed = snippet("README.md", "optuna_objective")
    assert "n_trials=40" in printed
    exec(printed.replace("n_trials=40", "n_trials=12"), names)
    study, dense = names["study"], count_ops(names["model"], names["x"])[0]
    assert len(study.trials) == 12 and study.best_trials
    assert all(trial.state.name == "COMPLETE" and trial.values[1] <= 0.8 * dense for trial in study.trials)
    assert list(Path("statistics").glob("*.npz"))


def test_docs_trial(names):
    from tp_importance.automl import prune_trial

    found = eval(
        snippet("docs/automl.md", "prune_trial(model, params").strip(),
        {
            **names,
            "prune_trial": prune_trial,
            "Budget": Budget,
            "params": {"method": "catro"},
        },
    )
    assert set(found) == {"default", "macs", "params", "latency"}


def test_docs_nni(names, monkeypatch):
    nni_experiment = pytest.importorskip("nni.experiment")
    import nni_plugins
    from tp_importance.automl import BudgetProblem

    monkeypatch.setenv("NNI_CONFIG_DIR", str(Path("config").resolve()))
    experiment = nni_experiment.Experiment("local")
    Path("trial.py").write_text("import nni\nnni.report_final_result(float(nni.get_next_parameter()['width:0.0']))\n")
    experiment.config.experiment_working_directory = Path("experiments").resolve()
    experiment.config.trial_code_directory = Path.cwd()
    experiment.config.trial_command = f"{sys.executable} trial.py"
    experiment.config.trial_concurrency = 2
    experiment.config.max_trial_number = 2
    names |= vars(nni_plugins) | {
        "experiment": experiment,
        "BudgetProblem": BudgetProblem,
        "Budget": Budget,
        "Path": Path,
    }
    try:
        exec(snippet("docs/automl.md", "register_tuner"), names)
    finally:
        nni_plugins.unregister_tuner()
    assert [row["status"] for row in names["rows"]] == ["SUCCEEDED", "SUCCEEDED"]
