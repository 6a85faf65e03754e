"""Small networks, one construction each: what lives and dies together, and what stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tp_importance import prunable_groups
from tp_importance.graph.verify import masked_equals_removed, sample_units


class Net(nn.Module):
    """Layers a, b, ... and what is done with them."""

    def __init__(self, run, **layers):
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            elif isinstance(layer, nn.Module):
                self.add_module(name, layer)
            elif isinstance(layer, torch.Tensor):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def conv(i, o, k=1, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def parameter(*shape):
    return nn.Parameter(torch.rand(shape) + 0.5)


IMAGE, SEQUENCE, VECTOR = (2, 3, 8, 8), (2, 5, 6), (2, 6)

# name: (network, input, {group: (width, unit size)}, {layer: kind of exclusion})


class Cut(nn.Module):
    """Cuts the outputs of a layer where a number says, twelve channels and six."""

    def __init__(self, cut):
        super().__init__()
        self.w, self.cut = 6, cut
        self.a, self.left, self.right, self.c = nn.Linear(5, 18), nn.Linear(12, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        left, right = self.cut(self.w, self.a(x))
        return self.c(self.left(left).relu() + self.right(right).relu())


CASES = {
    "add": (
        lambda: Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 2)),
        IMAGE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
    "concat": (
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 8), b=conv(3, 4), c=conv(12, 2)),
        IMAGE,
        {"a": (8, 1), "b": (4, 1)},
        {"c": "output"},
    ),
    "chunk": (
        lambda: Net(lambda m, x: m.c(torch.mul(*m.a(x).chunk(2, 1))), a=conv(3, 8), c=conv(4, 2)),
        IMAGE,
        {"a": (8, 2)},
        {"c": "output"},
    ),
    "gated by halves": (
        lambda: Net(lambda m, x: m.c(F.glu(m.a(x), 1)), a=conv(3, 8), c=conv(4, 2)),
        IMAGE,
        {"a": (8, 2)},
        {"c": "output"},
    ),
    "split by a number that follows": (
        lambda: Net(
            lambda m, x: m.c(sum(t * (i + 1) for i, t in enumerate(m.a(x).split(m.width, 1)))),
            a=conv(3, 8),
            c=conv(4, 2),
            width=4,
        ),
        IMAGE,
        {"a": (8, 2)},
        {"c": "output"},
    ),
    "slices at a fixed place": (
        lambda: Net(
            lambda m, x: (lambda y: m.b(y[:, :3]) + m.c(y[:, 3:]))(m.a(x)), a=conv(3, 8), b=conv(3, 2), c=conv(5, 2)
        ),
        IMAGE,
        {"a/1": (5, 1)},
        {"b": "output"},
    ),
    "channel shuffle": (
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).view(2, 2, -1, 8, 8).transpose(1, 2).flatten(1, 2))),
            a=conv(3, 16),
            b=conv(16, 8, groups=2),
            c=conv(8, 2),
        ),
        IMAGE,
        {"a": (16, 4), "b": (8, 2)},
        {"c": "output"},
    ),
    "pixel shuffle": (
        lambda: Net(lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 12), c=conv(3, 2)),
        IMAGE,
        {"a": (12, 4)},
        {"c": "output"},
    ),
    "pixel unshuffle": (
        lambda: Net(lambda m, x: m.c(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 4), c=conv(16, 2)),
        IMAGE,
        {"a": (4, 1)},
        {"c": "output"},
    ),
    "flatten and unflatten": (
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).flatten(1)).unflatten(1, (-1, 2, 2))),
            a=conv(3, 4),
            b=nn.Linear(256, 24),
            c=conv(6, 2),
        ),
        IMAGE,
        {"a": (4, 1), "b": (24, 4)},
        {"c": "output"},
    ),
    "padded shortcut": (
        lambda: Net(
            lambda m, x: (lambda y: m.c(m.b(y) + F.pad(y, (0, 0, 0, 0, 2, 2))))(m.a(x)),
            a=conv(3, 4),
            b=conv(4, 8),
            c=conv(8, 2),
        ),
        IMAGE,
        {"a": (4, 1)},
        {"b": "pinned", "c": "output"},
    ),
    "spatial gate": (
        lambda: Net(
            lambda m, x: (lambda y: m.c(y * m.g(y).sigmoid()))(m.a(x)), a=conv(3, 8), g=conv(8, 1), c=conv(8, 2)
        ),
        IMAGE,
        {"a": (8, 1)},
        {"g": "minimum", "c": "output"},
    ),
    "expanded spatial gate": (
        lambda: Net(
            lambda m, x: (lambda y: m.c(y * m.g(y).sigmoid().expand_as(y)))(m.a(x)),
            a=conv(3, 8),
            g=conv(8, 1),
            c=conv(8, 2),
        ),
        IMAGE,
        {"a": (8, 1)},
        {"g": "minimum", "c": "output"},
    ),
    "squeeze and excitation": (
        lambda: Net(
            lambda m, x: (lambda y: m.c(y * m.g(y.mean((2, 3), keepdim=True)).sigmoid()))(m.a(x)),
            a=conv(3, 8),
            g=conv(8, 8),
            c=conv(8, 2),
        ),
        IMAGE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
    "softmax over branches": (
        lambda: Net(
            lambda m, x: m.c((torch.stack([m.a(x), m.b(x)], 1).softmax(1) * 2).sum(1)),
            a=conv(3, 8),
            b=conv(3, 8),
            c=conv(8, 2),
        ),
        IMAGE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
    "softmax over channels": (
        lambda: Net(lambda m, x: m.c(m.a(x).softmax(1)), a=conv(3, 8), c=conv(8, 2)),
        IMAGE,
        {},
        {"a": "mixed", "c": "output"},
    ),
    "layer norm": (
        lambda: Net(lambda m, x: m.c(m.n(m.a(x))), a=nn.Linear(6, 8), n=nn.LayerNorm(8), c=nn.Linear(8, 2)),
        SEQUENCE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
    "norm written out": (
        lambda: Net(
            lambda m, x: (lambda y: m.c(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))))(m.a(x)),
            a=nn.Linear(6, 8),
            c=nn.Linear(8, 2),
        ),
        SEQUENCE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
    "depthwise with two filters per channel": (
        lambda: Net(lambda m, x: m.c(m.d(m.a(x))), a=conv(3, 4), d=conv(4, 8, 3, groups=4), c=conv(8, 2)),
        IMAGE,
        {"a": (4, 1)},
        {"c": "output"},
    ),
    "raw parameters": (
        lambda: Net(
            lambda m, x: m.c(m.a(x) * m.scale + m.shift),
            a=nn.Linear(6, 8),
            c=nn.Linear(8, 2),
            scale=parameter(8),
            shift=torch.rand(1, 1, 8),
        ),
        SEQUENCE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
    "functional layers": (
        lambda: Net(
            lambda m, x: m.c(F.linear(m.a(x).relu(), m.weight, m.bias).relu()),
            a=nn.Linear(6, 8),
            c=nn.Linear(7, 2),
            weight=parameter(7, 8),
            bias=parameter(7),
        ),
        SEQUENCE,
        {},
        {"a": "unread", "c": "output"},
    ),
    "recurrent layer": (
        lambda: Net(
            lambda m, x: m.c(m.r(m.a(x))[0]),
            a=nn.Linear(6, 8),
            r=nn.LSTM(8, 4, batch_first=True, bidirectional=True),
            c=nn.Linear(8, 2),
        ),
        SEQUENCE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
    "recurrent cell with its state first": (
        lambda: Net(
            lambda m, x: m.c(m.r(hx=m.state(x).tanh(), input=m.a(x).relu())),
            a=nn.Linear(6, 8),
            state=nn.Linear(6, 4),
            r=nn.GRUCell(8, 4),
            c=nn.Linear(4, 2),
        ),
        (2, 6),
        {"a": (8, 1)},
        {"state": "mixed", "c": "output"},
    ),
    "packed sequence": (
        lambda: Net(
            lambda m, x: m.c(m.r(pack_padded_sequence(m.a(x), torch.tensor([5, 3]), batch_first=True))[1][0]),
            a=nn.Linear(6, 8),
            r=nn.GRU(8, 4, batch_first=True),
            c=nn.Linear(4, 2),
        ),
        SEQUENCE,
        {},
        {"a": "mixed", "c": "output"},
    ),
    "layer that runs twice": (
        lambda: Net(lambda m, x: m.c(m.b(m.b(m.a(x)).relu())), a=conv(3, 8), b=conv(8, 8), c=conv(8, 2)),
        IMAGE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
    "blocks told by a number": (
        lambda: Cut(lambda w, x: x.split([2 * w, w], -1)),
        (2, 5),
        {"a": (18, 3), "left": (5, 1)},
        {"c": "output"},
    ),
    "slices at a multiple of a number": (
        lambda: Cut(lambda w, x: (x[..., : w * 2], x[..., w * 2 :])),
        (2, 5),
        {"a/0": (12, 2), "a/1": (6, 1), "left": (5, 1)},
        {"c": "output"},
    ),
    "written in place": (
        lambda: Net(lambda m, x: (lambda y: (y[:, :, 1:].mul_(2), m.c(y))[1])(m.a(x)), a=conv(3, 8), c=conv(8, 2)),
        IMAGE,
        {"a": (8, 1)},
        {"c": "output"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_lives_and_dies_together(name):
    torch.manual_seed(0)
    build, shape, expected, stays = CASES[name]
    model, x = build().eval(), torch.randn(shape)
    groups = prunable_groups(model, x)
    assert {g.name: (g.width, g.unit_size) for g in groups} == expected
    kinds = {layer: e.kind for e in groups.excluded for layer in e.layers}
    assert {layer: kinds.get(layer) for layer in stays} == stays
    if len(groups):
        assert masked_equals_removed(groups, x, sample_units(groups)) is None


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.inner, self.last = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.tokens(x)
        return self.last(y + self.inner(y))


def test_the_columns_of_an_embedding_are_its_channels():
    groups = prunable_groups(Embedded(), torch.randint(0, 10, (2, 5), generator=torch.Generator().manual_seed(0)))
    sides = [(m.name, m.role, m.width) for m in groups["inner"].members]
    assert sides == [("tokens", "out", 8), ("inner", "in", 8), ("inner", "out", 8), ("last", "in", 8)]


@pytest.mark.parametrize(
    ("squeeze", "fewest"),
    [
        (lambda y: y.squeeze(), 2),
        (lambda y: y.squeeze(1).flatten(1), 2),
        (lambda y: y.squeeze((2, 3)), 1),
        (lambda y: y.squeeze(-1).squeeze(-1), 1),
    ],
)
def test_channels_that_could_be_squeezed_away_keep_two(squeeze, fewest):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(squeeze(self.conv(x).mean((2, 3), keepdim=True)))

    assert prunable_groups(Pooled(), torch.randn(2, 3, 8, 8))["conv"].min_units == fewest
