"""Tests lie where CONTRIBUTING.md says, in files of a readable length."""

from helpers.paths import ROOT

TESTS = ROOT / "tests"
OWN = {"helpers", "benchmarks", "integration", "nni_plugins", "repository"}
"""Folders that mirror none of ``tp_importance``."""


def test_folders_are_those_of_the_package():
    package = ROOT / "tp_importance"
    for file in TESTS.rglob("test_*.py"):
        folder = file.parent.relative_to(TESTS)
        assert (folder.parts[:1] and folder.parts[0] in OWN) or (package / folder).is_dir(), file


def test_no_folder_hides_a_package_of_its_name():
    assert [file.parent.name for file in TESTS.rglob("__init__.py")] == ["helpers"]


def test_no_file_is_above_four_hundred_lines():
    lines = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in TESTS.rglob("*.py")}
    assert {file: n for file, n in lines.items() if n > 400} == {}
