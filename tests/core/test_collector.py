"""The collector of garbage looks less often, and afterwards as before."""

import gc
import threading

import pytest

from tp_importance.core.collector import AT_A_TIME, rarely_collected


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("before", [(700, 10, 10), (500_000, 3, 4), (0, 10, 10)])
def test_raised_never_lowered_and_put_back(before):
    gc.set_threshold(*before)
    with pytest.raises(KeyboardInterrupt), rarely_collected(), rarely_collected():
        assert gc.get_threshold()[0] == (max(before[0], AT_A_TIME) if before[0] else 0)
        assert gc.get_threshold()[1:] == before[1:]
        raise KeyboardInterrupt
    assert gc.get_threshold() == before


def test_put_back_when_the_last_thread_leaves():
    gc.set_threshold(700, 10, 10)
    inside, leave = threading.Event(), threading.Event()

    def work():
        with rarely_collected():
            inside.set()
            leave.wait(10)

    with rarely_collected():
        other = threading.Thread(target=work)
        other.start()
        assert inside.wait(10)
    assert gc.get_threshold()[0] == AT_A_TIME  # the other one is still at it
    leave.set()
    other.join()
    assert gc.get_threshold() == (700, 10, 10)
