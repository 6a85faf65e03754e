"""Which groups the verification blames, and in how many passes."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import nn

from helpers.group_cases import shifted, zoo
from tp_importance import prunable_groups
from tp_importance.graph import culprits, verify
from tp_importance.graph.groups import PrunableGroups
from tp_importance.graph.provenance import Provenance
from tp_importance.graph.verify import verify_groups
from tp_importance.testing import Snapshot, topology
from tp_importance.testing.networks import conv_bn_relu, head

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with something between its convolutions."""

    def __init__(self, between=None):
        super().__init__()
        self.a, self.b, self.between = conv_bn_relu(16, 24), conv_bn_relu(24, 16), between or (lambda y: y)

    def forward(self, x):
        return x + self.b(self.between(self.a(x)))


class Blocks(nn.Module):
    def __init__(self, *between):
        super().__init__()
        self.stem, self.blocks = conv_bn_relu(3, 16), nn.Sequential(*map(Block, between))
        self.head = head(16)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def literal(y):
    return y.view(len(y), 24, 8, 8)


def found(model, x=X, **options):
    """Reasons, and the number of passes of copies of the network."""
    torch.manual_seed(0)
    groups = model if isinstance(model, PrunableGroups) else prunable_groups(model.eval(), x, verify=False)
    model, passes = groups.trace.model, []
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


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet"])
def test_ten_wrong_groups_among_many(name, seed):
    groups = zoo(name).groups
    bad = np.random.default_rng(seed).choice(groups.names, 10, replace=False)
    reasons, passes = found(groups, zoo(name).x, gated=planted(groups, bad))
    assert set(reasons) == set(bad) and passes <= 9


class Halves(nn.Module):
    """Equal halves whatever the width, and beside them a path that is right."""

    def __init__(self):
        super().__init__()
        self.stem, self.side, self.head = conv_bn_relu(3, 16), conv_bn_relu(3, 12), head(28)
        self.left, self.right = conv_bn_relu(8, 8), conv_bn_relu(8, 8)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        return self.head(torch.cat([self.side(x), self.left(left), self.right(right)], 1))


def test_wrong_shapes():
    reasons, passes = found(Halves())
    assert list(reasons) == ["stem.0/0", "stem.0/1"] and passes <= 9  # each has failed without the other
    assert "input of left.0: shape (2, 7, 8, 8) after removal, (2, 5, 8, 8) masked" in reasons["stem.0/0"]


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
        def forward(self, x):
            x = self.blocks(self.stem(x))
            return self.head(x.view(len(x), 16, 8, 8))

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

    class Inner(nn.Module):
        forward = staticmethod(spoil)

    reasons, _ = found(Blocks(None, Inner(), None))
    assert list(reasons) == ["blocks.1.a.0"]


class Leaking(Blocks):
    """Returns what no gradient flows through, and what a tracer by gradients does not see."""

    def __init__(self, leak, n=3):
        super().__init__(*[None] * n)
        self.leak = leak

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        y = self.blocks[1].a(x)
        return self.head(self.blocks[2](self.blocks[1].b(y))), self.leak(y.detach())


def test_a_difference_at_the_output_only():
    reasons, passes = found(Leaking(lambda y: y.mean(1)))
    assert list(reasons) == ["blocks.1.a.0"] and passes <= 5
    assert reasons["blocks.1.a.0"].startswith("removal is not masking: output of the network: differs by")


class Shape:
    """A number of channels whose way nobody sees."""

    def __call__(self, y):
        return torch.tensor(float(y.shape[1]))


def test_what_nothing_points_to_is_bisected(caplog):
    with caplog.at_level(logging.DEBUG, "tp_importance"):
        reasons, _ = found(Leaking(Shape()))
    assert list(reasons) == ["blocks.1.a.0"] and "bisecting" in caplog.text


def test_who_knows_more_may_name_the_groups(caplog):
    asked = []

    def suspects(finding):
        asked.append((finding.where, finding.kind))
        return ["blocks.1.a.0", "unknown"]

    with caplog.at_level(logging.DEBUG, "tp_importance"):
        reasons, passes = found(Leaking(Shape()), suspects=suspects)
    assert list(reasons) == ["blocks.1.a.0"] and passes <= 5 and "bisecting" not in caplog.text
    assert set(asked) == {("output of the network", "value")}


class Gated(nn.Module):
    """The mean over the channels of one path scales the other one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.tail, self.head = (conv_bn_relu(3, 8), conv_bn_relu(3, 12), conv_bn_relu(8, 6), head(18))

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.head(torch.cat([self.tail(a * b.detach().mean(1, keepdim=True)), b], 1))


def test_a_group_that_suffers_from_another_is_taken_back():
    reasons, passes = found(Gated())
    assert list(reasons) == ["b.0"] and passes <= 9
    assert "input of tail.0: differs by" in reasons["b.0"]


class Pairs(nn.Module):
    """Safe apart, not together: an even number of channels must be left in all."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv_bn_relu(3, 9), conv_bn_relu(3, 9), head(18)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        if a.shape[1] < 9 and b.shape[1] < 9:
            a = a + 1
        return self.head(torch.cat([a, b], 1))


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
    calls, armed = [], []

    def full(y):
        if armed and not torch.is_grad_enabled():
            calls.append(0)
            if len(calls) == at:
                raise error("no memory")
        return y

    groups = prunable_groups(Blocks(full).eval(), X, verify=False)
    armed.append(True)
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
