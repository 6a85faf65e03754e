"""Files that are either the old or the new one, whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["written_at_once"]


@contextmanager
def written_at_once(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only when it is complete; other processes may read and write there.

    Args:
        path: name of the file; an old one is replaced in one step, or kept.

    Yields:
        The file, open for writing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "x")
        >>> with written_at_once(path) as file:
        ...     _ = file.write(b"1")
        ...     print(path.exists())
        False
        >>> path.read_bytes(), len(list(path.parent.iterdir()))
        (b'1', 1)
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
