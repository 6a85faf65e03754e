"""Passes that run only what differs, against passes of the whole network."""

import copy
import ctypes
import itertools
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.logs import fresh_logging  # noqa: F401 - a fixture
from helpers.resconv_cases import CASES, HEAD, ONE, TWO, Basic, R, Wired, X, fresh, head, ready, resnet
from tp_importance import Budget, ResConvPruner
from tp_importance.core.progress import shown
from tp_importance.graph.tape import NotReplayable
from tp_importance.methods.resconv import output_losses, passes, removal_controls, resconv_layers
from tp_importance.methods.resconv.passes import ReplayedPasses, WholePasses, passes_of
from tp_importance.pruning.registry import Job, find_method
from tp_importance.testing import Snapshot
from tp_importance.testing.networks import conv_bn_relu

BATCHES = [torch.cat([X, -X]), X[:1] * 2, X + 1]


def built(name: str) -> nn.Module:
    fn, modules, _, kept = CASES[name]
    torch.manual_seed(0)
    return ready(Wired(fn, modules, bool(kept)))


def both(model, batches=BATCHES, run=None, channels_last=False):
    """Replayed and whole passes of two copies of a network."""
    twin, found = copy.deepcopy(model).eval(), []
    for net, make in ((model.eval(), ReplayedPasses), (twin, WholePasses)):
        layers = resconv_layers(net)
        controls = {name: 0.5 + 0.1 * i for i, name in enumerate(layers)}
        more = (channels_last, lambda: None) if make is ReplayedPasses else ()
        found.append(make(net, layers, controls, batches, run, *more))
    return found


@torch.no_grad()
def check_same(replayed, whole, names):
    """For every layer, as they go one by one, in an order that jumps back and forth."""
    left = list(names)
    random.Random(0).shuffle(left)
    while left:
        for name in left:
            assert list(replayed.changes(name)) == pytest.approx(list(whole.changes(name)), rel=1e-7, abs=1e-16), name
        assert list(replayed.changes(left[-1], 2)) == list(replayed.changes(left[-1]))[2:]
        replayed.remove(left[0])
        whole.remove(left[0])
        del left[0]


@pytest.mark.parametrize("kept_bytes", [1 << 30, 40_000, 0], ids=["all", "some", "nothing"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "value asked"])
@torch.no_grad()
def test_same_as_the_whole_network(name, kept_bytes, monkeypatch):
    monkeypatch.setattr(passes, "KEPT_BYTES", kept_bytes)
    replayed, whole = both(built(name))
    assert replayed.samples == whole.samples == [4, 1, 2] and replayed.sizes == pytest.approx(whole.sizes)
    check_same(replayed, whole, resconv_layers(built(name)))


@torch.no_grad()
def test_deep_networks_channels_last_and_short_of_memory(monkeypatch):
    full = 0
    for kept_bytes, channels_last in itertools.product((1 << 30, 200_000), (False, True)):
        monkeypatch.setattr(passes, "KEPT_BYTES", kept_bytes)
        replayed, whole = both(ready(resnet()), channels_last=channels_last)
        cuts = sum(len(b.keep) for b in replayed._batches)
        full = max(full, cuts)
        assert cuts == full or (kept_bytes < 1 << 30 and 0 < cuts < full)
        check_same(replayed, whole, resconv_layers(ready(resnet())))


class Counts(nn.Module):
    """Adds how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


def numpy_mean(x):
    return x + torch.from_numpy(x.detach().numpy().mean(keepdims=True)).clone()


def from_memory(x):
    return x + sum(ctypes.string_at(x.data_ptr(), x.nbytes)) / 1e3


REFUSED = {
    "value asked": (lambda m, x: m.h(y * 2 if (y := R(m.a(x))).max() > 0.1 else y), {}, "reads values"),
    "mask": (lambda m, x: (y := R(m.a(x)).flatten(1))[y > 0].sum().reshape(1, 1), {}, "reads values"),
    "random": (lambda m, x: m.h(F.dropout(m.a(x), 0.5, True)), {}, "random numbers"),
    "state": (lambda m, x: m.h(m.k(m.a(x))), {"k": Counts}, "writes into a tensor"),
    "state, by a view": (lambda m, x: m.h(m.a(x) + m.k.calls[:1].add_(1)), {"k": Counts}, "writes into a tensor"),
    "NumPy": (lambda m, x: m.h(numpy_mean(m.b(R(m.a(x))))), TWO, "reads values"),
    "out of sight": (lambda m, x: m.h(from_memory(m.b(R(m.a(x))))), TWO, "replayed output without"),
}


@pytest.mark.usefixtures("fresh_logging")
@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_cannot_be_replayed_runs_whole(name, caplog):
    fn, modules, reason = REFUSED[name]
    model = ready(Wired(fn, ONE | HEAD | modules, True)).eval()
    with pytest.raises(NotReplayable, match=reason):
        both(model)
    with caplog.at_level("INFO", "tp_importance"):
        found = passes_of(model, resconv_layers(model), dict.fromkeys(resconv_layers(model), 1.0), BATCHES, None)
    assert isinstance(found, WholePasses) and "whole passes because" in caplog.text


@torch.no_grad()
def test_views_that_other_layouts_do_not_have():
    model = ready(Wired(lambda m, x: m.f(R(m.a(x)).view(len(x), -1)), ONE | {"f": lambda: nn.Linear(512, 4)}, False))
    with pytest.raises(NotReplayable, match="view"):
        both(model, channels_last=True)
    layers = resconv_layers(model)
    found = passes_of(model.eval(), layers, dict.fromkeys(layers, 1.0), BATCHES, None)
    assert isinstance(found, ReplayedPasses)


@torch.no_grad()
def test_batches_of_another_form():
    def run(net, batch):
        return {"logits": net(batch["pixels"]) + batch["more"][0].mean()}

    model, batches = ready(resnet()), [{"pixels": x, "more": [x, None, "word"]} for x in BATCHES]
    replayed, whole = both(model, batches, run)
    check_same(replayed, whole, resconv_layers(model))


# --- how much is run --------------------------------------------------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """Counts the samples that convolutions see."""

    samples = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.samples += len(args[0]) if "convolution" in str(func) else 0
        return func(*args, **(kwargs or {}))


def gentle(model: nn.Module) -> nn.Module:
    """Layers that add little, so that many can go before the output is another one."""
    for i, layer in enumerate(resconv_layers(model).values()):
        layer.s.data *= 0.1 + 0.1 * (i % 5)
    return model


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv_bn_relu(3, 8), *(Basic() for _ in range(8)), head(8))


@pytest.mark.parametrize(("make", "most"), [(passes_of, 12.0), (WholePasses, 45.0)], ids=["replayed", "whole"])
def test_how_much_is_run(make, most, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    model = gentle(ready(deep(), a=(0.5, 1.2))).eval()
    batches = [torch.randn(8, 3, 8, 8, generator=generator).double() for _ in range(8)]
    monkeypatch.setattr("tp_importance.methods.resconv.losses.passes_of", make)
    layers = resconv_layers(model)
    controls = removal_controls(model, layers, batches, X)
    with Convolutions() as counted:
        output_losses(model, layers, batches, X, controls=controls)
    bare = 18 * 64  # convolutions × samples of a pass
    assert len(layers) == 16 and most / 2 < counted.samples / bare <= most, counted.samples / bare


def test_nothing_is_done_twice():
    calls = []
    pruner = fresh(importance="output", loader=[x.float() for x in BATCHES])
    pruner.layers["1.conv2"].a.data.zero_()
    pruner.model[0].register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    for _ in range(2):
        pruner.plan()
        # example inputs: what reads what; batches: what layers hand on, and recording; the first: with layers left out
        assert calls == [2, *(4, 1, 2), 4, 4, 1, 2]
        calls.clear()
    model = resnet()
    model[0].register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    ResConvPruner(model, X.float(), budget=Budget(macs=0.8))
    assert calls == [2, 2, 2]  # before and after the conversion, and what it costs


def test_the_registered_method_plans_once(monkeypatch):
    plans, real = [], ResConvPruner.plan
    monkeypatch.setattr(ResConvPruner, "plan", lambda self, *args: plans.append(args) or real(self, *args))
    train = partial(torch.nn.Module.train, mode=True)
    job = Job(
        resnet(), X.float(), [x.float() for x in BATCHES], Budget(macs=0.8), {"importance": "output"}, train=train
    )
    find_method("resconv").prune(job)
    assert len(plans) == 1 and not resconv_layers(job.model)


# --- the definition ---------------------------------------------------------------------------------------------------


def slow_losses(model, controls, x):
    """Lazy greedy elimination, every answer by the whole network."""
    dense = model(x)
    twin = copy.deepcopy(model)

    def error_without(*names):
        factors = {name: (layer.s.clone(), layer.a.clone()) for name, layer in resconv_layers(twin).items()}
        for name in names:
            twin.get_submodule(name).s.fill_(0.0)
            twin.get_submodule(name).a.fill_(controls[name])
        error = float((twin(x) - dense).square().sum() / dense.square().sum())
        for name, (s, a) in factors.items():
            twin.get_submodule(name).s.copy_(s)
            twin.get_submodule(name).a.copy_(a)
        return error

    known, found, worst = {name: error_without(name) for name in controls}, {}, 0.0
    while known:
        fresh_ones = set()
        while (chosen := min(known, key=known.get)) not in fresh_ones and worst <= 1.0:
            known[chosen] = error_without(*found, chosen)
            fresh_ones.add(chosen)
        worst = max(worst, known.pop(chosen))
        found[chosen] = worst
        for name in known if worst <= 1.0 else ():
            if name.rpartition(".")[0] == chosen.rpartition(".")[0]:
                known[name] = error_without(*found, name)
    return found


@pytest.mark.parametrize("build", [resnet, deep])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_the_losses_are_those_of_the_slow_definition(build, seed):
    model = gentle(ready(build(), a=(0.5, 1.2), seed=seed)).eval()
    layers, x = resconv_layers(model), torch.cat(BATCHES)
    controls = {name: layer.a.item() for name, layer in layers.items()}
    found, slow = output_losses(model, layers, [x], X), slow_losses(model, controls, x)
    assert found == pytest.approx(slow, rel=1e-6)
    assert list(found) == list(layers) and sorted(found.values())[3] < 1.0


@pytest.mark.parametrize("kind", [ReplayedPasses, WholePasses])
@pytest.mark.parametrize("name", ["remove", "changes", "__init__"])
def test_everything_comes_back_when_a_pass_fails(kind, name, monkeypatch):
    pruner = fresh(importance="output", loader=[x.float() for x in BATCHES])
    pruner.model.train()
    snapshot, real, calls = Snapshot(pruner.model), getattr(kind, name), iter(range(9))

    def fails(*args):
        result = real(*args)
        if next(calls) == (0 if name == "__init__" else 2):
            if name == "changes":
                next(result)
            raise LookupError(name)
        return result

    if kind is WholePasses:
        monkeypatch.setattr("tp_importance.methods.resconv.losses.passes_of", WholePasses)
    monkeypatch.setattr(kind, name, fails)
    with pytest.raises(LookupError, match=name):
        pruner.losses()
    snapshot.check()


def test_a_loader_without_batches():
    with pytest.raises(ValueError, match="the loader gave no batch"):
        fresh(importance="output", loader=[]).losses()


def test_bars_have_names_and_totals(capsys):
    pruner = fresh(importance="output", loader=[x.float() for x in BATCHES])
    pruner.layers["1.conv2"].a.data.zero_()
    with shown():
        pruner.plan()
    seen = capsys.readouterr().err
    for name, total in {
        "collecting": "3/3",
        "recording the network": "3/3",
        "leaving out single layers": "6/6",
        "ordering layers": "6/6",
    }.items():
        assert any(name in line and total in line for line in seen.replace("\r", "\n").splitlines()), (name, seen)
