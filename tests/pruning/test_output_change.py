"""How far outputs move, as the report of a pruning says it."""

import copy

import pytest
import torch
from torch import nn

from tp_importance import Budget, prune


@pytest.mark.parametrize("lengths", [(5, 5), (5, 7)])
def test_outputs_of_batches_of_any_length(lengths):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    dense, loader = copy.deepcopy(net), [torch.randn(16, length, 8) for length in lengths]
    report = prune(net, loader[0], loader, budget=Budget(macs=0.5), method="l2", refit=None).report
    with torch.no_grad():
        before, after = ([twin(batch) for batch in loader] for twin in (dense, net))
    flat = [torch.cat([t.flatten() for t in made]) for made in (before, after)]
    cosines = [torch.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(before, after, strict=True)]
    assert report.outputs.samples == 32
    assert report.outputs.relative_error == pytest.approx(float((flat[1] - flat[0]).norm() / flat[0].norm()), rel=1e-4)
    assert report.outputs.cosine == pytest.approx(float(torch.cat(cosines).mean()), rel=1e-4)
