import sys

import pytest

from tp_importance.errors import MissingPackageError


def test_without_pytest_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tp_importance.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(MissingPackageError, match=r'pip install "tp-importance\[testing\]"'):
        import tp_importance.testing  # noqa: F401
