"""Losses are taken relative to what errors disturb: an output, the sum it is added up to, or a norm behind either."""

import pytest
import torch
from torch import nn

from tp_importance import prunable_groups
from tp_importance.maths.moments import Moments
from tp_importance.statistics.consumers import ConsumerStatistics
from tp_importance.statistics.observe import observe


class PostNorm(nn.Module):
    """The sum is read by a norm alone, as in BERT; or the stream goes on beside it."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream
        self.first = nn.Linear(6, 6)
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        total = x + self.down(self.up(x).relu())
        normed = self.norm(total)
        return self.head(total + normed if self.stream else normed)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_count_as_the_norm_behind_passes_them_on(stream):
    torch.manual_seed(0)
    net, x = PostNorm(stream).eval(), torch.randn(64, 5, 6)
    net.first.weight.data[2] *= 30  # a channel that carries most of the variance of the sum, and that the norm damps
    nn.init.constant_(net.norm.weight, 1.0)
    net.norm.weight.data[2] = 0.1
    groups = prunable_groups(net, x[:2])
    statistics = ConsumerStatistics(groups, positions=None)
    with statistics.sums(x[:2]):
        observe(net, [x], statistics.watches(), need_labels=False)
    with torch.no_grad():
        y = net.first(x)
        total = (y + net.down(net.up(y).relu())).flatten(0, 1).double()
    (gain,) = [g for _, _, g, _ in statistics.reads(groups["up"], Moments.total)]
    if stream:
        assert torch.equal(gain, torch.ones(1, 6))
        torch.testing.assert_close(
            statistics.energy("down"), float(total.var(0, correction=0).sum()), rtol=1e-5, atol=0
        )
        return
    normed = net.norm.double()(total)
    scale = (1 / (total.var(1, correction=0) + net.norm.eps)).mean().sqrt()
    torch.testing.assert_close(gain[0].double(), net.norm.weight.abs() * scale, rtol=1e-5, atol=0)
    expected = float(normed.detach().var(0, correction=0).sum())
    torch.testing.assert_close(statistics.energy("down"), expected, rtol=1e-5, atol=0)
