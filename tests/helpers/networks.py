"""Networks of our own tests beside those of ``tp_importance.testing``: torchvision classifiers and a few small ones."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.zoo.torchvision_networks import narrow
from tp_importance.testing.networks import conv_bn_relu, head, prepare


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv_bn_relu(3, 8), conv_bn_relu(3, 12), head(20)

    def forward(self, left, right):
        return self.head(torch.cat([self.a(left), self.b(right)], 1))


# torchvision classifiers with random weights
ZOO: dict[str, Callable[[], nn.Module]] = {
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "vgg16_bn": partial(narrow, models.vgg16_bn),
    "mobilenet_v2": models.mobilenet_v2,
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "densenet": partial(models.DenseNet, block_config=(4, 6, 6, 4)),  # Torch-Pruning is slow where much is joined
    "googlenet": partial(models.googlenet, aux_logits=False, init_weights=False, transform_input=False),
    "efficientnet_b0": models.efficientnet_b0,
    "regnet_y_400mf": models.regnet_y_400mf,
}


def make_zoo_network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The torchvision classifier `name` in eval mode, and a batch of two 32×32 images."""
    return prepare(ZOO[name], (3, 32, 32), seed)
