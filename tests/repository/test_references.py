"""What docstrings and documents refer to exists: objects by their names, files and headings by their paths."""

import ast
import importlib
import inspect
import re
import textwrap
from functools import cache

import pytest

import tp_importance
from helpers.paths import ROOT

SOURCES = sorted(path for package in ("tp_importance", "nni_plugins") for path in (ROOT / package).rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROLE = re.compile(r":(class|func|meth|mod|data|attr|exc|obj):`([^`]+)`")
DOTTED = re.compile(r"""(?<![\w.:/"'-])((?:tp_importance|nni_plugins)(?:\.[A-Za-z_]\w*)+)\b(?!["'])""")
FILE = re.compile(r"(?<![\w./<{-])(?!nni/)((?:\.\./)*(?:[\w-]+/)+[\w.-]+\.(?:py|md|json|yml|toml))\b")
FOLDER = re.compile(r"`((?:tp_importance|nni_plugins|tests|docs|benchmarks|examples)/[\w/-]*)`")
KINDS = {"class": inspect.isclass, "func": callable, "meth": callable, "mod": inspect.ismodule, "exc": inspect.isclass}


def short(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name.startswith("nni_plugins"):
        pytest.importorskip("nni")
    return importlib.import_module(name)


# -- objects


def docstrings(tree, owner=()):
    """Every docstring, those below attributes included: the classes and functions around it, its line, its text."""
    for i, node in enumerate(tree.body):
        after = i == 0 or isinstance(tree.body[i - 1], (ast.Assign, ast.AnnAssign))
        if after and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield owner, node.lineno, str(node.value.value)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(node, (*owner, node.name))


@cache
def attributes(cls):
    """What instances have and the class does not: annotated fields, and what methods set on ``self``."""
    names = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] not in ("tp_importance", "nni_plugins"):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def inside(scope, dotted):
    """The object called ``dotted`` in a module or class; `LookupError` if there is none."""
    for name in dotted.split("."):
        if hasattr(scope, name):
            scope = getattr(scope, name)
        elif inspect.isclass(scope) and name in attributes(scope):
            scope = None
        else:
            try:
                scope = importlib.import_module(f"{scope.__name__}.{name}")
            except (AttributeError, ModuleNotFoundError):
                raise LookupError(dotted) from None
    return scope


def scopes(target, module, owner):
    """Where a reference is looked up, and by which name."""
    if target.startswith("."):
        package = importlib.import_module(module.__package__)
        return [(scope, target[1:]) for scope in (module, package, tp_importance)]
    top, _, rest = target.partition(".")
    if rest and top in ("tp_importance", "nni_plugins", "torch", "warnings", "copy"):
        return [(importlib.import_module(top), rest)]
    if not rest and top in ("tp_importance", "nni_plugins"):
        return [(None, top)]
    around = []
    for depth in range(len(owner), 0, -1):
        try:
            around.append(inside(module, ".".join(owner[:depth])))
        except LookupError:
            pass  # inside of a function
    return [(scope, target) for scope in (*filter(inspect.isclass, around), module)]


def meant(target, module, owner):
    """The object that a reference means."""
    for scope, name in scopes(target, module, owner):
        try:
            return importlib.import_module(name) if scope is None else inside(scope, name)
        except LookupError:
            continue
    raise LookupError(target)


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_references_in_docstrings(path):
    module, wrong = module_of(path), []
    for owner, line, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
        for role, target in ROLE.findall(text):
            try:
                found = meant(target.removeprefix("~"), module, owner)
            except LookupError:
                wrong.append(f"{short(path)}:{line}: {target} does not exist")
                continue
            if found is not None and not KINDS.get(role, lambda _: True)(found):
                wrong.append(f"{short(path)}:{line}: {target} is no {role}")
    assert wrong == []


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=short)
def test_dotted_names(path):
    """`tp_importance.graph.cost`, say, in whatever is written there: prose, comments and messages."""
    text, wrong = path.read_text(encoding="utf-8"), []
    if "nni_plugins." in text:
        pytest.importorskip("nni")
    for name in set(DOTTED.findall(text)):
        top, _, rest = name.partition(".")
        try:
            inside(importlib.import_module(top), rest)
        except LookupError:
            wrong.append(name)
    for package, modules in re.findall(r"`((?:tp_importance|nni_plugins)[\w.]*)` \(((?:`\w+`(?:, )?)+)\)", text):
        parts = re.findall(r"`(\w+)`", modules)
        wrong += [f"{package}.{m}" for m in parts if not (ROOT / package.replace(".", "/") / f"{m}.py").exists()]
    assert wrong == []


# -- files and headings


def headings(path):
    """Anchors of a document as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_links(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else path.parent / file
        if not target.exists() or (anchor and anchor not in headings(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=short)
def test_files_that_are_named(path):
    """Paths with a folder, from the root of the repository, the document, or the package it describes."""
    text = re.sub(r"https?://\S+", "", path.read_text(encoding="utf-8"))
    bases = (ROOT, path.parent, ROOT / "tp_importance")
    named = {*FILE.findall(text), *FOLDER.findall(text)}
    assert [name for name in sorted(named) if not any((base / name).exists() for base in bases)] == []


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=short)
def test_nothing_outside_is_cited(path):
    text = path.read_text(encoding="utf-8")
    here = re.escape(str(ROOT.parent)) if ROOT.parent != ROOT.parent.parent else "(?!)"  # the folder of this checkout
    assert re.findall(rf"\bMETHODS(?:\.md| §)|\bSTYLE\.md|\bGRAPH\.md|design document|{here}/\w+", text) == []
    assert re.findall(r"\[[PDC](?:, code)?\]", text) == []  # marks of a document that is not here: say it in words


@pytest.mark.parametrize("package", ["tp_importance", "nni_plugins"])
def test_scripts_use_names_that_the_packages_have(package):
    """Examples are too long to be run here: at least what they take from the packages is there."""
    module, missing, used = pytest.importorskip(package), [], 0
    for path in sorted(p for folder in ("examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == package:
                used += 1
                missing += [] if hasattr(module, node.attr) else [f"{path.relative_to(ROOT)}:{node.lineno} {node.attr}"]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
                origin = importlib.import_module(str(node.module))
                used += 1
                missing += [
                    f"{path.relative_to(ROOT)}:{node.lineno} {a.name}"
                    for a in node.names
                    if not hasattr(origin, a.name)
                ]
    assert used and not missing
