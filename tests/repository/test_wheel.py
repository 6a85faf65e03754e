"""What `pip install` gives: the wheel is built from a copy, installed into a folder, and used from there only."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from tp_importance import Budget
from tp_importance.automl import BudgetProblem
from tp_importance.testing.networks import residual

NNICTL = ("-m", "nni.tools.nnictl.nnictl")

pytestmark = pytest.mark.slow


def python(*args, cwd, **env):
    command = [sys.executable, "-W", "ignore", *args]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in ("tp_importance", "nni_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    python(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), ".", cwd=source
    )
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """``run(*args)`` in a Python that sees the installed packages, in a home of its own."""
    folder = tmp_path_factory.mktemp("installed")
    target, home = folder / "site", folder / "home"
    home.mkdir()
    options = ("-q", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(target))
    python("-m", "pip", "install", *options, str(wheel), cwd=folder)

    def run(*args):
        return python(
            *args,
            cwd=folder,
            PYTHONPATH=str(target),
            HOME=str(home),
            NNI_CONFIG_DIR=str(folder / "config"),
            PYTHONDONTWRITEBYTECODE="1",
        )

    run.folder, run.target = folder, target
    return run


def test_the_wheel_has_the_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "nni_plugins/algorithms.yml",
        "nni_plugins/preload.js",
        "nni_plugins/py.typed",
        "tp_importance/py.typed",
    ):
        assert name in names
    modules = {str(p.relative_to(ROOT)) for d in ("tp_importance", "nni_plugins") for p in (ROOT / d).rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0] for name in names} == {
        "tp_importance",
        "nni_plugins",
        wheel.name.rsplit("-", 3)[0] + ".dist-info",
    }


LOOK = """
import nni_plugins
from nni.tools.package_utils import get_algo_meta
assert get_algo_meta("PruningBudget") is None # NNI makes its files when it first looks
print(nni_plugins.ALGORITHMS)
"""

CHECK = """
import sys, nni_plugins
from nni.tools.package_utils import create_builtin_class_instance, get_algo_meta
from nni.tools.package_utils.tuner_factory import create_validator_instance
assert nni_plugins.__file__.startswith(sys.argv[1]), nni_plugins.__file__
assert nni_plugins.search.server.PRELOAD.is_file()
if "python" in sys.argv:
    assert get_algo_meta("PruningBudget") is None
    nni_plugins.register_tuner()
args = {"problem": sys.argv[2]}
create_validator_instance("tuners", "PruningBudget").validate_class_args(**args)
tuner = create_builtin_class_instance("PruningBudget", args, "tuners")
assert isinstance(tuner, nni_plugins.BudgetTuner) and tuner.generate_parameters(0)["method"] == "magnitude"
if "python" in sys.argv:
    nni_plugins.unregister_tuner()
    assert get_algo_meta("PruningBudget") is None
"""


def test_registration_from_the_installed_wheel_leaves_nothing_behind(installed):
    torch.manual_seed(0)
    x, problem = torch.randn(2, 3, 16, 16), str(installed.folder / "problem.json")
    BudgetProblem.prepare(residual().eval(), x, budget=Budget(macs=0.5), methods=["magnitude"]).save(problem)

    def registered():
        folder = installed.folder / "config"
        return {path.name: path.read_text() for path in folder.iterdir()}

    def files():
        return {path for path in installed.target.rglob("*")}

    meta = installed("-c", LOOK).strip()
    assert Path(meta).is_file() and Path(meta).is_relative_to(installed.target)
    before = registered(), files()
    assert "PruningBudget registered" in installed(*NNICTL, "algo", "register", "--meta", meta)
    assert "PruningBudget" in "".join(registered().values())
    installed("-c", CHECK, str(installed.target), problem)
    assert "unregistered" in installed(*NNICTL, "algo", "unregister", "PruningBudget")
    assert (registered(), files()) == before
    installed("-c", CHECK, str(installed.target), problem, "python")
    assert (registered(), files()) == before
