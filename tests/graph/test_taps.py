import pytest
import torch
from torch import nn

from tp_importance.errors import TracingError
from tp_importance.graph.activations import recording
from tp_importance.graph.activations import watch_activations as tap
from tp_importance.graph.dataflow import record
from tp_importance.graph.residual_sums import added_to, addition
from tp_importance.testing import make_network


class Branches(nn.Module):
    """One layer per way of being added to something."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.plain, self.normed, self.twice, self.wide, self.early, self.other, self.first = (
            nn.Linear(4, 4) for _ in range(7)
        )

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.plain(x)
        x += self.norm(self.normed(x))
        x = x + self.twice(self.twice(x))
        x = x + self.wide(x).mean(1, keepdim=True)
        a = self.early(x)
        x = a + self.other(x)  # only the one that runs later has the other at hand
        return self.first(x) + x, x


def test_what_a_layer_is_added_to():
    net = Branches().eval()
    flow = record(net, torch.randn(3, 4))
    norms = {"normed": net.norm}
    assert added_to(flow, "normed") is None
    found = {name: added_to(flow, name, norms.get(name)) for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n, v in found.items() if v is not None} == {"plain", "normed", "other", "first"}
    assert found["other"] == next(op.outputs[0] for op in flow.ops if op.name == "early")
    assert flow.ops[[op.outputs[0] for op in flow.ops].index(found["plain"])].name == "relu"


def test_the_addition_behind_a_layer():
    net = Branches().eval()
    flow = record(net, torch.randn(3, 4))
    both = addition(flow, "early"), addition(flow, "other")
    assert both[0] is both[1] and both[0].kind == "add"  # whether it runs before or after the other
    assert addition(flow, "normed") is None and addition(flow, "normed", net.norm).kind == "add"
    assert addition(flow, "twice") is None and addition(flow, "wide") is None and addition(flow, "stem") is None


def test_what_can_be_compared_with_later_passes():
    net, x = Branches().eval(), torch.randn(3, 4)
    assert len(recording(net, x).ops) == len(record(net, x).ops)
    assert len(recording(net, {"x": x}, lambda m, batch: m(batch["x"])).ops) == len(record(net, x).ops)
    assert recording(net, x, lambda m, batch: m.stem(batch)) is None
    assert recording(net, x, lambda m, batch: m(batch)[0] + m(batch)[0]) is None


def test_tensors_are_those_of_the_pass():
    net, x = Branches().eval(), torch.randn(5, 4)
    flow = record(net, torch.randn(3, 4))
    seen = {}
    taps = {added_to(flow, n): lambda t, n=n: seen.update({n: t.clone()}) for n in ("plain", "other")}
    with tap(net, flow, taps), torch.no_grad():
        for _ in range(2):  # every call is counted from its start
            torch.cat([x, x]).sum()  # outside of the network: not counted
            net(x)
    with torch.no_grad():
        stream = net.stem(x).relu()
        assert torch.equal(seen["plain"], stream)
        assert seen["other"].shape == (5, 4)
    assert not net._forward_hooks and not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("name", ["residual", "concat", "depthwise", "split", "se", "padded_shortcut"])
def test_a_later_pass_runs_what_was_recorded(name):
    net, x = make_network(name)
    flow = record(net.eval(), x)
    count = []
    every = {v: lambda t: count.append(t.shape) for op in flow.ops for v in op.outputs}
    with tap(net, flow, every), torch.no_grad():
        net(torch.cat([x, x]))
    assert len(count) == len(every)


def test_other_operations_are_an_error():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            x = self.layer(x)
            return x.relu() if len(x) == 1 else x.tanh()

    net = Moody()
    flow = record(net, torch.zeros(1, 2))
    with pytest.raises(TracingError, match=r"operation 1 .* relu .* tanh"), tap(net, flow, {flow.outputs[0]: print}):
        net(torch.zeros(2, 2))
    assert not net._forward_hooks and not net.layer._forward_hooks
    errors, seen = [], []
    with tap(net, flow, {flow.outputs[0]: seen.append}, otherwise=errors.append):
        net(torch.zeros(2, 2))
        net(torch.zeros(1, 2))
    assert len(errors) == 1 and isinstance(errors[0], TracingError) and len(seen) == 1
    with pytest.raises(ValueError, match="tensor 99"), tap(net, flow, {99: print}):
        pass
