"""What only looks at a network leaves it as it was, whatever the network does to itself."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_importance import (
    Budget,
    BudgetPruner,
    CATROImportance,
    OBSImportance,
    Refit,
    count_ops,
    measure_latency,
    prunable_groups,
)
from tp_importance.core.untouched import untouched
from tp_importance.graph.activations import recording
from tp_importance.graph.dataflow import record
from tp_importance.statistics.gradients import loss_gradients
from tp_importance.testing import Snapshot, class_loader
from tp_importance.testing.networks import conv_bn_relu, head, plain

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Store:
    """A cache of somebody's own class."""

    def __init__(self):
        self.calls, self.items = 0, []


class Changing(nn.Module):
    """A network that writes wherever a network can."""

    def __init__(self):
        super().__init__()
        self.body, self.tail = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 12)), head(12)
        self.bias = nn.Parameter(torch.zeros(1, 1, 4, 4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.cache, self.seen, self.sizes, self.nested = {}, [], set(), {"inner": [[]]}
        self.last, self.count, self.plain = None, 0, torch.zeros(2)
        self.array, self.store, self.notes = np.zeros(2), Store(), SimpleNamespace(calls=0)
        self.generator, self.python = torch.Generator().manual_seed(0), random.Random(0)
        self.numbers = np.random.default_rng(0)
        self.hidden = [nn.BatchNorm2d(3)]  # not registered

    def forward(self, x):
        self.steps += 1
        self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        if not self.training and "bias" not in self.cache:  # as LeViT does
            self.cache["bias"] = self.bias.repeat(1, 1, 4, 4)
        self.seen.append(x)
        self.sizes.add(len(self.seen))
        self.nested["inner"][0].append(x)
        self.last, self.count = x * self.bias.mean(), self.count + 1
        self.plain += 1
        self.array += 1
        self.store.calls += 1
        self.store.items.append(x)
        self.notes.calls += 1
        self.hidden[0](x)
        noise = torch.rand((), generator=self.generator) + self.python.random() + self.numbers.random()
        noise = noise + torch.rand(()) + random.random() + np.random.random()  # noqa: NPY002
        x.mul_(2.0)  # into its input
        return self.tail(self.body(x + self.cache.get("bias", self.bias.repeat(1, 1, 4, 4))) + 0 * noise)


def state(model):
    memory = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    for key in ("generator", "python", "numbers", "hidden", "store", "notes"):
        memory.pop(key)
    memory["drawn"] = [model.generator.get_state().tolist(), model.python.getstate()]
    memory["drawn"] += [str(model.numbers.bit_generator.state), torch.get_rng_state().tolist(), random.getstate()]
    memory["drawn"].append(str(np.random.get_state()))  # noqa: NPY002
    memory["objects"] = [dict(vars(model.store)), dict(vars(model.notes))]
    memory["hidden"] = [(k, v.tolist()) for k, v in model.hidden[0].state_dict().items()]
    return copy.deepcopy(memory)


def prune_by(importance):
    def plan(model, x):
        loader = [(x.repeat(8, 1, 1, 1), torch.arange(16) % 4)]
        pruner = BudgetPruner(model, x, loader, budget=Budget(macs=0.5), importance=importance())
        assert not pruner.plan().is_noop

    return plan


def gradients(model, x):
    with loss_gradients(model, [(x, torch.tensor([0, 1]))]):
        pass


LOOKS = {
    "prunable_groups": prunable_groups,
    "without verification": lambda model, x: prunable_groups(model, x, verify=False),
    "count_ops": count_ops,
    "record": record,
    "recording": recording,
    "measure_latency": lambda model, x: measure_latency(model, x, min_run_time=0.001),
    "gradients": gradients,
    "plan by CATRO": prune_by(CATROImportance),
    "plan by OBS": prune_by(OBSImportance),
    "plan by L1": prune_by(lambda: tp.importance.MagnitudeImportance(p=1)),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("look", LOOKS)
def test_looking_changes_nothing(look, training):
    model, x = Changing().train(training), X.clone()
    before, snapshot, dictionaries = state(model), Snapshot(model), [id(model.cache), id(model.seen), id(model.store)]
    LOOKS[look](model, x)
    assert str(state(model)) == str(before)
    snapshot.check()
    assert [id(model.cache), id(model.seen), id(model.store)] == dictionaries
    assert torch.equal(x, X)  # the network got a clone
    copy.deepcopy(model)  # no tensor with a history is left behind


def test_what_a_failing_pass_wrote_is_put_back_too():
    model, x = Changing().eval(), X.clone()
    model.tail[2] = nn.Linear(5, 4)  # does not fit
    before = str(state(model))
    with pytest.raises(RuntimeError):
        count_ops(model, x)
    with pytest.raises(KeyboardInterrupt), untouched(model):
        model.count, model.plain[0], model.extra = 7, 5.0, 1
        model.seen.append(1)
        del model.array
        raise KeyboardInterrupt
    assert str(state(model)) == before and not hasattr(model, "extra")


def test_what_was_there_stays_the_same_object():
    model = Changing()
    with torch.no_grad():
        model.eval()(X.clone())
    cached, buffers = model.cache["bias"], list(model.buffers())
    prunable_groups(model, X)
    assert model.cache["bias"] is cached and len(model.seen) == 1
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


def test_tensors_of_inference_mode_are_put_back():
    model = Changing()
    with torch.inference_mode():
        model.plain = torch.zeros(2)
    with torch.inference_mode():
        with untouched(model):
            model.plain += 1
    assert model.plain.tolist() == [0.0, 0.0]


class WritesIntoItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, x):
        return self.net(x.sub_(0.5).mul_(3.0))


def test_every_pass_of_the_verification_sees_the_same_inputs():
    x = X.clone()
    groups = prunable_groups(WritesIntoItsInput().eval(), x)
    assert groups.names == ["net.0.0", "net.1.0", "net.2.0"]
    assert torch.equal(x, X)


def test_a_loader_keeps_its_values():
    model, loader = WritesIntoItsInput().eval(), class_loader(n=32)
    before = [(images.clone(), labels.clone()) for images, labels in loader]
    pruner = BudgetPruner(model, X, loader, budget=Budget(macs=0.5), importance=CATROImportance())
    pruner.step(refit=Refit("sequential", recalibrate=False))
    assert all(
        torch.equal(a, b) for one, two in zip(before, loader, strict=True) for a, b in zip(one, two, strict=True)
    )


class AddsNoise(nn.Module):
    """Draws random numbers in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, x):
        return self.net(x + torch.randn_like(x))


class CountsItsCalls(nn.Module):
    """Every call gives something else."""

    def __init__(self):
        super().__init__()
        self.net = plain()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x * self.calls)


@pytest.mark.parametrize("network", [AddsNoise, CountsItsCalls])
def test_networks_that_differ_from_call_to_call_are_compared_call_by_call(network):
    groups = prunable_groups(network().eval(), X)
    assert groups.names == ["net.0.0", "net.1.0", "net.2.0"]


def test_lazy_layers_are_named():
    net = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for look in (prunable_groups, count_ops):
        with pytest.raises(TypeError, match=r"0\.weight of the lazy LazyConv2d has no shape yet: run the model once"):
            look(net, X)
    net(X)
    assert prunable_groups(net, X).names == ["0"]
