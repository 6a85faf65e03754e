"""Imports go one way: every folder imports from those above it only."""

import ast
from pathlib import Path

import pytest

from helpers.paths import ROOT

LAYERS = {
    "tp_importance": [
        ["errors", "budget"],
        ["core"],
        ["maths"],
        ["checkpoints"],
        ["graph"],
        ["attention", "export"],
        ["statistics"],
        ["latency"],
        ["host_pruners"],
        ["allocation"],
        ["refitting", "recovery"],
        ["pruning"],
        ["methods"],
        ["one_shot", "refitted_step"],
        ["automl"],
        ["testing"],
        ["cli"],
        ["__main__"],
    ],
    "nni_plugins": [
        ["_compat", "config"],
        ["wrappers", "evaluator"],
        ["surgery"],
        ["pruners", "refit"],
        ["search"],
        ["testing"],
    ],
}
PACKAGES = list(LAYERS)


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    result = set()
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [start, node.module]))
            result |= {f"{origin}.{a.name}" if f"{origin}.{a.name}" in known else origin for a in node.names}
        elif isinstance(node, ast.Import):
            result |= {a.name for a in node.names}
    return result & known - {name}


def arrows(package: str) -> list[tuple[str, str]]:
    found = modules(package)
    return [(a, b) for a, path in found.items() if a != package for b in imported(a, path, set(found))]


def part(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_part_has_its_layer(package):
    parts = {part(name) for name in modules(package) if name != package}
    assert parts == {p for layer in LAYERS[package] for p in layer}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_up_the_table_only(package):
    level = {p: i for i, layer in enumerate(LAYERS[package]) for p in layer}
    inside = [(a, b) for a, b in arrows(package) if b != package]
    assert not [(a, b) for a, b in inside if level[part(b)] > level[part(a)]]
    assert len({part(b) for _, b in inside}) > len(level) // 2  # the test reads imports at all


@pytest.mark.parametrize("package", PACKAGES)
def test_only_contracts_import_what_users_import(package):
    assert {part(a) for a, b in arrows(package) if b == package} <= {"testing"}


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_no_circle(package):
    graph = {a: set() for a in modules(package)}
    for a, b in arrows(package):
        graph[a].add(b)
    while leaves := [a for a, bs in graph.items() if not bs]:
        for leaf in leaves:
            del graph[leaf]
        graph = {a: bs - set(leaves) for a, bs in graph.items()}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_methods_do_not_import_each_other():
    inside = [(a.split("."), b.split(".")) for a, b in arrows("tp_importance") if part(a) == part(b) == "methods"]
    between = [(a, b) for a, b in inside if len(a) > 2 and len(b) > 2 and a[2] != b[2]]
    assert inside and not between


def test_the_packages_import_one_way():
    known = set(modules("nni_plugins"))
    for name, path in modules("tp_importance").items():
        assert not imported(name, path, known), f"{name} imports nni_plugins"


def test_mathematics_knows_no_host():
    for name, path in modules("tp_importance").items():
        if part(name + ".") == "maths":
            assert "torch_pruning" not in path.read_text(), name
