"""Fixtures that several files share."""

import pytest


@pytest.fixture
def one_thread():
    """On networks this small a second thread only waits, for long if the cores are busy."""
    from helpers.nni_contract import threads  # needs NNI, as everybody who asks for one thread

    with threads(1):
        yield
