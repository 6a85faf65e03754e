"""Fixtures that several files share, and what all tests run under."""

import gc

import pytest

gc.set_threshold(100_000, 50, 100)  # a fifth of the time went into looking through what torch and tests had imported


@pytest.fixture
def one_thread():
    """On networks this small a second thread only waits, for long if the cores are busy."""
    from nni_plugins.testing import threads

    with threads(1):
        yield


def pytest_collection_finish(session):
    """What is imported stays."""
    gc.collect()
    gc.freeze()
