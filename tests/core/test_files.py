"""Files that are written in one step, and what killed writers of them leave behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tp_importance.core import files
from tp_importance.core.files import written_at_once

WRITER = """
import runpy, sys
written_at_once = runpy.run_path(sys.argv[1])["written_at_once"]  # without torch, which takes seconds
with written_at_once(sys.argv[2]) as file:
    file.write(b"from the other process")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """A process in the middle of writing ``target``."""
    command = [sys.executable, "-c", WRITER, files.__file__, str(tmp_path / "target")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def write(path, content=b"ours"):
    with written_at_once(path) as file:
        file.write(content)


def names(folder):
    return sorted(os.listdir(folder))


def test_what_a_killed_writer_left_is_removed_by_the_next(other, tmp_path):
    write(tmp_path / "target", b"old")
    (left,) = set(names(tmp_path)) - {"target"}
    assert left.startswith(".target.") and left.endswith(".tmp")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert names(tmp_path) == [left, "target"] and (tmp_path / left).read_bytes() == b"from the other process"
    write(tmp_path / "other")  # not its business
    assert left in names(tmp_path)
    write(tmp_path / "target")
    assert names(tmp_path) == ["other", "target"] and (tmp_path / "target").read_bytes() == b"ours"


def test_a_writer_that_is_alive_is_left_alone(other, tmp_path):
    (temporary,) = names(tmp_path)
    os.utime(tmp_path / temporary, (0, 0))  # however old
    for _ in range(2):
        write(tmp_path / "target")
        assert names(tmp_path) == [temporary, "target"]
    other.communicate("go on\n")
    assert other.returncode == 0 and names(tmp_path) == ["target"]
    assert (tmp_path / "target").read_bytes() == b"from the other process"


def test_what_other_machines_left_must_be_old(tmp_path):
    """On a shared disk their locks may not be seen."""
    fresh, old = (tmp_path / f".x.{'0' * 8}.{digit * 16}.tmp" for digit in "12")
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    write(tmp_path / "x")
    assert names(tmp_path) == [fresh.name, "x"]


def test_files_of_other_names_are_left_alone(tmp_path):
    left = [".x.tmp", f".x.y.{files._HOST}.{'a' * 16}.tmp", f".x.{files._HOST}.{'a' * 16}.tmp.bak", f"x.{'a' * 16}.tmp"]
    left += [f".x.{files._HOST}.{'A' * 16}.tmp", f".xx.{files._HOST}.{'a' * 16}.tmp"]
    for name in left:
        (tmp_path / name).touch()
    write(tmp_path / "x")
    assert names(tmp_path) == sorted([*left, "x"])


def test_a_name_with_odd_characters(tmp_path):
    for name in ("a+b[1] (2).pt", "*"):
        stale = tmp_path / f".{name}.{files._HOST}.{'a' * 16}.tmp"
        stale.touch()
        write(tmp_path / name)
        assert not stale.exists()


def test_a_file_that_is_taken_for_abandoned_before_it_is_locked(tmp_path, monkeypatch):
    """Another writer comes between making the file and locking it."""
    lock, seen = files.fcntl.flock, []

    def flock(file, how):
        if not how & files.fcntl.LOCK_NB and not seen:
            seen.append(names(tmp_path))
            write(tmp_path / "x", b"the other")
            assert names(tmp_path) == ["x"]
        return lock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    write(tmp_path / "x")
    assert len(seen) == 1 and names(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"ours"


def test_many_writers_at_once(tmp_path):
    errors = []

    def run(number):
        try:
            for _ in range(30):
                write(tmp_path / "x", bytes([number]) * 1000)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "x").read_bytes()
    assert not errors and names(tmp_path) == ["x"] and len(content) == 1000 and len(set(content)) == 1


@pytest.mark.parametrize("locks", ["none", "refused"])
def test_without_locks_everything_else_works(tmp_path, monkeypatch, locks):
    """Windows, or a file system that knows none: nothing is taken for abandoned."""

    def refuse(*_):
        raise OSError("locks are not supported here")

    if locks == "none":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    stale = tmp_path / f".x.{files._HOST}.{'a' * 16}.tmp"
    stale.touch()
    write(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt), written_at_once(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert names(tmp_path) == [stale.name, "x"] and (tmp_path / "x").read_bytes() == b"ours"


def test_missing_folder_is_the_writers_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(Path(tmp_path, "none", "x"))
