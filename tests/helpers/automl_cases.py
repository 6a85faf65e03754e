"""A small network, its data, and trials on it."""

import torch

from tp_importance import Budget
from tp_importance.automl import (
    prune_trial,
)
from tp_importance.testing import NUM_CLASSES
from tp_importance.testing.networks import residual

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [
    (torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(i)), torch.arange(16) % NUM_CLASSES)
    for i in range(2)
]


def network(build=residual):
    torch.manual_seed(0)
    return build().eval()


def weight_sum(model):
    return float(sum(p.detach().abs().sum() for p in model.parameters()))


def run(model, params, **options):
    options = {
        "budget": Budget(macs=0.5),
        "loader": BATCHES,
        "latency_seconds": None,
        "evaluate": weight_sum,
        **options,
    }
    return prune_trial(model, params, example_inputs=X, **options)
