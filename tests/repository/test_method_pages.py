"""The pages in docs/methods: their Python runs from top to bottom, their formulas and numbers can be trusted."""

import re
import warnings

import pytest
import torch
import torch_pruning as tp

from helpers.paths import ROOT
from repository.test_documentation import (
    NEEDED,
    Block,
    names,  # noqa: F401 - a fixture
)
from tp_importance import count_ops
from tp_importance.pruning import registry

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "methods").glob("*.md"))}
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
METHODS = ["catro", "itpruner", "obs", "psap", "resconv"]


def blocks(page):
    return [
        Block(f"docs/methods/{page}.md", PAGES[page].count("\n", 0, match.start()) + 1, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    ]


def missing(block):
    """What an optional package that the block needs is called, if it is not installed."""
    for package, signs in NEEDED.items():
        if any(sign in block.code for sign in signs):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    __import__(package)
                except ImportError:
                    return package
    return None


def budgets(code):
    """Fractions of MACs that a block prunes its network to, in order; none if it only plans."""
    prunes = re.search(r"\b(?:prune|step|finish|speedup)\(", code.replace("optimizer.step()", ""))
    return [float(f) for f in re.findall(r"Budget\(macs=([\d.]+)", code)] if prunes else []


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a page registers is gone after it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "METHODS", registry._METHODS)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
@pytest.mark.filterwarnings("error:.*is trained in eval mode", "error:.*that pruning has replaced")
@pytest.mark.filterwarnings("ignore:.*has been overridden", "ignore:layer .* has a=0")  # NNI's training; short ones
def test_blocks_run_in_order(page, request):
    given = request.getfixturevalue("names")
    fresh = count_ops(given["model"], given["x"])[0]
    pruned = skipped = 0
    for block in blocks(page):
        if missing(block):
            skipped += 1
            continue
        block.run(given)
        model, limits = given["model"], budgets(block.code)
        assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values()), block
        if limits:
            assert count_ops(model, given["x"])[0] <= limits[-1] * fresh, block
            pruned += 1
    assert pruned
    if skipped:
        pytest.skip(f"{skipped} blocks need packages that are not installed; the others passed")


@pytest.mark.parametrize("page", METHODS)
def test_pages_of_methods_show_both_hosts(page):
    hosts = {"nni": [b for b in blocks(page) if "from nni_plugins import" in b.code]}
    hosts["torch-pruning"] = [b for b in blocks(page) if b not in hosts["nni"]]
    assert all(any(budgets(b.code) or "sparse_ratio" in b.code for b in found) for found in hosts.values())


@pytest.mark.parametrize("page", PAGES)
def test_parts_come_in_order(page):
    headings = re.findall(r"^## (.*)$", PAGES[page], re.MULTILINE)
    wanted = ["What to type", "The idea", "The mathematics", "Measured", "Limits", "Reference"]
    if page in (*METHODS, "refit"):
        assert [h for h in headings if h in wanted] == wanted
        assert any(h.endswith("and ours") for h in headings) and any("efault" in h for h in headings)


@pytest.mark.parametrize("page", PAGES)
def test_measured_numbers_are_those_of_the_benchmarks(page):
    """Decimals in what was measured; settings stand in other parts of a page."""
    parts = re.split(r"^## ", PAGES[page], flags=re.MULTILINE)
    told = "\n".join(part for part in parts if part.startswith(("Measured", "How to choose")))
    told = re.sub(r"\]\([^)]*\)", "]", told)
    numbers = set(re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", told))
    assert numbers or page not in METHODS
    assert [n for n in sorted(numbers) if not re.search(rf"(?<![\d.]){re.escape(n)}(?!\d)", BENCHMARKS)] == []


@pytest.mark.parametrize("page", PAGES)
def test_inline_formulas_survive_markdown(page):
    """GitHub reads Markdown first: backslashes before punctuation go, underscores behind it open emphasis."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    assert text.count("$") % 2 == 0
    formulas = re.findall(r"\$([^$]+)\$", re.sub(r"`[^`]*`", "", text))
    broken = r"\\[^a-zA-Z]|[^\w\\]_|[*<]|^\s|\s$|\n"
    assert [f for f in formulas if re.search(broken, f)] == []
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert [cell for cell in cells if cell.count("$") % 2] == []


def test_index_links_every_page():
    links = set(re.findall(r"\]\((\w[\w-]*)\.md", PAGES["index"]))
    assert links >= set(PAGES) - {"index"}


def test_the_worked_example_computes_lamp():
    given = {}
    blocks("adding-a-method")[0].run(given)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 3))
    graph = tp.DependencyGraph().build_dependency(network, torch.randn(1, 3, 8, 8))
    group = graph.get_pruning_group(network[0], tp.prune_conv_out_channels, list(range(6)))
    norms = tp.importance.MagnitudeImportance(p=2)(group).square().tolist()
    expected = [a / sum(b for b in norms if b >= a) for a in norms]
    torch.testing.assert_close(given["LAMPImportance"](p=2)(group), torch.tensor(expected))
