"""The garbage collector of Python during work that makes many short-lived objects."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["rarely_collected"]

AT_A_TIME = 20_000
"""Objects after which the youngest are looked through; 700 is the default of Python."""

_lock = threading.Lock()
_running, _before = 0, (0, 0, 0)


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Look for garbage less often inside the block: every :data:`AT_A_TIME` new objects.

    Modes of torch make some hundred thousand objects while a network is traced and verified. With Python's thresholds
    they also bring about searches of the *whole* heap, which takes 0.4 s where libraries have filled it, a seventh of
    the time for a YOLO. The thresholds are those of the process, so they are raised and never lowered, and come back
    when the last block, of any thread, is left. A collector that is off stays off.

    Example:
        >>> before = gc.get_threshold()
        >>> with rarely_collected():
        ...     gc.get_threshold()[0] >= 20_000
        True
        >>> gc.get_threshold() == before
        True
    """
    global _running, _before
    with _lock:
        if not _running:
            _before = gc.get_threshold()
            if 0 < _before[0] < AT_A_TIME:  # 0: off
                gc.set_threshold(AT_A_TIME, *_before[1:])
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                gc.set_threshold(*_before)
