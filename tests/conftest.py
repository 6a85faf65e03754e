"""Fixtures that several files share."""

import pytest


@pytest.fixture
def one_thread():
    """On networks this small a second thread only waits, for long if the cores are busy."""
    from nni_plugins.testing import threads

    with threads(1):
        yield
