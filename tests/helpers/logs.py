"""A logger that is heard, whatever ran before."""

import logging

import pytest

from tp_importance.core import progress


@pytest.fixture
def fresh_logging(monkeypatch):
    """Other libraries' set-ups, in tests that ran before in this process, switch loggers off or leave phases open."""
    logger = logging.getLogger("tp_importance")
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    logger.manager._clear_cache()
    depth, shown_before = progress._DEPTH.set(0), progress._SHOWN.set(None)
    yield
    progress._DEPTH.reset(depth)
    progress._SHOWN.reset(shown_before)
