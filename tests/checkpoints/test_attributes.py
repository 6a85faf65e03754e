"""Attributes of modules come back from a checkpoint as they were saved, whatever plain values they are."""

import argparse
import collections
import dataclasses
import enum
import functools
import random
import re
import struct
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tp_importance.checkpoints import checkpoint
from tp_importance.checkpoints.attributes import check_encoded, decoded, encoded, same_value
from tp_importance.checkpoints.checkpoint import load_pruned, save_pruned
from tp_importance.checkpoints.content import content_digests


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pruned.pt"


class Mode(enum.Enum):
    SUM = "sum"
    MEAN = "mean"


Point = collections.namedtuple("Point", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Config:
    scale: float = 1.0
    heads: tuple = (4, 4)
    mode: Mode = Mode.SUM
    sizes: dict = dataclasses.field(default_factory=dict)
    total: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        object.__setattr__(self, "total", sum(self.heads))


class Net(nn.Module):
    """Its attribute ``value`` is what the factory gives, and its layer is of any width."""

    def __init__(self, value=None, width=4):
        super().__init__()
        self.value = value
        self.layer = nn.Linear(3, width)

    def forward(self, x):
        return self.layer(x)


def loaded(saved, like, path):
    """``value`` of a pruned network after it was saved and loaded into one that had ``like``; no warning."""
    save_pruned(Net(saved, 2), path)
    torch.load(path, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_pruned(lambda: Net(like), path)
    assert model.layer.out_features == 2
    return model.value


def exact(one, other):
    """The same types and bits, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    if dataclasses.is_dataclass(one):
        return all(exact(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, (argparse.Namespace, types.SimpleNamespace)):
        return exact(vars(one), vars(other))
    if isinstance(one, dict):
        return exact(list(one.items()), list(other.items()))
    if isinstance(one, (set, frozenset)):
        return exact(sorted(one, key=repr), sorted(other, key=repr))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(exact, one, other))
    return one == other


VALUES = [
    None,
    True,
    False,
    0,
    -3,
    2**80,
    0.1,
    -0.0,
    float("inf"),
    5e-324,
    float("nan"),
    "",
    "reflect ü 漢",
    torch.float16,
    torch.Size([3, 4]),
    torch.Size([]),
    (),
    (1, 2),
    [1, 2],
    [0.5, None, "x", (True, 1)],
    {},
    {"heads": [2, 4], 3: {"deep": (0.1,)}, None: 1, (1, 2): "pair"},
    {1, 2, 3},
    frozenset({"a", (1, "b")}),
    [[[[]]]],
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("like", [None, 7, 1.0, "dense", [1], {"heads": [4]}])
def test_plain_values_of_the_file_replace_those_of_the_factory(path, value, like):
    assert exact(loaded(value, like, path), value)


@pytest.mark.parametrize(
    ("saved", "like"), [(1, True), (True, 1), (1.0, 1), (0.0, -0.0), ([1], (1,)), (torch.Size([1]), (1,)), ("1", 1)]
)
def test_values_that_are_equal_and_not_the_same(path, saved, like):
    assert exact(loaded(saved, like, path), saved)


def test_any_float_keeps_its_bits(path):
    drawn = random.Random(0)
    values = [struct.unpack("d", struct.pack("Q", drawn.getrandbits(64)))[0] for _ in range(500)]
    assert exact(loaded(values, [0.0], path), values)


def test_numpy_scalars_become_builtin(path):
    given = [np.int64(3), np.float32(0.1), np.bool_(True), np.str_("a"), {np.int32(2): np.float64(0.5)}]
    assert exact(loaded(given, None, path), [3, float(np.float32(0.1)), True, "a", {2: 0.5}])


CHANGED = [
    (Config(0.5, (2, 4), Mode.MEAN, {"a": [1]}), Config()),
    (Mode.MEAN, Mode.SUM),
    (Point(1, 2.5), Point(0, 0)),
    (argparse.Namespace(width=2, rate=0.1), argparse.Namespace(width=4)),
    (types.SimpleNamespace(width=2, inner=[Mode.MEAN]), types.SimpleNamespace(width=4, inner=[Mode.SUM])),
    (collections.OrderedDict(b=1, a=2), collections.OrderedDict(a=2, b=1)),
    (collections.defaultdict(list, a=[1]), collections.defaultdict(list)),
    ([Config(0.1), Config(0.2)], [Config()]),
    ({"config": Config(0.1), "modes": [Mode.SUM]}, Config()),
]


@pytest.mark.parametrize(("value", "like"), CHANGED)
def test_configurations_come_back_as_what_they_were(path, value, like):
    found = loaded(value, like, path)
    assert exact(found, value)
    if isinstance(value, collections.defaultdict):
        assert found.default_factory is list


def test_no_code_of_a_class_runs(path, monkeypatch):
    given = Config(0.5, (2,))
    object.__setattr__(given, "total", 99)  # not what __post_init__ computes
    monkeypatch.setattr(Config, "__post_init__", None)
    save_pruned(Net(given), path)
    like = Config.__new__(Config)
    for field in dataclasses.fields(Config):
        object.__setattr__(like, field.name, getattr(given, field.name))
    object.__setattr__(like, "scale", 1.0)
    found = load_pruned(lambda: Net(like), path).value
    assert exact(found, given) and like.scale == 1.0


def test_the_factory_keeps_its_object_where_nothing_changed(path):
    like = {"a": [1, 2.0], "config": Config()}
    save_pruned(Net({"a": [1, 2.0], "config": Config()}), path)
    assert load_pruned(lambda: Net(like), path).value is like


@pytest.mark.parametrize("changed", [True, False])
def test_modules_that_share_a_configuration_go_on_to_share_one(path, changed):
    def network(width):
        config = argparse.Namespace(width=width)
        return nn.ModuleList([Net(config), Net(config), Net(argparse.Namespace(width=width))])

    save_pruned(network(2 if changed else 4), path)
    again = load_pruned(lambda: network(4), path)
    assert [net.value.width for net in again] == [2 if changed else 4] * 3
    assert again[0].value is again[1].value and again[0].value is not again[2].value


def trees(drawn, depth):
    """Random nested values of every kind that is plain."""
    if depth == 0 or drawn.random() < 0.3:
        bits = drawn.getrandbits(64)
        return drawn.choice(
            [
                *[None, True, bits, -bits, struct.unpack("d", struct.pack("Q", bits))[0], chr(bits % 0xD800)],
                *[torch.int8, torch.Size([bits % 7, 2]), drawn.choice(list(Mode))],
            ]
        )
    parts = [trees(drawn, depth - 1) for _ in range(drawn.randrange(4))]
    keys = drawn.sample([None, 0, 1.5, "a", "b", (1, "c"), torch.half], len(parts))
    named = {f"k{i}": part for i, part in enumerate(parts)}
    return drawn.choice(
        [
            *[parts, tuple(parts), dict(zip(keys, parts, strict=True)), types.SimpleNamespace(**named)],
            *[Point(parts, None), Config(0.5, (1,), Mode.MEAN, named), collections.OrderedDict(named)],
        ]
    )


def test_random_values_come_back_and_are_told_apart(path):
    like = [Config(), Mode.SUM, Point(0, 0), types.SimpleNamespace(), collections.OrderedDict()]
    drawn = random.Random(1)
    values = [trees(drawn, 4) for _ in range(300)]
    assert exact(loaded(values, like, path), values)
    known = {}
    codes = [encoded(value, known) for value in values]
    for value, code in zip(values, codes, strict=True):
        check_encoded(code)
        assert exact(decoded(code, known), value)
        other = drawn.randrange(len(values))
        assert same_value(code, codes[other]) or not exact(value, values[other])
        assert not same_value(code, codes[other]) or repr(value) == repr(values[other])


# What cannot be kept.


def relu_net(function):
    return nn.Sequential(nn.Linear(2, 2), Net(function))


@pytest.mark.parametrize(
    "value",
    [torch.relu, nn.ReLU, len, torch.ones(2), np.ones(2), [torch.ones(1)], object(), lambda x: x, 1j, b"x", [len]],
)
def test_other_values_come_from_the_factory_without_a_word_if_they_are_of_a_kind(path, value):
    assert loaded(value, value, path) is value


def test_another_function_is_named(path):
    save_pruned(relu_net(torch.tanh), path)
    with pytest.warns(UserWarning, match=r"'value' of layer '1' was a \S+\.tanh and is \S+\.relu\."):
        again = load_pruned(lambda: relu_net(torch.relu), path)
    assert again[1].value is torch.relu
    with pytest.raises(ValueError, match="value=None in its config, which would hide 'value'"):
        save_pruned(relu_net(None), path)
        load_pruned(lambda: relu_net(torch.relu), path)


def test_code_that_was_replaced_is_named_and_what_was_only_added_is_not(path):
    model = Net()
    model.history, model.cache = [object()], torch.ones(2)
    save_pruned(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(load_pruned(Net, path), "history")
    model.forward = types.MethodType(lambda self, x: x, model)
    save_pruned(model, path)
    with pytest.warns(UserWarning, match=r"'forward' of layer '' was a .*<lambda> and is that of its class"):
        load_pruned(Net, path)


def test_classes_come_from_the_factory(path):
    save_pruned(Net(Config(0.5)), path)
    with pytest.warns(UserWarning, match=rf"'value' of layer '' was a {__name__}.Config and is builtins.NoneType"):
        assert load_pruned(Net, path).value is None
    model = Net()
    model.added = Config(0.5)
    save_pruned(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(load_pruned(Net, path), "added")
    assert exact(load_pruned(lambda: Net(Config()), path).added, Config(0.5))


class Counted(nn.Module):
    def __init__(self, n=1):
        super().__init__()
        self.n, self._hidden = n, n

    @functools.cached_property
    def doubled(self):
        return 2 * self.n


def test_what_is_computed_and_what_is_private_stays_the_factorys(path):
    model = Counted(3)
    assert model.doubled == 6
    save_pruned(model, path)
    content = torch.load(path, weights_only=True)
    assert content["modules"][""]["config"] == {"n": 3} and content["modules"][""]["other"] == {}
    again = load_pruned(Counted, path)
    assert (again.n, again._hidden, again.doubled) == (3, 1, 6)


def test_nothing_hides_a_tensor_or_layer(path):
    """``None`` in an attribute where the factory registers a tensor."""
    save_pruned(nn.MultiheadAttention(4, 2), path)  # bias_k is an attribute there, else a parameter
    again = load_pruned(lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), path)
    assert again.bias_k is None and "bias_k" in again._parameters


def test_settings_of_layers_are_those_that_were_saved(path):
    def network(rate, size):
        return nn.Sequential(nn.Dropout(rate), nn.Upsample(scale_factor=size), nn.GELU(), nn.LayerNorm(4, eps=rate))

    model = network(0.25, 3.0)
    model[2].approximate = "tanh"
    save_pruned(model, path)
    again = load_pruned(lambda: network(0.5, 2.0), path)
    assert (again[0].p, again[1].scale_factor, again[2].approximate, again[3].eps) == (0.25, 3.0, "tanh", 0.25)


def test_a_value_that_contains_itself_is_left_to_the_factory(path):
    cyclic = []
    cyclic.append(cyclic)
    assert loaded(cyclic, [], path) == []


# Files.


def rewritten(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    content["digests"] = content_digests(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"heads": 1}, "no number, text, list, tuple or record"),
        ({}, "no number, text"),
        ({"class": "builtins.dict"}, "no number, text"),
        ({"class": 3, "items": {}}, "no number, text"),
        ({"class": "builtins.dict", "items": {}, "fields": {}}, "no number, text"),
        ({"class": "builtins.dict", "items": []}, "no record of a builtins.dict"),
        ({"class": "builtins.dict", "fields": {}}, "no record of a builtins.dict"),
        ({"class": "builtins.set", "items": {}}, "no record of a builtins.set"),
        ({"class": "builtins.eval", "members": [1]}, "no record of a builtins.eval"),
        ({"class": f"{__name__}.Config", "fields": {1: 2}}, "field whose name is no text"),
        ([{"class": "builtins.dict", "items": {"a": {}}}], "no number, text"),
        ({"class": f"{__name__}.Config", "fields": {"scale": 2.0}}, "attribute 'value' of layer '' cannot be made"),
        ({"class": f"{__name__}.Config", "items": {}}, "cannot be made .*which the .*Config of the factory's"),
        ({"class": f"{__name__}.Mode", "value": "product"}, "cannot be made .*is not a valid Mode"),
        ({"class": f"{__name__}.Mode", "fields": {"x": 1}}, "cannot be made"),
        ({"class": "builtins.set", "members": [[]]}, "cannot be made .*unhashable"),
    ],
)
def test_values_that_save_pruned_does_not_write_are_refused(path, value, message):
    save_pruned(Net(), path)
    rewritten(path, lambda content: content["modules"][""]["config"].update(value=value))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        load_pruned(lambda: Net([Config(), Mode.SUM]), path)


@pytest.mark.parametrize("other", [None, [], {"value": 3}, {3: "x"}])
def test_entries_of_another_form_are_refused(path, other):
    save_pruned(Net(), path)
    rewritten(path, lambda content: content["modules"][""].update(other=other))
    with pytest.raises(ValueError, match="layer '' must have"):
        load_pruned(Net, path)


def test_older_formats_are_refused(path):
    save_pruned(Net(), path)
    rewritten(path, lambda content: content.update(version=2))
    with pytest.raises(ValueError, match=f"format version 2, not {checkpoint.VERSION}; .*older.*: save the network"):
        load_pruned(Net, path)
