"""Passes that are replayed from layer to layer see what whole passes see, or give way to them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.refit_cases import images
from tp_importance import Refit, prunable_groups
from tp_importance.core.chunks import Chunks
from tp_importance.graph.tape import NotReplayable
from tp_importance.refitting import sequential
from tp_importance.refitting.passes import Networks, ReplayedPasses, Stop, WholePasses
from tp_importance.refitting.refit import refit_consumers

EXACT = Refit("sequential", 1e-3, None)


class Block(nn.Module):
    """Writes into its own tensors, as many networks do."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.relu, self.head = nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.norm(self.a(self.prepared(x))))
        y = self.relu(self.b(x))
        y += x
        y = nn.functional.max_pool2d(y, 2)
        y = self.looked_at(self.relu(y))
        return self.head(self.c(y).mean((2, 3)))

    def prepared(self, x):
        return x

    def looked_at(self, y):
        return y


class Masked(Block):
    """Looks at its inputs."""

    def prepared(self, x):
        return x if bool((x > 3).any()) else x + 0.5


class Scaled(Block):
    """Looks at what its layers give."""

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        y = self.relu(self.b(x))
        return self.head(self.c(y / float(y.mean())).mean((2, 3)))


class Hidden(Block):
    """Does what torch does not see."""

    def looked_at(self, y):
        return y * float(self.b.weight.detach().numpy().sum())


class Listed(Block):
    """Has Python compute with its inputs."""

    def prepared(self, x):
        return x * torch.tensor(x.mean((1, 2, 3)).tolist()).to(x).view(-1, 1, 1, 1)


class Exchanged(Block):
    """Puts values into another tensor out of sight."""

    def looked_at(self, y):
        z = torch.zeros_like(y)
        z.data = 2 * y
        return z


class Early(Block):
    """Uses the weight of a layer before that runs."""

    def prepared(self, x):
        return x * (1 + 5 * self.head.weight.abs().mean())


class Normed(Block):
    """Takes statistics over channels outside of any layer: in the dense network, over all of them."""

    def looked_at(self, y):
        return nn.functional.layer_norm(y, y.shape[1:])


class Heads(Block):
    """Reads a weight for an output that is not the first."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(2, 3)

    def forward(self, x):
        first = super().forward(x)
        return first, self.second(first * float(self.head.weight.abs().sum()))


class Overlapping(nn.Module):
    """Writes into parts of a tensor that it goes on to use, across several layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.d, self.norm, self.head = nn.Conv2d(8, 8, 1), nn.Identity(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        half, turned = y[:, :4], y.permute(0, 2, 3, 1)
        z = self.c(y.relu())
        half += z[:, :4]
        z = self.d(z.relu() + y)
        half *= 2.0
        return self.head(y + z + turned.permute(0, 3, 1, 2)).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(4, 2)
        self.lstm = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x):
        return self.c(self.lstm(self.b(self.a(x).relu()).relu())[0])


STOPS = [Stop("a"), Stop("norm"), Stop("b"), Stop("c"), Stop("head")]


def seen_by(passes):
    return [[(n, d[0].x.clone(), p[0].x.clone()) for n, (d, p) in passes.at(stop)] for stop in STOPS]


@pytest.mark.parametrize("make", [Block, Masked])
@pytest.mark.parametrize("limit", [1 << 30, 28_000, 10_000, 0])
@torch.no_grad()
def test_replayed_passes_see_what_whole_passes_see(make, limit):
    torch.manual_seed(0)
    dense = make().eval()
    pruned, chunks = copy.deepcopy(dense), Chunks([images(7), images(6, 8)], 4)
    pruned.a.weight[2] = 0.0
    given = Networks(dense, pruned, STOPS, None, chunks, len)
    whole, replayed = WholePasses(given), ReplayedPasses(given, limit)
    for a, b in zip(seen_by(replayed), seen_by(whole), strict=True):
        assert [n for n, *_ in a] == [4, 3, 4, 2]
        torch.testing.assert_close(a, b)
    replayed.check()
    assert replayed.count == {1 << 30: 2, 28_000: 6, 10_000: 8, 0: 10}[limit] <= whole.count == 10


@torch.no_grad()
def test_new_weights_count_from_the_next_layer_on():
    torch.manual_seed(0)
    dense = Block().eval()
    pruned = copy.deepcopy(dense)
    given = Networks(dense, pruned, STOPS[2:], None, Chunks([images(8)], 4), len)
    passes = ReplayedPasses(given, 1 << 30)
    for stop in STOPS[2:]:
        found = [p[0].x for _, (_, p) in passes.at(stop)]
        if stop.name == "b":
            pruned.b.weight.mul_(0.5)
            pruned.b.bias.add_(1.0)
    whole = WholePasses(replace(given, chunks=Chunks([images(8)], 8)))
    torch.testing.assert_close(torch.cat(found), next(p[0].x for _, (_, p) in whole.at(STOPS[-1])))
    passes.check()


NETWORKS = [Masked, Scaled, Hidden, Recurrent, Listed, Exchanged, Early, Heads, Normed, Overlapping]


@pytest.mark.parametrize("make", NETWORKS)
def test_any_network_is_refitted_to_the_same_weights(make, monkeypatch):
    torch.manual_seed(0)
    x = images(150) if make is not Recurrent else torch.randn(150, 5, 3)  # two batches of 64 and a smaller one
    dense, fitted, passes = make().double().eval(), [], []
    x = x.double()
    for force in (False, True):
        model = copy.deepcopy(dense)
        if force:
            monkeypatch.setattr(sequential, "ReplayedPasses", _refused)
        groups = prunable_groups(model, x[:2], verify=False)
        report = refit_consumers(model, x[:2], x.split(50), {groups.groups[0].name: [1, 2]}, EXACT, groups=groups)
        fitted.append(torch.cat([t.flatten() for t in model.state_dict().values()]))
        passes.append(report.passes)
    torch.testing.assert_close(*fitted)
    assert (passes[0] == 2) == (make in (Masked, Recurrent, Listed, Normed, Overlapping)) and passes[1] > 2


@pytest.mark.parametrize("limit", [4 << 30, 1_000_000, 700_000, 500_000, 300_000, 0])
def test_tensors_that_overlap_are_kept_where_they_can_be(limit, monkeypatch):
    torch.manual_seed(0)
    dense, x, fitted = Overlapping().double().eval(), images(12).double(), []
    for force in (False, True):
        model = copy.deepcopy(dense)
        if force:
            monkeypatch.setattr(sequential, "ReplayedPasses", _refused)
        how = replace(EXACT, memory_limit=limit)
        refit_consumers(model, x[:2], x.split(5), {"a": [1, 2]}, how, groups=prunable_groups(model, x, verify=False))
        fitted.append(model.state_dict())
    torch.testing.assert_close(*fitted)


@pytest.mark.parametrize("limit", [4 << 30, 0])
def test_a_loader_that_shuffles_keeps_samples_and_labels_together(limit):
    torch.manual_seed(0)
    x, labels = images(256).double(), torch.arange(256) % 2
    x[labels == 1] += 3.0

    class Shuffled:
        def __iter__(self):
            order = torch.randperm(256)
            return iter([(x[i], labels[i]) for i in order.split(32)])

    models, dense = [], Block().double().eval()
    for loader, classes in ((Shuffled(), [0]), ([x[labels == 0]], None)):
        models.append(model := copy.deepcopy(dense))
        groups, how = prunable_groups(model, x[:2], verify=False), replace(EXACT, memory_limit=limit)
        refit_consumers(
            model, x[:2], loader, {"a": [1, 2]}, replace(how, recalibrate=False), groups=groups, classes=classes
        )
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


class Functional(nn.Module):
    """Has a weight that no layer owns, masked for the while, and a buffer that cannot be written to."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 3)
        self.weight = nn.Parameter(torch.randn(6, 6, 3, 3))
        self.register_buffer("one", torch.ones(1).expand(6))

    def forward(self, x):
        x = self.a(x).sigmoid()
        y = (nn.functional.conv2d(x, self.weight) + self.b(x)).relu()
        return self.c(y * self.one.view(-1, 1, 1)).mean((2, 3))


def test_whole_passes_after_replayed_ones_start_from_the_network_as_it_was(monkeypatch):
    torch.manual_seed(0)
    dense, x, fitted = Functional().double().eval(), images(16).double(), []
    for put in (("ReplayedPasses", _refused), ("ReplayedPasses", _Late)):
        monkeypatch.setattr(sequential, *put)
        model = copy.deepcopy(dense)
        groups = prunable_groups(model, x[:2], verify=False)
        report = refit_consumers(model, x[:2], [x], {"a": [1, 2]}, EXACT, groups=groups)
        fitted.append((model.state_dict(), [row.after for row in report.rows]))
    torch.testing.assert_close(*fitted)


class _Late(ReplayedPasses):
    def check(self):
        raise NotReplayable("the networks differ")


def _refused(*_):
    raise NotReplayable("it is to run as a whole")


def test_chunks_join_split_and_keep():
    given = []

    def batches():
        for n in (5, 4, 2):
            given.append(n)
            yield torch.full((n, 3), float(n)), torch.arange(n)

    class Loader:
        def __iter__(self):
            return batches()

    chunks = Chunks(Loader(), 4, 11 * (3 * 4 + 8))
    assert [len(y) for _, y in chunks] == [4, 4, 3] == [len(y) for _, y in chunks] and given == [5, 4, 2]
    assert torch.cat([y for _, y in chunks]).tolist() == [*range(5), *range(4), *range(2)]
    small = Chunks(Loader(), 4, 100)
    assert [len(list(small)) for _ in range(2)] == [3, 3] and len(given) == 9
    assert [len(b[0]) for b in Chunks([(torch.zeros(6, 1), "name"), (torch.zeros(1, 1), "other")], 4)] == [6, 1]


def test_a_loader_that_reuses_its_memory():
    class Buffer:
        def __iter__(self):
            x = torch.empty(3, 2)
            for i in range(3):
                yield x.fill_(i)

    assert torch.cat(list(Chunks(Buffer(), 4, 1 << 20))).mean(1).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_generator_serves_where_it_is_kept():
    assert len(list(chunks := Chunks(iter([torch.zeros(2, 3)]), 4, 1 << 20))) == len(list(chunks)) == 1
    gone = Chunks((x for x in [torch.zeros(2, 3)]), 4, 1)
    list(gone)
    with pytest.raises(TypeError, match="gives its batches only once"):
        list(gone)
