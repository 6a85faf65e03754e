"""Tests that a new method inherits: what a criterion and a pruner have to keep, on small networks.

:class:`ImportanceContract` is for importances that look at data, :class:`PrunerContract` for pruners; for NNI there is
``nni_plugins.testing``. They need pytest: ``pip install "tp-importance[testing]"``; nothing else imports this package.
"""

from ..core.optional import optional_import

# the asserts of these modules are to show their values, as those of test files do
_TESTS = ("budgets", "collecting", "hosts", "robustness", "scores", "surgery")
optional_import("pytest").register_assert_rewrite(*(f"{__name__}.{module}" for module in _TESTS))

from .cases import host_group, permuted, topology  # noqa: E402
from .data import FailingLoader, LoaderError, class_loader, loader_for  # noqa: E402
from .importance import ImportanceContract  # noqa: E402
from .networks import MISTRACED, NUM_CLASSES, TOPOLOGIES, make_network  # noqa: E402
from .pruner import PrunerContract  # noqa: E402
from .snapshots import Snapshot, same_tensors, same_values  # noqa: E402

__all__ = [
    "MISTRACED",
    "NUM_CLASSES",
    "TOPOLOGIES",
    "FailingLoader",
    "ImportanceContract",
    "LoaderError",
    "PrunerContract",
    "Snapshot",
    "class_loader",
    "host_group",
    "loader_for",
    "make_network",
    "permuted",
    "same_tensors",
    "same_values",
    "topology",
]
