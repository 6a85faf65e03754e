"""Networks that fail, change their mind, or return something strange: it works, or one error says what is wrong."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tp_importance import Budget, prunable_groups, prune
from tp_importance.errors import TracingError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions and a linear layer; subclasses change what happens around them."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 2)
        self.eval()

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


def pruned_to_half(model: nn.Module, x: object, **options: object) -> tuple[int, int]:
    """Widths after a pruning to half of the MACs."""
    done = prune(model, x, [x], budget=Budget(macs=0.5), method="l2", refit=None, samples=None, **options)
    assert done.report.cost.macs <= 0.5 * done.report.dense.macs
    return model.a.out_channels, model.b.out_channels


# -- a forward pass that raises


class Raises(Net):
    def forward(self, x):
        raise KeyError("no such feature")


class RaisesInLayer(Net):
    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(9, 6, 3)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Raises, "could not trace Raises: KeyError: 'no such feature'. Check that the model runs on example_inputs"),
        (RaisesInLayer, "could not trace RaisesInLayer: RuntimeError: Given groups=1, weight of size .6, 9, 3, 3."),
    ],
)
def test_a_forward_pass_that_raises_is_named(make, message, verify):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TracingError, match=message):
        prunable_groups(model, X, verify=verify)
    with pytest.raises(TracingError, match=message):
        pruned_to_half(model, X)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class FailsLater(Net):
    """Some passes run, all others do not: a stream that is used up, say, which no copy of the network restores."""

    left = 0

    def forward(self, x):
        if not FailsLater.left:
            raise StopAsyncIteration("the stream is used up")
        FailsLater.left -= 1
        return super().forward(x)


def passes_needed() -> int:
    FailsLater.left = 1000
    assert prunable_groups(FailsLater(), X).names == ["a", "b"]
    return 1000 - FailsLater.left


def test_a_pass_that_fails_later():
    """Whichever pass fails: one error, or groups that are left out because nobody could verify them."""
    needed, told = passes_needed(), []
    for passes in range(needed):
        FailsLater.left = passes
        try:
            groups = prunable_groups(FailsLater(), X)
        except (TracingError, ValueError) as error:
            told.append(str(error))
        else:
            assert groups.names == []
            told.append({e.name: e.reason for e in groups.excluded}["a"])
    assert len(told) == needed >= 3 and all("the stream is used up" in text for text in told)


# -- control flow that depends on data


class Alternates(Net):
    """Another way through the layers with every pass: a counter outside of the network, which nobody can put back."""

    passes = 0

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 6, 3)

    def forward(self, x):
        Alternates.passes += 1
        y = self.a(x).relu()
        y = self.b(y) if Alternates.passes % 2 else self.c(y)
        return self.head(y.relu().mean((2, 3)))


@pytest.mark.parametrize("first", [0, 1])
def test_ways_that_differ_between_passes(first):
    """One error, or nothing is offered that one of the ways would have needed."""
    Alternates.passes = first
    try:
        groups = prunable_groups(Alternates(), X)
    except (TracingError, ValueError) as error:
        assert "Alternates" in str(error)
        return
    assert groups.names == [], groups.names


class Counts(Net):
    """The same with a counter inside of the network: it is put back, and every pass goes the same way."""

    def __init__(self):
        super().__init__()
        self.c, self.counter = nn.Conv2d(8, 6, 3), [0]

    def forward(self, x):
        self.counter[0] += 1
        y = self.a(x).relu()
        y = self.b(y) if self.counter[0] % 2 else self.c(y)
        return self.head(y.relu().mean((2, 3)))


def test_counters_of_the_network_are_put_back():
    model = Counts()
    assert prunable_groups(model, X).names == ["a", "b"] and model.counter == [0]


class Branches(Net):
    """Chooses by the data; the same inputs always go the same way."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 6, 3)

    def forward(self, x):
        y = self.a(x).relu()
        y = self.b(y) if bool(x.mean() > 0) else self.c(y)
        return self.head(y.relu().mean((2, 3)))


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_ways_that_the_data_choose(shift):
    """A network is what its example inputs run."""
    model, taken = Branches(), "b" if shift > 0 else "c"
    groups = prunable_groups(model, X + shift)
    assert groups.names == ["a", taken] and {m.name for m in groups["a"].members} == {"a", taken}


class Loops(Net):
    """As many passes through a layer as the data ask for."""

    def forward(self, x):
        y = self.a(x)
        for _ in range(int(x.abs().sum()) % 2 + 2):
            y = y + y.relu()
        return self.head(self.b(y).mean((2, 3)))


def test_loops_whose_length_the_data_give():
    model = Loops()
    assert prunable_groups(model, X).names == ["a", "b"]
    assert pruned_to_half(model, X)[0] < 8


# -- outputs


class Returns(Net):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(super().forward(x))


@dataclass
class Detections:
    boxes: Tensor
    names: list[str]


class Box:
    """Nobody knows what is inside."""

    def __init__(self, scores):
        self.scores = scores


@pytest.mark.parametrize(
    ("what", "name"),
    [(lambda y: None, "NoneType"), (lambda y: y.tolist(), "list"), (lambda y: {"label": 3}, "dict"), (Box, "Box")],
)
def test_outputs_without_tensors_ask_for_an_output_transform(what, name):
    with pytest.raises(TracingError, match=f"the network returns no tensor, but {name}; give output_transform"):
        prunable_groups(Returns(what), X)


@pytest.mark.parametrize(
    "what",
    [
        lambda y: {"scores": y, "label": "cat"},
        lambda y: [None, (y, 3.0)],
        lambda y: Detections(y, ["cat"]),
    ],
)
def test_tensors_are_found_in_structures(what):
    model = Returns(what)
    groups = prunable_groups(model, X)
    assert groups.names == ["a", "b"] and [(e.name, e.kind) for e in groups.excluded] == [("head", "output")]
    assert pruned_to_half(model, X) < (8, 6)


def test_an_output_transform_says_where_the_tensors_are():
    model = Returns(Box)
    groups = prunable_groups(model, X, output_transform=lambda box: box.scores)
    assert groups.names == ["a", "b"] and [e.kind for e in groups.excluded] == ["output"]
    assert pruned_to_half(model, X, output_transform=lambda box: box.scores) < (8, 6)


class Features(Net):
    def forward(self, x):
        features = self.a(x).relu()
        return features, self.head(self.b(features).relu().mean((2, 3)))


def test_an_output_transform_may_leave_outputs_out():
    """What is left out of the output may be pruned."""
    assert prunable_groups(Features(), X).names == ["b"]
    assert prunable_groups(Features(), X, output_transform=lambda out: out[1]).names == ["a", "b"]


def test_an_output_transform_that_fails_is_named():
    with pytest.raises(TracingError, match=r"could not trace Net: IndexError: .*output_transform"):
        prunable_groups(Net(), X, output_transform=lambda out: out[:, 7, 3, 1])


# -- number formats


class Words(Net):
    """Token numbers in, scores out."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(20, 6)
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, tokens, mask=None):
        y = self.embedding(tokens)
        y = self.b(self.a(y).relu()).relu()
        return self.head((y if mask is None else y * mask[..., None]).mean(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_whole_numbers_as_inputs(dtype):
    tokens = torch.randint(0, 20, (2, 5), dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert prunable_groups(Words(), tokens).names[-2:] == ["a", "b"]
    model = Words()
    done = prune(model, tokens, [tokens], budget=Budget(macs=0.5), method="l2", refit=None, samples=None)
    assert done.report.cost.macs <= 0.5 * done.report.dense.macs and model(tokens).shape == (2, 2)


def test_a_mask_beside_token_numbers():
    tokens = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    assert prunable_groups(Words(), {"tokens": tokens, "mask": mask}).names[-2:] == ["a", "b"]


class Bytes(Net):
    """Images as bytes, as a camera gives them."""

    def forward(self, x):
        return super().forward(x.to(self.a.weight.dtype) / 255)


def test_bytes_as_inputs():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = Bytes()
    assert prunable_groups(model, images).names == ["a", "b"]
    assert pruned_to_half(model, images) < (8, 6)


def test_whole_numbers_for_a_network_of_floats_are_refused():
    with pytest.raises(TracingError, match=r"could not trace Net: RuntimeError: .*[Ll]ong.*dtype"):
        prunable_groups(Net(), (X * 10).long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    """Half precision is verified in float32; what is pruned keeps its own."""
    model = Net().to(dtype)
    groups = prunable_groups(model, X.to(dtype))
    assert groups.names == ["a", "b"] and [e.kind for e in groups.excluded] == ["output"]
    assert pruned_to_half(model, X.to(dtype)) < (8, 6)
    assert {p.dtype for p in model.parameters()} == {dtype}


class Mixed(Net):
    """A network that casts on its way."""

    def forward(self, x):
        y = self.b(self.a(x.to(self.a.weight.dtype)).relu()).relu().mean((2, 3))
        return self.head(y.to(self.head.weight.dtype))


def test_layers_of_different_precisions():
    model = Mixed()
    model.a.bfloat16(), model.b.bfloat16()
    assert prunable_groups(model, X).names == ["a", "b"]


def test_inputs_of_another_precision_than_the_network_are_refused_by_name():
    with pytest.raises(
        TracingError, match=r"could not trace Net: RuntimeError: .*inputs are float16 and the weights float32"
    ):
        prunable_groups(Net(), X.half())
