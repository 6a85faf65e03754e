"""Every Python block of README.md, CONTRIBUTING.md and docs/, run as it is printed; what else they name exists."""

import ast
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.paths import ROOT
from tp_importance import LatencyTable, count_ops
from tp_importance.graph.surgery import remove_units
from tp_importance.latency.measure import Latency
from tp_importance.testing import class_loader
from tp_importance.testing.networks import Residual, conv_bn_relu, head

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WORDS = {document: (ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS}


@dataclass(frozen=True)
class Block:
    """A fenced block of Python in a document."""

    document: str
    line: int
    code: str

    def __str__(self):
        return f"{self.document}:{self.line}"

    def run(self, names):
        """Run it in a namespace, where `_` is what its last line gives; errors name the line of the document."""
        tree = ast.increment_lineno(ast.parse(self.code), self.line)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(ROOT / self.document), "exec"), names)
        if last is not None:
            names["_"] = eval(compile(ast.Expression(last.value), str(ROOT / self.document), "eval"), names)


def blocks(document):
    text = WORDS[document]
    return [
        Block(document, text.count("\n", 0, match.start()) + 1, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
EXPERIMENT = [block for block in BLOCKS if "run_experiment" in block.code]
"""Start a real experiment, and resume it: run one after the other, by `test_nni_experiment`."""
NEEDED = {
    "nni": ("import nni", "from nni", "nni_plugins"),
    "optuna": ("import optuna",),
    "pandas": ("sweep_frame",),
    "matplotlib": ("plot_sweep",),
}
"""Optional packages, and what a block that needs them says."""


def network():
    """What a user might have, though small: plain convolutions, a residual block, two strides."""
    torch.manual_seed(0)
    layers = [conv_bn_relu(3, 8), Residual(8, 8, 8), conv_bn_relu(8, 16, stride=2), conv_bn_relu(16, 16), head(16)]
    model = nn.Sequential(*layers).eval()  # as a trained network is at hand: blocks that train must say so
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # training has told the channels apart
    return model


def counted(model, example_inputs, *, forward_fn=None, min_run_time=0.5):
    """A clock that counts: the latency of networks this small is noise."""
    return Latency(0.001 + 1e-3 * sum(p.numel() for p in model.parameters()), 0.0, 1, 1, "cpu", 1)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the documents say that blocks need, and nothing else; files go to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(LatencyTable.__init__.__kwdefaults__, "measure", counted)
    monkeypatch.setattr("tp_importance.methods.resconv.costs.measure_latency", counted)
    monkeypatch.setattr("tp_importance.automl.trial.measure_latency", counted)
    model, loader = network(), class_loader()
    images, labels = torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader])

    def accuracy(net):
        with torch.no_grad():
            return float((net.eval()(images).argmax(1) == labels).float().mean())

    return {
        "__name__": "__main__",
        "model": model,
        "x": images[:2],
        "loader": loader,
        "training": loader,
        "loss_fn": nn.functional.cross_entropy,
        "accuracy": accuracy,
        "MyNet": network,
    }


@pytest.mark.parametrize("block", [b for b in BLOCKS if b not in EXPERIMENT], ids=str)
@pytest.mark.filterwarnings("error:.*is trained in eval mode", "error:.*that pruning has replaced")
@pytest.mark.filterwarnings(
    "ignore:.*has been overridden", "ignore:layer .* has a=0"
)  # NNI's training; short trainings
def test_block(block, names):
    for package, signs in NEEDED.items():
        if any(sign in block.code for sign in signs):
            pytest.importorskip(package)
    before, dense = names["model"], count_ops(names["model"], names["x"])
    given = set(names)
    block.run(names)
    assert all(bool(torch.isfinite(t).all()) for t in names["model"].state_dict().values())  # NaN: trained in vain
    found = [check for word, check in CHECKS.items() if word in block.code]
    assert found, "say below what this block must have done"
    for check in found:
        check(names, dense)
    assert names["model"] is before or "MyNet" in block.code
    assert given <= set(names)


def macs(names, dense):
    return count_ops(names["model"], names["x"])[0] / dense[0]


def meets(fraction):
    def check(names, dense):
        assert 0.5 * fraction < macs(names, dense) <= fraction

    return check


def pruned(names, dense):
    assert macs(names, dense) < 1


def within_latency(names, dense):
    now, limit = counted(names["model"], names["x"]).median_ms, 0.6 * counted(network(), names["x"]).median_ms
    assert now <= limit


def fine_tuned(names, dense):
    assert names["schedule"].last_epoch == len(names["training"])
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def swept(names, dense):
    assert [plan.cost.macs <= f * dense[0] for plan, f in zip(names["plans"], (0.9, 0.7, 0.5, 0.3), strict=True)]
    assert Path("widths.png").stat().st_size


def studied(names, dense):
    study = names["study"]
    assert len(study.trials) == 40 and study.best_trials
    assert all(trial.state.name == "COMPLETE" and trial.values[1] <= 0.8 * dense[0] for trial in study.trials)
    assert list(Path("statistics").glob("*.npz"))


def tried(names, dense):
    assert set(names["_"]) == {"default", "macs", "params", "latency"} and names["_"]["macs"] <= 0.5 * dense[0]
    assert macs(names, dense) == 1  # it works on a copy


def inherits(names, dense):
    contracts = [made for name, made in names.items() if name.startswith("Test")]
    assert contracts
    for contract in contracts:
        found = {"test_deterministic", "test_whole_budget_changes_nothing_and_warns", "test_same_data_same_masks"}
        (name,) = found & set(dir(contract))
        getattr(contract(), name)()


def coupled(names, dense):
    remove_units(names["groups"], {"stem": [0]})
    net = names["groups"].trace.model
    assert (net.stem.out_channels, net.left.in_channels, net.left.out_channels, net.head.in_channels) == (14, 7, 7, 14)
    assert net(torch.randn(1, 3, 8, 8)).shape == (1, 4, 6, 6)


def untouched(names, dense):
    assert count_ops(names["model"], names["x"]) == dense and "left_out" in names


def baked(names, dense):
    net = names["net"]
    assert type(net[0]) is nn.Conv2d and net[2].in_channels == net[0].out_channels < 16


def explicit(names, dense):
    for layer in names["net"].layers:
        attention = layer.self_attn
        assert (attention.num_heads, attention.head_dim, attention.q_proj.out_features) == (4, 8, 32)


def repeated(names, dense):
    pruned(names, dense)
    for net in (names["fresh"], names["another"]):
        for a, b in zip(names["model"].state_dict().values(), net.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def cut_by_the_user(names, dense):
    assert names["net"][2].in_channels == len(names["net"][1].table[0]) == 8


def norm_groups(names, dense):
    remove_units(names["groups"], {"0": [2]})
    net = names["net"]
    assert (net[1].num_groups, net[1].num_channels, net[0].out_channels) == (7, 28, 28)


def shrunk_transformer(names, dense):
    net, tokens = names["net"], names["tokens"]
    assert count_ops(net, tokens)[0] == names["result"].report.cost.macs <= 0.5 * names["result"].report.dense.macs
    assert 0 <= names["result"].report.outputs.relative_error < 1 and net(tokens).shape == (2, 10, 5)


CHECKS = {
    "nn.GroupNorm(8, 32)": norm_groups,
    "class Attention(nn.Module)": shrunk_transformer,
    ".excluded:\n    print(left_out.name, left_out.kind": untouched,
    "bake_weights(net": baked,
    "explicit_attention(net": explicit,
    "class ShiftPruner": cut_by_the_user,
    "repeat_cuts(another": repeated,
    "prune(model, x, loader, budget=Budget(macs=0.5)": meets(0.5),
    "Distiller(": fine_tuned,
    'latency_table="latency.json"': pruned,
    "load_pruned(MyNet": meets(0.5),
    "tp.pruner.BasePruner(": pruned,
    "ITPruner(": swept,
    "config_list": pruned,
    "Budget(latency=0.6), importance": within_latency,
    'groups["stem"]': coupled,
    "pruner.regularize(optimizer)": meets(0.5),
    "pruner.start(optimizer": meets(0.2),
    "optuna_objective(": studied,
    "Contract):": inherits,
    "prune_trial(model, params, example_inputs=x, loader=loader, evaluate=accuracy, budget": tried,
}
"""What a block with that text must have done to the network, besides not failing."""


@pytest.mark.slow
def test_nni_experiment(names, monkeypatch):
    nni_experiment = pytest.importorskip("nni.experiment")
    import nni_plugins

    monkeypatch.setenv("NNI_CONFIG_DIR", str(Path("config").resolve()))
    experiment = nni_experiment.Experiment("local")
    Path("trial.py").write_text("import nni\nnni.report_final_result(float(nni.get_next_parameter()['width:0.0']))\n")
    experiment.config.experiment_working_directory = Path("experiments").resolve()
    experiment.config.trial_code_directory = Path.cwd()
    experiment.config.trial_command = f"{sys.executable} trial.py"
    experiment.config.trial_concurrency = 2
    experiment.config.max_trial_number = 2
    start, resume = EXPERIMENT
    try:
        names["experiment"] = experiment
        start.run(names)
        rows = names["rows"]
        assert [row["status"] for row in rows] == ["SUCCEEDED", "SUCCEEDED"]
        later = {"experiment_id": experiment.id}  # in another process there is nothing else
        resume.run(later)
        assert later["rows"] == rows
    finally:
        nni_plugins.unregister_tuner()


# -- what else the documents name


def code_of(document):
    """Inline code, fenced blocks and indented lines: where commands are."""
    text = WORDS[document]
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join([*fenced, *re.findall(r"`([^`]+)`", rest), *re.findall(r"^ {4}(\S.*)$", rest, re.MULTILINE)])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))
    named = re.findall(r"(?:^|\s)make ([a-z][a-z0-9-]*)", code_of(document), re.MULTILINE)
    assert [target for target in named if target not in targets] == []
    assert named or document != "README.md"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_scripts_extras_and_links_exist(document):
    code = code_of(document)
    scripts = re.findall(r"\b((?:examples|benchmarks|tests)/\w+\.py)\b", code)
    assert [path for path in scripts if not (ROOT / path).is_file()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name for found in re.findall(r'pip install "\.\[([\w,]+)\]"', code) for name in found.split(",")}
    assert extras <= set(project["optional-dependencies"])
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", WORDS[document])
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
