"""A network with two informative channels, for tests."""

import torch
from torch import nn

from tp_importance import CATROImportance
from tp_importance.testing.networks import head

SPACES = ["consumer", "channel"]
PLANTED = [2, 5]


def planted_net(signal=1.0, noise=0.01, bias=True):
    """Input 0 says which class it is, inputs 1 and 2 are noise; two of eight filters look at input 0.

    `signal` and `noise` are how strongly the second layer reads the two sorts.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:, 1:] = torch.randn(8, 2, 1, 1, generator=generator)
        first.weight[PLANTED] = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.0, 0.0]]).view(2, 3, 1, 1)
        first.bias.fill_(0.5)
        second.weight.copy_(torch.randn(6, 8, 1, 1, generator=generator) * noise)
        second.weight[:, PLANTED] *= signal / noise
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head(6)).eval()


def planted_loader(n=120, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, 3, 6, 6, generator=generator)
    x[:, 0] = 0.1 * x[:, 0] + y.view(-1, 1, 1)
    return list(zip(x.split(30), y.split(30), strict=True))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(9))


def order_of(model, loader=None, name="0", x=X, **options):
    importance = CATROImportance(**options).collect(model, x, planted_loader() if loader is None else loader)
    return importance.curves()[name].order.tolist()


def dead(model, channels):
    """With channels that are zero behind the ReLU whatever comes in; their weights stay."""
    with torch.no_grad():
        model[0].bias[channels] = -1e6
    return model
