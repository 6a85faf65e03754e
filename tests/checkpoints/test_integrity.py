"""Checkpoints that are damaged, changed by hand, or contradict themselves: the saved network or a ``ValueError``."""

import copy
import random
import re
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
from torch import nn

from tp_importance.checkpoints.checkpoint import load_pruned, save_pruned
from tp_importance.checkpoints.content import content_digests


def network(hidden=6):
    conv = nn.Conv2d(3, hidden, 3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, 4, 1), nn.GroupNorm(2, 4))


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    model = network()
    model(torch.randn(2, 3, 8, 8))
    save_pruned(model, tmp_path / "pruned.pt")
    return tmp_path / "pruned.pt"


def bits(model):
    tensors = (*model.named_parameters(), *model.named_buffers())
    said = [(n, type(m).__name__, {k: v for k, v in vars(m).items() if k[0] != "_"}) for n, m in model.named_modules()]
    return said, [(n, t.dtype, t.shape, t.stride(), t.requires_grad, t.detach().numpy().tobytes()) for n, t in tensors]


def refused(path, factory=network, match="save_pruned|factory"):
    """The message of the ``ValueError``; anything else fails the test."""
    with pytest.raises(ValueError, match=match) as caught:
        load_pruned(factory, path)
    message = str(caught.value)
    assert type(caught.value) is ValueError and str(path) in message
    return message


def rewritten(path, change, sealed=True):
    """Change the content by hand; a hostile hand computes the digests again."""
    content = torch.load(path, weights_only=True)
    change(content)
    if sealed:
        seal(content)
    torch.save(content, path)


def seal(content):
    with suppress(ValueError):  # no digest of such a thing: any will do
        content["digests"] = content_digests(content)


# Damage.


def test_flipped_bits_and_truncations_load_right_or_not_at_all(path):
    whole, expected = path.read_bytes(), bits(load_pruned(network, path))
    random.seed(0)
    damaged = []
    for _ in range(300):
        at = random.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        damaged.append(bytes(flipped))
    damaged += [whole[: random.randrange(len(whole))] for _ in range(30)]
    damaged += [whole[:at] + bytes(64) + whole[at + 64 :] for at in range(0, len(whole), 199)]
    damaged += [whole + b"more", whole[:5000] + whole[5100:], b"x" + whole]
    loaded = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = load_pruned(network, path)
        except ValueError as error:
            assert str(path) in str(error) and "save_pruned" in str(error)
        else:
            loaded += 1
            assert bits(found) == expected
    assert 0 < loaded < len(damaged) / 2  # padding between members does not matter


def test_every_member_is_looked_at(path):
    """A flip in the first byte of any tensor, and of everything else in the archive."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    assert sum("/data/" in member.filename for member in members) == len(network().state_dict())
    for member in members:
        name, extra = struct.unpack_from("<HH", whole, member.header_offset + 26)
        at = member.header_offset + 30 + name + extra
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(path, match=f"{member.filename} is damaged")
    path.write_bytes(whole)
    load_pruned(network, path)


def test_checksums_are_written_even_if_torch_was_told_not_to(path):
    torch.serialization.set_crc32_options(False)
    try:
        save_pruned(network(), path)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert isinstance(load_pruned(network, path), nn.Sequential)


def test_save_without_values_is_noticed(path):
    with torch.serialization.skip_data():
        save_pruned(network(), path)
    refused(path, match="damaged")


# Changed by hand, digests as they were.


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("state_dict/0.weight", lambda c: c["state_dict"]["0.weight"].zero_()),
        ("state_dict/3.weight", lambda c: c["state_dict"].update({"3.weight": c["state_dict"]["3.weight"].double()})),
        ("state_dict/3.weight", lambda c: c["state_dict"].pop("3.weight")),
        ("outside/extra", lambda c: c["outside"].update(extra=torch.ones(1))),
        ("modules/3", lambda c: c["modules"]["3"]["config"].update(groups=7)),
        ("requires_grad/0.weight", lambda c: c["requires_grad"].update({"0.weight": False})),
        ("metadata/1", lambda c: c["metadata"]["1"].update(version=1)),
        ("torch", lambda c: c.update(torch="0")),
        ("digests", lambda c: c.pop("digests")),
    ],
)
def test_a_change_is_named(path, entry, change):
    rewritten(path, change, sealed=False)
    assert entry in refused(path, match="not as save_pruned wrote it")


def test_a_consumer_of_other_channels_is_refused(path):
    """A consumer of 2 inputs behind a layer of 6."""

    def narrow(content):
        content["state_dict"]["3.weight"] = content["state_dict"]["3.weight"][:, :2].clone()
        content["modules"]["3"]["config"]["in_channels"] = 2

    rewritten(path, narrow, sealed=False)
    assert "state_dict/3.weight, modules/3 were changed" in refused(path)


# Changed by a hostile hand: the digests are right.


def config(name, **values):
    return lambda content: content["modules"][name]["config"].update(values)


def state(name, make):
    def change(content):
        content["state_dict"][name] = make(content["state_dict"][name])

    return change


def edited(values, number):
    values = values.clone()
    values[2] = number
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config("3", groups=7), r"layer '3' \(Conv2d\).*groups=7.*divisible"),
        (config("3", groups=0), r"layer '3'.*groups=0 is not positive"),
        (config("3", groups=-1), r"layer '3'.*groups=-1 is not positive"),
        (config("3", groups=2), r"layer '3'.*shape \(4, 6, 1, 1\).*make it \(4, 3, 1, 1\)"),
        (config("3", in_channels=2), r"layer '3'.*in_channels=2.*make it \(4, 2, 1, 1\)"),
        (config("3", kernel_size=(1, 3)), r"layer '3'.*kernel_size=\(1, 3\)"),
        (config("3", stride=(0, 1)), r"layer '3'.*stride=\(0, 1\) must be 2 integers of at least 1"),
        (config("3", padding=(1,)), r"layer '3'.*padding=\(1,\) must be 2 integers"),
        (config("3", dilation=3), r"layer '3'.*dilation=3"),
        (config("1", num_features=5), r"layer '1' \(BatchNorm2d\).*num_features=5"),
        (config("4", num_groups=3), r"layer '4' \(GroupNorm\).*num_groups=3.*divisible"),
        (state("3.weight", lambda t: t[:, :2].clone()), r"layer '3'.*weight has shape \(4, 2, 1, 1\)"),
        (state("3.bias", lambda t: t[:3].clone()), r"layer '3'.*bias has shape \(3,\)"),
        (state("1.running_var", lambda t: t[:3].clone()), r"layer '1'.*running_var has shape \(3,\)"),
        (state("1.num_batches_tracked", lambda t: t.float()), r"num_batches_tracked is of dtype torch.float32"),
        (state("0.weight", lambda t: t.long()), r"requires_grad=True is not possible for '0.weight' of dtype"),
        (state("0.weight", lambda t: t.to("meta")), "meta device"),
        (config("1", eps=float("nan")), r"layer '1' \(BatchNorm2d\): eps=nan must be a finite number and positive"),
        (config("1", eps=float("inf")), r"layer '1'.*eps=inf"),
        (config("1", eps=0.0), r"layer '1'.*eps=0.0"),
        (config("1", eps=-1e-5), r"layer '1'.*eps=-1e-05"),
        (config("1", eps="small"), r"layer '1'.*eps='small'"),
        (config("4", eps=-1e-5), r"layer '4' \(GroupNorm\): eps=-1e-05 must be a finite number and at least 0"),
        (config("3", padding_mode="mirror"), r"layer '3' \(Conv2d\): padding_mode='mirror' is unknown.*or 'circular'"),
        (state("1.running_var", lambda t: edited(t, -0.5)), r"layer '1'.*running_var is -0.5 in channel 2"),
        (state("1.running_var", lambda t: edited(t, float("nan"))), r"layer '1'.*running_var is nan in channel 2"),
        (state("1.running_var", lambda t: edited(t, float("inf"))), r"layer '1'.*running_var is inf in channel 2"),
        (
            state("3.weight", lambda t: t.to(torch.complex64)),
            r"layer '3' \(Conv2d\): its weight is complex64 and strided",
        ),
        (state("3.weight", lambda t: t.to_sparse()), r"layer '3'.*its weight is float32 and sparse_coo in the file"),
        (config("", forward=3), r"layer '' has forward=3.*hide 'forward' of .*Sequential"),
        (config("0", train=1), "layer '0' has train=1.*hide"),
        (config("0", state_dict=(1, 2)), "hide 'state_dict'"),
        (config("0", weight=1), "hide 'weight'"),
        (config("0", _parameters=1), "hide '_parameters'"),
        (config("0", training=True), "hide 'training'"),
        (config("0", __class__=1), "hide '__class__'"),
    ],
)
def test_contradictions(path, change, message):
    rewritten(path, change)
    refused(path, match=message)


class Properties(nn.Module):
    scale = 2
    half = 3

    def __init__(self):
        super().__init__()
        self.type = 4  # hides a method of nn.Module: the user's own matter
        self.act = torch.relu

    @property
    def width(self):
        return 1


def test_attributes_that_may_and_may_not_come_from_the_file(path):
    model = Properties()
    model.scale, model.type, model.later = 5, 6, (7, 8)
    save_pruned(model, path)
    again = load_pruned(Properties, path)
    assert (again.scale, again.type, again.later, again.half) == (5, 6, (7, 8), 3)
    for wrong in ("width", "act", "half"):
        save_pruned(model, path)
        rewritten(path, config("", **{wrong: 1}))
        refused(path, Properties, rf"{wrong}=1 in its config, which would hide '{wrong}'")


def tied():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model.append(model[0])
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["parameters"].update({"0.weight": "1.weight"}), "'0.weight' is said to be the same as '1.weight'"),
        (lambda c: c["parameters"].update({"1.weight": "nothing"}), "'1.weight' is said to be the same as 'nothing'"),
        (lambda c: c["parameters"].update({"x.weight": "0.weight"}), "parameter 'x.weight' has no tensor"),
        (lambda c: c["state_dict"].update({"1.weight": torch.ones(3, 3)}), "tied to '0.weight' but has other values"),
        (lambda c: c["modules"]["0"].update(same_as="2"), "layer '0' is said to be the same as '2'"),
        (lambda c: c["modules"]["1"].update(same_as="0"), "layer '1' is the same as '0' but has other tensors"),
        (lambda c: c["modules"]["2"]["config"].update(in_features=2), "same as '0' but has another class or config"),
        (lambda c: c["modules"].pop(""), "no entry ''"),
        (lambda c: c["modules"].update({"a.b": c["modules"]["1"]}), "layer 'a.b' is in no layer"),
        (lambda c: c["buffers"].update({"1.weight": "1.weight"}), "buffer '1.weight' has no tensor of its own"),
        (lambda c: c["requires_grad"].pop("0.bias"), "'0.bias' is not in all of parameters, requires_grad"),
    ],
)
def test_ties_that_contradict(path, change, message):
    save_pruned(tied(), path)
    assert load_pruned(tied, path)[1].weight.shape == (3, 3)
    rewritten(path, change)
    refused(path, tied, re.escape(message) if ".*" not in message else message)


def test_layers_that_are_built_from_the_file_are_checked(path):
    """The factory has nothing but identities there."""
    save_pruned(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(2, 2)), path)

    def factory():
        return nn.Sequential(nn.Identity(), nn.Identity())

    assert load_pruned(factory, path)[0].weight.shape == (4, 4, 1, 1)
    for values, message in (
        ({"groups": 7}, r"layer '0' cannot be built as Conv2d\(.*groups=7.*divisible"),
        ({"out_channels": 10**15}, r"layer '0' \(Conv2d\).*weight has shape"),  # and no memory is asked for
        ({"padding_mode": "mirror"}, r"layer '0' cannot be built as Conv2d\(.*padding_mode='mirror'"),
        ({"kernel_size": "big"}, "layer '0' cannot be built as Conv2d"),
    ):
        save_pruned(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(2, 2)), path)
        rewritten(path, config("0", **values))
        refused(path, factory, message)
    save_pruned(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(2, 2)), path)

    def without(content):
        for section in ("state_dict", "parameters", "requires_grad"):
            del content[section]["0.weight"]

    rewritten(path, without)
    refused(path, factory, r"layer '0' \(Conv2d\): its weight is missing")


WRONG = (None, 0, -1, 1.5, True, "x", b"x", [1], ("a",), {}, {1: 2}, {"x": None}, torch.ones(2, 2), torch.Size([2]))


def places(value, at=()):
    """Paths to everything in nested dicts."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))


@pytest.mark.parametrize("sealed", [True, False])
def test_anything_anywhere_of_a_wrong_type(path, sealed):
    """Every entry of every dict deleted, or another value in its place: the same network, or refused."""
    expected, content = bits(load_pruned(network, path)), torch.load(path, weights_only=True)
    random.seed(1 + sealed)
    for place in places({k: v for k, v in content.items() if k != "digests" or not sealed}):
        deep = place and place[0] in ("digests", "modules", "metadata")
        for wrong in (KeyError, *(random.sample(WRONG, 1) if deep else WRONG)):
            changed = copy.deepcopy(content)
            target = changed
            for key in place[:-1]:
                target = target[key]
            if not place:
                changed = wrong
            elif wrong is KeyError:
                del target[place[-1]]
            else:
                target[place[-1]] = wrong
            if wrong is KeyError and not place:
                continue
            if sealed and type(changed) is dict:
                seal(changed)
            torch.save(changed, path)
            try:
                found = load_pruned(network, path)
            except ValueError as error:
                assert type(error) is ValueError and str(path) in str(error), (place, wrong)
            else:
                assert sealed or bits(found) == expected, (place, wrong)
                assert [t[:3] for t in bits(found)[1]] == [t[:3] for t in expected[1]], (place, wrong)


def test_dicts_with_surprises(path):
    """What pickles may hold although they hold no code: other dicts, attributes of dicts, cycles."""
    content = torch.load(path, weights_only=True)
    odd = OrderedDict(content)
    odd.get = 3
    cyclic = dict(content)
    cyclic["modules"] = {"": cyclic}
    states = OrderedDict(content["state_dict"])
    states.keys = 3
    for wrong in (odd, cyclic, {**content, "state_dict": states}, {**content, 3: 3}, {**content, "more": 3}):
        torch.save(wrong, path)
        refused(path)
