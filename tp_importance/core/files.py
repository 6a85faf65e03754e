"""Files that are either the old or the new one, whatever happens, and files that are whole."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: an open file cannot be renamed, and there is nothing to lock it with
    fcntl = None

__all__ = ["check_archive", "json_digest", "read_json", "write_json", "written_at_once"]

HOUR = 3600.0
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"


@contextmanager
def written_at_once(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only when it is complete; other processes may read and write there.

    It is written beside its place, as ``.NAME.HOST.RANDOM.tmp``, and locked meanwhile. A writer that is killed leaves
    that file behind without its lock; the next writer of the same name removes it. If another machine left it on a
    shared disk, it must be an hour old as well, as locks may not be seen from there.

    Args:
        path: name of the file; an old one is replaced in one step, or kept.

    Yields:
        The file, open for writing.

    Raises:
        OSError: if writing fails; the old file is kept.

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
    _remove_abandoned(target)
    file, temporary = _opened(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is locked, or another writer could take it for abandoned
                os.replace(temporary, target)
        if fcntl is None:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_archive(file: BinaryIO) -> None:
    """Compare every member of a zip archive, such as ``torch.save`` writes, with its checksum.

    ``torch.load`` does not do so: it takes damaged weights for good, and reads past the end of a tensor if its size
    is damaged.

    Args:
        file: open for reading; it stands at its beginning afterwards.

    Raises:
        Exception: of any kind, if it is no archive or a member is damaged.

    Example:
        >>> import io
        >>> with zipfile.ZipFile(archive := io.BytesIO(), "w") as made:
        ...     made.writestr("a", b"content")
        >>> check_archive(archive)
        >>> check_archive(io.BytesIO(archive.getvalue().replace(b"content", b"contend")))
        Traceback (most recent call last):
        zipfile.BadZipFile: member a is damaged
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"member {damaged} is damaged")
    file.seek(0)


def json_digest(content: Any) -> str:
    """SHA-256 of plain data, the same before and after it went through JSON.

    Example:
        >>> json_digest({"a": (1, 2.0), "b": 3}) == json_digest({"b": 3, "a": [1, 2.0]})
        True
    """
    normal = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(normal.encode()).hexdigest()


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write plain data as JSON, in one step, with its digest as ``sha256``.

    Args:
        path: name of the file.
        content: what JSON can hold.

    Raises:
        OSError: if writing fails; the old file is kept.

    Example:
        >>> import tempfile
        >>> write_json(path := Path(tempfile.mkdtemp(), "x"), {"a": 1})
        >>> read_json(path)
        {'a': 1}
    """
    with written_at_once(path) as file:
        file.write((json.dumps({**content, "sha256": json_digest(content)}) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Args:
        path: name of the file.

    Returns:
        The content, without the digest.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON, or its content is not what was written.
    """
    content = json.loads(Path(path).read_bytes())
    if not isinstance(content, dict) or "sha256" not in content:
        raise ValueError("it is no dict with a digest")
    if content.pop("sha256") != json_digest(content):
        raise ValueError("it is damaged or was changed by hand: the digest is not that of its content")
    return content


def _opened(target: Path) -> tuple[BinaryIO, Path]:
    """A new file beside ``target``, locked where the file system has locks."""
    while True:
        temporary = target.with_name(f".{target.name}.{_HOST}.{uuid4().hex[:16]}.tmp")
        file: BinaryIO = open(temporary, "xb")
        try:
            if fcntl is None:
                return file, temporary
            with suppress(OSError):  # a file system without locks: then nobody can lock, and nobody removes it
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # else another writer removed it before it was locked
                return file, temporary
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        file.close()


def _remove_abandoned(target: Path) -> None:
    """Remove what killed writers of ``target`` left. That is never worth an error."""
    name = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):
        for entry in os.scandir(target.parent) if fcntl is not None else ():
            if match := name.fullmatch(entry.name):
                with suppress(OSError), open(entry.path, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer is alive
                    age = time.time() - os.fstat(file.fileno()).st_mtime
                    if match[1] == _HOST or age > HOUR:
                        os.unlink(entry.path)
