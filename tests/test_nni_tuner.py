"""The tuner inside NNI: its shell, its registration, and a real experiment that ends."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import nni
import pytest
import torch
from nni.tools.package_utils import create_builtin_class_instance, get_algo_meta
from nni.tools.package_utils.tuner_factory import create_validator_instance

import nni_plugins
from networks import residual
from nni_plugins import BudgetTuner, BudgetTunerValidator, register_tuner, registered_tuner, unregister_tuner
from tp_importance import Budget
from tp_importance.automl import BudgetProblem
from tp_importance.errors import SearchSpaceError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def problem(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    methods = ["magnitude", "fpgm"]
    made = BudgetProblem.prepare(residual().eval(), x, budget=Budget(macs=0.5), methods=methods)
    made.save(tmp_path / "problem.json")
    return made


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


def test_tuner_learns_from_results_failures_and_earlier_runs(problem, tmp_path):
    tuner = BudgetTuner(str(tmp_path / "problem.json"), optimize_mode="minimize")
    tuner.update_search_space(problem.search_space().to_nni())
    for i in range(12):
        params = tuner.generate_parameters(i)
        assert problem.fits(problem.units(params))
        if i != 5:
            tuner.receive_trial_result(i, params, {"default": float(params["width:0.0"]), "macs": 1.0})
        tuner.trial_end(i, success=i != 5)
    assert [v for _, v in tuner.search.history].count(None) == 1
    assert -tuner.search.best[1] == min(p["width:0.0"] for p, v in tuner.search.history if v is not None)
    later = BudgetTuner(str(tmp_path / "problem.json"), optimize_mode="minimize")
    later.import_data([{"parameter": p, "value": {"default": -v}} for p, v in tuner.search.history if v is not None])
    assert later.search.best == tuner.search.best
    assert later.generate_parameters(0) not in [p for p, v in tuner.search.history if v is not None]


def test_tuner_ends_when_nothing_is_left(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
    BudgetProblem.prepare(net, torch.randn(1, 3, 9, 9), budget=Budget(macs=0.5), methods=["magnitude"]).save(
        tmp_path / "p"
    )
    tuner = BudgetTuner(str(tmp_path / "p"))
    assert len(tuner.generate_multiple_parameters([0, 1, 2])) == 1
    with pytest.raises(nni.NoMoreTrialError):
        tuner.generate_parameters(3)


def test_wrong_search_spaces_and_arguments(problem, tmp_path):
    path = str(tmp_path / "problem.json")
    tuner = BudgetTuner(path)
    for wrong in ({}, {"lr": {"_type": "uniform", "_value": [0, 1]}}, None):
        with pytest.raises(SearchSpaceError, match=r"problem.search_space\(\).to_nni\(\)"):
            tuner.update_search_space(wrong)
    check = BudgetTunerValidator().validate_class_args
    check(problem=path, sigma=0.3, seed=2)
    for wrong in ({}, {"problem": path, "step": 1}, {"problem": path, "sigma": -1}, {"problem": "nowhere.json"}):
        with pytest.raises(ValueError):
            check(**wrong)
    with pytest.raises(ValueError, match="optimize_mode"):
        BudgetTuner(path, optimize_mode="max")


def test_registration_in_python_leaves_nothing_behind(problem, tmp_path, config_dir):
    assert get_algo_meta("PruningBudget") is None
    before = {p.name: p.read_text() for p in config_dir.iterdir()}
    with registered_tuner() as name:
        made = create_builtin_class_instance(name, {"problem": str(tmp_path / "problem.json"), "seed": 3}, "tuners")
        assert isinstance(made, BudgetTuner) and made.search.seed == 3
        assert isinstance(create_validator_instance("tuners", name), BudgetTunerValidator)
    assert get_algo_meta(name) is None
    register_tuner("Mine")
    assert get_algo_meta("mine").class_name == "nni_plugins.tuner.BudgetTuner"
    unregister_tuner("Mine")
    unregister_tuner("Mine")
    assert get_algo_meta("Mine") is None
    with pytest.raises(ValueError, match="choose another name"):
        register_tuner("TPE")
    assert {p.name for p in config_dir.iterdir()} == set(before)
    assert (config_dir / "registered_algorithms.yml").read_text().strip() in (
        "{}",
        *(v.strip() for v in before.values()),
    )


def test_nnictl_registers_and_unregisters(config_dir):
    def nnictl(*args):
        command = [sys.executable, "-W", "ignore", "-m", "nni.tools.nnictl.nnictl", "algo", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        return done.stdout + done.stderr

    assert "PruningBudget registered" in nnictl("register", "--meta", str(nni_plugins.ALGORITHMS))
    assert get_algo_meta("PruningBudget").validator_class_name == "nni_plugins.tuner.BudgetTunerValidator"
    assert "unregistered" in nnictl("unregister", "PruningBudget")
    assert get_algo_meta("PruningBudget") is None


def example():
    spec = importlib.util.spec_from_file_location("nni_experiment", ROOT / "examples" / "nni_experiment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def servers():
    import psutil

    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if any("nni_node" in part for part in process.info["cmdline"] or ()):
            found.add(process.pid)
    return found


@pytest.mark.slow
def test_a_real_experiment_survives_a_failing_trial_and_leaves_no_process(tmp_path, config_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    before = servers()
    broken = f"mkdir {tmp_path}/first 2>/dev/null && exit 7; "  # the first trial fails
    rows = example().run(tmp_path, trials=3, macs=0.5, epochs=1, seconds=100, broken=broken)
    assert servers() <= before
    states = [row["status"] for row in rows]
    assert states.count("FAILED") == 1 and states.count("SUCCEEDED") == 2
    assert all("width:0" in row["params"] for row in rows)
    problem = BudgetProblem.load(tmp_path / "problem.json")
    for row in rows:
        if row["status"] == "SUCCEEDED":
            assert 0 < row["metrics"]["default"] <= 100
            assert row["metrics"]["macs"] == problem.macs(problem.units(row["params"])) <= problem.limits["macs"]
