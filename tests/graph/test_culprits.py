"""Which groups the verification blames, and in how many passes.

The networks are made wrong after their groups were found: the discovery would see what is wrong with them.
"""

import dataclasses
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.group_cases import shifted, zoo
from helpers.logs import fresh_logging  # noqa: F401 - a fixture
from tp_importance import prunable_groups
from tp_importance.graph import culprits, verify
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.provenance import Provenance
from tp_importance.graph.verify import verify_groups
from tp_importance.testing import Snapshot, topology
from tp_importance.testing.networks import conv_bn_relu, head

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with something between its convolutions, once it is wrong."""

    def __init__(self, wrong):
        super().__init__()
        self.a, self.b, self.wrong, self.between = conv_bn_relu(16, 24), conv_bn_relu(24, 16), wrong, None

    def forward(self, x):
        y = self.a(x)
        return x + self.b(y if self.between is None else self.between(y))


class Blocks(nn.Module):
    def __init__(self, *wrong):
        super().__init__()
        self.stem, self.blocks = conv_bn_relu(3, 16), nn.Sequential(*map(Block, wrong))
        self.head = head(16)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))

    def go_wrong(self):
        for block in self.blocks:
            block.between = block.wrong


def literal(y):
    return y.view(len(y), 24, 8, 8)


def found(model, x=X, **options):
    """Reasons, and the number of passes of copies of the network."""
    torch.manual_seed(0)
    groups = model if isinstance(model, PrunableGroups) else prunable_groups(model.eval(), x, verify=False)
    model, passes = groups.trace.model, []
    if hasattr(model, "go_wrong"):
        model.go_wrong()
    handle = model.register_forward_pre_hook(lambda *_: passes.append(0) if not torch.is_grad_enabled() else None)
    snapshot = Snapshot(model)
    reasons = verify_groups(groups, x, **options)
    snapshot.check()
    handle.remove()
    return reasons, len(passes)


def planted(groups, bad, only=lambda member: True):
    """Groups that say of some others that they are one channel further on."""
    wrong = shifted(groups)

    def twin(group):
        pairs = zip(group.members, wrong[group.name].members, strict=True)
        return dataclasses.replace(group, members=tuple(w if only(m) else m for m, w in pairs))

    return dataclasses.replace(groups, groups=[twin(g) if g.name in bad else g for g in groups])


def test_right_groups_cost_two_passes():
    assert found(topology("residual").groups, topology("residual").x) == ({}, 2)


@pytest.mark.parametrize("name", ["0.0", "1.body.0.0", "2.body.1.0"])
def test_wrong_channels_at_a_consumer(name):
    groups = topology("residual").groups
    last = groups[name].consumers[-1]
    gated = planted(groups, [name], lambda m: m is last)
    reasons, passes = found(groups, topology("residual").x, gated=gated)
    assert list(reasons) == [name] and passes <= 5  # two that fail, one that asks for rounding, two that do not
    assert reasons[name].startswith(f"removal is not masking: input of {last.name}: differs by")


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet"])
def test_ten_wrong_groups_among_many(name):
    groups = zoo(name).groups
    bad = np.random.default_rng(0).choice(groups.names, 10, replace=False)
    reasons, passes = found(groups, zoo(name).x, gated=planted(groups, bad))
    assert set(reasons) == set(bad) and passes <= 9


def padded(y):
    return F.pad(y, (0, 0, 0, 0, 0, 24 - y.shape[1]))


def test_a_wrong_shape():
    reasons, passes = found(Blocks(None, padded, None))
    assert list(reasons) == ["blocks.1.a.0"] and passes == 4
    assert "input of blocks.1.b.0: shape (2, 24, 8, 8) after removal, (2, 17, 8, 8) masked" in reasons["blocks.1.a.0"]


class Divided(nn.Module):
    """Two paths, and a third one that is right."""

    wrong = False

    def __init__(self):
        super().__init__()
        self.a, self.b, self.side = conv_bn_relu(3, 8), conv_bn_relu(3, 12), conv_bn_relu(3, 6)
        self.left, self.right, self.head = conv_bn_relu(8, 16), conv_bn_relu(12, 12), head(34)

    def forward(self, x):
        left, right = self.a(x), self.b(x)
        if self.wrong:  # two parts of five, whatever is left of them
            both = torch.cat([left, right], 1)
            part = both.shape[1] * 2 // 5
            left, right = both[:, :part], both[:, part:]
        return self.head(torch.cat([self.side(x), self.left(left), self.right(right)], 1))

    def go_wrong(self):
        self.wrong = True


def test_wrong_shapes_that_two_groups_may_have_made():
    reasons, passes = found(Divided())
    assert list(reasons) == ["a.0", "b.0"] and passes <= 9  # each has failed without the other
    assert all("shape" in reason for reason in reasons.values())


def test_an_operation_that_raises():
    reasons, passes = found(Blocks(None, literal, None))
    assert list(reasons) == ["blocks.1.a.0"] and passes == 4
    assert "copy fails at view in blocks.1: RuntimeError: shape '[2, 24, 8, 8]' is invalid" in reasons["blocks.1.a.0"]


def test_operations_that_raise_in_many_blocks_show_in_one_pass():
    bad = [0, 2, 3, 4, 6, 7, 8, 9]
    reasons, passes = found(Blocks(*(literal if i in bad else None for i in range(11))))
    assert list(reasons) == [f"blocks.{i}.a.0" for i in bad] and passes == 4


def test_an_operation_that_raises_far_from_what_makes_its_channels():
    class Late(Blocks):
        wrong = False

        def forward(self, x):
            x = self.blocks(self.stem(x))
            return self.head(x.view(len(x), 16, 8, 8) if self.wrong else x)

        def go_wrong(self):
            self.wrong = True

    reasons, passes = found(Late(None, None))
    assert list(reasons) == ["stem.0"] and passes <= 5  # the pass that fails begins anew


def test_python_that_raises():
    def check(y):
        assert y.shape[1] == 24, "must be 24"
        return y

    reasons, passes = found(Blocks(None, check))
    assert list(reasons) == ["blocks.1.a.0"] and passes == 4
    assert "pruning a copy fails in blocks.1: AssertionError: must be 24" in reasons["blocks.1.a.0"]


def test_what_is_written_in_place_is_not_run_again():
    def spoil(y):
        return literal(y.add_(1.0))

    reasons, _ = found(Blocks(None, spoil, None))
    assert list(reasons) == ["blocks.1.a.0"]


class Leaking(Blocks):
    """Returns something of what a block has inside, once it is wrong."""

    def __init__(self, leak):
        super().__init__(None, None, None)
        self.wrong, self.leak = leak, lambda _: torch.zeros(2, 8, 8)

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        y = self.blocks[1].a(x)
        return self.head(self.blocks[2](self.blocks[1].b(y))), self.leak(y)

    def go_wrong(self):
        self.leak = self.wrong


def test_a_difference_at_the_output_only():
    reasons, passes = found(Leaking(lambda y: y.mean(1)))
    assert list(reasons) == ["blocks.1.a.0"] and passes <= 5
    assert reasons["blocks.1.a.0"].startswith("removal is not masking: output of the network: differs by")


def number(y):
    """Of channels, which came here nobody sees how."""
    return torch.tensor(float(y.shape[1]))


@pytest.mark.usefixtures("fresh_logging")
def test_what_nothing_points_to_is_bisected(caplog):
    with caplog.at_level(logging.DEBUG, "tp_importance"):
        reasons, _ = found(Leaking(number))
    assert list(reasons) == ["blocks.1.a.0"] and "bisecting" in caplog.text


@pytest.mark.usefixtures("fresh_logging")
def test_who_knows_more_may_name_the_groups(caplog):
    asked = []

    def suspects(finding):
        asked.append((finding.where, finding.kind))
        return ["blocks.1.a.0", "unknown"]

    with caplog.at_level(logging.DEBUG, "tp_importance"):
        reasons, passes = found(Leaking(number), suspects=suspects)
    assert list(reasons) == ["blocks.1.a.0"] and passes <= 5 and "bisecting" not in caplog.text
    assert set(asked) == {("output of the network", "value")}


class Gated(nn.Module):
    """The mean over the channels of one path scales the other one, once it is wrong."""

    wrong = False

    def __init__(self):
        super().__init__()
        self.a, self.b, self.tail, self.head = conv_bn_relu(3, 8), conv_bn_relu(3, 12), conv_bn_relu(8, 6), head(18)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(torch.cat([self.tail(a * b.mean(1, keepdim=True) if self.wrong else a), b], 1))

    def go_wrong(self):
        self.wrong = True


def test_a_group_that_suffers_from_another_is_taken_back():
    reasons, passes = found(Gated())
    assert list(reasons) == ["b.0"] and passes <= 9
    assert "input of tail.0: differs by" in reasons["b.0"]


class Pairs(nn.Module):
    """Safe apart, not together, once it is wrong."""

    wrong = False

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv_bn_relu(3, 9), conv_bn_relu(3, 9), head(18)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        if self.wrong and a.shape[1] < 9 and b.shape[1] < 9:
            a = a + 1
        return self.head(torch.cat([a, b], 1))

    def go_wrong(self):
        self.wrong = True


def test_one_of_two_that_fail_together_stays():
    reasons, passes = found(Pairs())
    assert len(reasons) == 1 and passes <= 7


def test_rounding_is_asked_for_once_and_settled_in_float64():
    from graph.test_verify import magnified

    model, x = magnified()
    assert found(model, x) == ({}, 2 + 1 + 2)


def test_rounding_does_not_hide_a_real_difference():
    from graph.test_verify import magnified

    groups = prunable_groups(*magnified(), verify=False)
    for bad in ("a.0", "b", "c.0"):
        reasons, passes = found(groups, magnified()[1], gated=planted(groups, [bad]))
        assert list(reasons) == [bad] and passes <= 9


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("at", [1, 2])
def test_missing_memory_is_no_verdict(error, at):
    calls = []

    def full(y):
        calls.append(0)
        if len(calls) == at:
            raise error("no memory")
        return y

    groups = prunable_groups(Blocks(full).eval(), X, verify=False)
    groups.trace.model.go_wrong()
    snapshot = Snapshot(groups.trace.model)
    with pytest.raises(error):
        verify_groups(groups, X)
    snapshot.check()


def test_groups_without_a_finding_of_their_own_are_halved_after_all(monkeypatch):
    monkeypatch.setattr(culprits, "ROUNDS", 0)
    groups = topology("residual").groups
    reasons, _ = found(groups, topology("residual").x, gated=planted(groups, ["1.body.0.0"]))
    assert list(reasons) == ["1.body.0.0"]


def test_surgery_that_raises(monkeypatch):
    remove = verify.remove_units

    def fails(groups, removed, **options):
        if "1.body.0.0" in removed:
            raise IndexError("out of range")
        return remove(groups, removed, **options)

    monkeypatch.setattr(verify, "remove_units", fails)
    reasons, _ = found(topology("residual").groups, topology("residual").x)
    assert reasons == {"1.body.0.0": "removal is not masking: pruning a copy fails: IndexError: out of range"}


# --- provenance -------------------------------------------------------------------------------------------------------


def test_provenance_follows_views_and_what_is_written_in_place():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    x = torch.randn(2, 4)
    with torch.no_grad(), Provenance(model) as names:
        a, b, c = (model[name](x) for name in "abc")
        whole = torch.empty(2, 8)
        whole[:, :4] = a
        half = whole[:, 4:]
        half += b
        fresh = torch.relu(c).reshape(4, 2)

    def layers(tensor):
        return {name[0] for name in names.of(tensor)}

    assert layers(whole) == layers(half) == {"a", "b"} and layers(fresh) == {"c"} and layers(x) == set()
    assert names.of([a, {"c": c}]) == {"a.weight", "a.bias", "c.weight", "c.bias"}
    names.assign(fresh, ["other"])
    assert names.of(fresh) == {"other"}
