"""Layers that see a number of rows of their own: experts behind a router."""

import pytest
import torch
from torch import Tensor, nn

from tp_importance import Budget, count_ops, prune


class Experts(nn.Module):
    """Every token goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(6, 2), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, chosen = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == i)
            out.index_add_(0, rows, expert(tokens[rows]) * weight[rows, None])
        return self.head((x + out.view_as(x)).mean(1))


@pytest.mark.parametrize("refit", ["sequential", "parallel"])
@pytest.mark.parametrize("labels", [None, torch.arange(2)])
def test_experts_see_any_number_of_rows(refit, labels):
    torch.manual_seed(1)
    net, x = Experts(), torch.randn(2, 7, 6)
    assert int((net.gate(x).argmax(-1) == 0).sum()) % 2  # no multiple of the samples
    batch = x if labels is None else (x, labels)
    result = prune(net, x, [batch], budget=Budget(params=0.7), method="obs", refit=refit)
    assert any(len(expert[0].weight) < 16 for expert in net.experts)
    assert result.report.cost.macs == count_ops(net, x)[0]
