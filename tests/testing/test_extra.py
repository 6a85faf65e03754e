"""pytest is needed for ``tp_importance.testing`` only."""

import subprocess
import sys

from helpers.paths import ROOT

CODE = """
import sys
import tp_importance
assert "pytest" not in sys.modules and "_pytest" not in sys.modules
sys.modules["pytest"] = None
try:
    import tp_importance.testing
except tp_importance.errors.MissingPackageError as error:
    print(error)
"""


def test_nothing_else_imports_pytest():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'pip install "tp-importance[testing]"' in done.stdout
