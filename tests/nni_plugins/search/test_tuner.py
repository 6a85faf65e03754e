"""The tuner inside NNI: its shell, its registration, and a real experiment that ends."""

import importlib.util
import os
import sys

import nni
import pytest
import torch
from nni.experiment import Experiment
from nni.experiment.config import CustomAlgorithmConfig
from nni.runtime import msg_dispatcher
from nni.tools.nnictl.config_utils import Experiments
from nni.tools.package_utils import create_builtin_class_instance, get_algo_meta
from nni.tools.package_utils.tuner_factory import create_validator_instance

import nni_plugins
from helpers.paths import ROOT
from nni_plugins import BudgetTuner, BudgetTunerValidator, register_tuner, registered_tuner, unregister_tuner
from tp_importance import Budget
from tp_importance.automl import BudgetProblem
from tp_importance.errors import SearchSpaceError
from tp_importance.testing.networks import residual


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
    """Nothing of the user's is touched: neither the registered algorithms nor the list of experiments."""
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Experiments.__init__, "__defaults__", (str(tmp_path / "nni-experiments"),))
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


def test_tuner_resumes_with_failures_and_with_what_runs_again(problem, tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path))
    for name in ("handle_add_customized_trial", "handle_trial_end"):
        monkeypatch.setattr(msg_dispatcher.MsgDispatcher, name, getattr(msg_dispatcher.MsgDispatcher, name))
    monkeypatch.setattr(msg_dispatcher, "_next_parameter_id", 0)
    first = BudgetTuner(str(tmp_path / "problem.json"))
    params = [first.generate_parameters(i) for i in range(5)]
    first.trial_end(1, success=False)
    first.receive_trial_result(4, params[4], 0.5)
    first.trial_end(4, success=True)
    first.trial_end(3, success=True)  # its result comes later
    assert [value for _, value in first.search.history] == [None, 0.5]

    second = BudgetTuner(str(tmp_path / "problem.json"))
    dispatcher = msg_dispatcher.MsgDispatcher("ws://_unittest_", second)
    dispatcher.load_checkpoint()
    dispatcher.handle_import_data([{"parameter": params[4], "value": "0.5"}])
    again = [{"parameter_id": i, "parameter_source": "resumed", "parameters": params[i]} for i in (0, 2)]
    dispatcher.handle_add_customized_trial(again)
    assert [value for _, value in second.search.history] == [None, 0.5]
    assert msg_dispatcher._next_parameter_id == 5  # NNI alone would say 3, the number of another trial
    metric = {"parameter_id": 0, "type": "FINAL", "value": "0.25", "trial_job_id": "a"}
    dispatcher.handle_report_metric_data(metric)
    for i, event in ((0, "SUCCEEDED"), (2, "FAILED")):
        dispatcher.handle_trial_end({"trial_job_id": "a", "event": event, "hyper_params": nni.dump(again[i // 2])})
    assert second.search.history[2:] == [(params[0], 0.25), (params[2], None)]
    known = [params[i] for i in (0, 1, 2, 4)]
    assert all(second.generate_parameters(5 + i) not in known for i in range(8))


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"next_parameter_id": 3, "failed": []}', None])
def test_a_damaged_checkpoint_is_named(problem, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path))
    monkeypatch.setattr("nni_plugins.search.tuner.report_resumed_trials", lambda tuner: None)
    tuner = BudgetTuner(str(tmp_path / "problem.json"))
    tuner.generate_parameters(0)
    path = tmp_path / "pruning_budget.json"
    tuner.load_checkpoint()
    assert tuner.next_parameter_id == 1
    other = path.read_bytes().replace(b'"next_parameter_id": 1', b'"next_parameter_id": 9')
    path.write_bytes(other if damage is None else damage)
    with pytest.raises(ValueError, match=r"pruning_budget.json cannot be read .*delete it to resume"):
        BudgetTuner(str(tmp_path / "problem.json")).load_checkpoint()


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


def test_a_failing_trial_carries_its_parameters(monkeypatch):
    params = {"method": {"_name": "magnitude"}}
    monkeypatch.setattr(nni, "get_next_parameter", lambda: params)
    monkeypatch.setattr(nni, "report_final_result", lambda value: pytest.fail("reported"))
    with pytest.raises(ZeroDivisionError) as caught:
        nni_plugins.nni_trial(lambda params: {"default": 1 / 0})
    assert caught.value.__notes__ == [f"parameters of the trial: {params}"]
    monkeypatch.setattr(nni, "get_next_parameter", lambda: None)
    with pytest.raises(RuntimeError, match="trial_command"):
        nni_plugins.nni_trial(lambda params: {"default": 1.0})


def test_registration_in_python_leaves_nothing_behind(problem, tmp_path, config_dir):
    assert get_algo_meta("PruningBudget") is None
    before = {p.name: p.read_text() for p in config_dir.iterdir()}
    with registered_tuner() as name:
        made = create_builtin_class_instance(name, {"problem": str(tmp_path / "problem.json"), "seed": 3}, "tuners")
        assert isinstance(made, BudgetTuner) and made.search.seed == 3
        assert isinstance(create_validator_instance("tuners", name), BudgetTunerValidator)
    assert get_algo_meta(name) is None
    register_tuner("Mine")
    assert get_algo_meta("mine").class_name == "nni_plugins.search.tuner.BudgetTuner"
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


@pytest.mark.filterwarnings("ignore:pkg_resources")
def test_nnictl_registers_and_unregisters(config_dir, monkeypatch, capsys):
    """In this process; tests/repository/test_wheel.py calls the command."""
    from nni.tools.nnictl.nnictl import parse_args

    def nnictl(*args):
        monkeypatch.setattr(sys, "argv", ["nnictl", "algo", *args])
        parse_args()
        return capsys.readouterr().out

    assert "PruningBudget registered" in nnictl("register", "--meta", str(nni_plugins.ALGORITHMS))
    assert get_algo_meta("PruningBudget").validator_class_name == "nni_plugins.search.tuner.BudgetTunerValidator"
    assert "unregistered" in nnictl("unregister", "PruningBudget")
    assert get_algo_meta("PruningBudget") is None


def example():
    spec = importlib.util.spec_from_file_location("nni_experiment", ROOT / "examples" / "nni_experiment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def servers():
    import psutil

    worker, found = os.environ.get("PYTEST_XDIST_WORKER"), set()  # other test processes have servers of their own
    for process in psutil.process_iter(["cmdline", "environ"]):
        ours = (process.info["environ"] or {}).get("PYTEST_XDIST_WORKER") == worker
        if ours and any("nni_node" in part for part in process.info["cmdline"] or ()):
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


@pytest.mark.slow
def test_a_wrong_search_space_ends_a_real_experiment_with_an_error(problem, tmp_path, config_dir):
    before = servers()
    experiment = Experiment("local")
    experiment.config.experiment_working_directory = tmp_path / "experiments"
    experiment.config.trial_code_directory = tmp_path
    experiment.config.trial_command = "true"
    experiment.config.trial_concurrency = 1
    experiment.config.search_space = {"lr": {"_type": "uniform", "_value": [0, 1]}}
    experiment.config.tuner = CustomAlgorithmConfig(
        class_name="nni_plugins.BudgetTuner", class_args={"problem": str(tmp_path / "problem.json")}
    )
    with pytest.raises(RuntimeError, match=r"an error: SearchSpaceError: .* method is None, .*; see the logs in .*log"):
        nni_plugins.run_experiment(experiment, seconds=200)
    assert servers() <= before
