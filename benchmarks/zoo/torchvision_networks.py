"""Networks of torchvision: classifiers, segmentation, detectors up to their heads, video."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, segmentation, video

from benchmarks.zoo.entry import Network, image, tensor

QUICK = ("swin_t", "shufflenet_v2_x1_0")
PLANTED = (
    *("resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "densenet121", "googlenet", "mobilenet_v2"),
    *("mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "squeezenet1_1", "convnext_tiny", "mnasnet1_0"),
)


def narrow(build: Callable[..., nn.Module], num_classes: int = 10) -> nn.Module:
    """A VGG or AlexNet with 64 channels between the linear layers of its classifier, and random weights.

    The original classifier is nine tenths of the weights, and adds nothing but seconds.

    Args:
        build: the network's function in ``torchvision.models``.
        num_classes: outputs of the last layer.

    Example:
        >>> sum(p.numel() for p in narrow(models.alexnet).parameters())
        3064330
    """
    with torch.device("meta"):
        model = build()
        linear = [i for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
        widths = [model.classifier[linear[0]].in_features, *[64] * (len(linear) - 1), num_classes]
        for i, (inputs, outputs) in zip(linear, pairwise(widths), strict=True):
            model.classifier[i] = nn.Linear(inputs, outputs)
    model.to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear, nn.BatchNorm2d)):
            layer.reset_parameters()
    return model


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (models.alexnet, 224),
    "vgg11_bn": (partial(narrow, models.vgg11_bn), 224),
    "resnet18": (models.resnet18, 224),
    "resnet50": (models.resnet50, 224),
    "resnext50_32x4d": (models.resnext50_32x4d, 224),
    "wide_resnet50_2": (models.wide_resnet50_2, 224),
    "densenet121": (models.densenet121, 224),
    "squeezenet1_1": (models.squeezenet1_1, 224),
    "googlenet": (partial(models.googlenet, aux_logits=False, init_weights=False, transform_input=False), 224),
    "inception_v3": (partial(models.inception_v3, aux_logits=False, init_weights=False, transform_input=False), 299),
    "mnasnet1_0": (models.mnasnet1_0, 224),
    "mobilenet_v2": (models.mobilenet_v2, 224),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 224),
    "mobilenet_v3_large": (models.mobilenet_v3_large, 224),
    "shufflenet_v2_x1_0": (models.shufflenet_v2_x1_0, 224),
    "efficientnet_b0": (models.efficientnet_b0, 224),
    "efficientnet_v2_s": (models.efficientnet_v2_s, 224),
    "regnet_x_400mf": (models.regnet_x_400mf, 224),
    "regnet_y_400mf": (models.regnet_y_400mf, 224),
    "convnext_tiny": (models.convnext_tiny, 224),
    "swin_t": (models.swin_t, 224),
    "swin_v2_t": (models.swin_v2_t, 256),
    "vit_b_16": (models.vit_b_16, 224),
    "maxvit_t": (models.maxvit_t, 224),
}
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")


def whole(model: Any, x: Tensor) -> Any:
    """A detector with all of its post-processing; it takes a list of images."""
    return model(list(x))


def heads(model: Any, x: Tensor) -> Any:
    """A one-stage detector up to its heads: behind them, boxes are sorted and dropped by value."""
    features = model.backbone(x)
    return model.head(list(features.values()))


def two_stage_heads(model: Any, x: Tensor) -> Any:
    """Faster R-CNN up to its heads, with boxes that are given instead of proposed."""
    features, size = model.backbone(x), x.shape[-1]
    pooled = model.roi_heads.box_roi_pool(features, [_boxes(size).to(x)] * len(x), [x.shape[-2:]] * len(x))
    return model.rpn.head(list(features.values())), model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))


def _boxes(size: int) -> Tensor:
    corner = torch.tensor([[0.1, 0.1], [0.3, 0.2], [0.05, 0.5], [0.4, 0.4]])
    return size * torch.cat([corner, corner + torch.tensor([[0.2, 0.3], [0.5, 0.4], [0.6, 0.45], [0.1, 0.1]])], 1)


DETECTORS: dict[str, tuple[str, int, Any, str]] = {
    "ssdlite320_mobilenet_v3_large": ("ssdlite320_mobilenet_v3_large", 320, heads, "up to its heads"),
    "ssd300_vgg16": ("ssd300_vgg16", 300, heads, "up to its heads"),
    "retinanet_resnet50_fpn": ("retinanet_resnet50_fpn", 320, heads, "up to its heads"),
    "fcos_resnet50_fpn": ("fcos_resnet50_fpn", 320, heads, "up to its heads"),
    "fasterrcnn_resnet50_fpn": ("fasterrcnn_resnet50_fpn", 320, two_stage_heads, "up to its heads, boxes given"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        *("fasterrcnn_mobilenet_v3_large_320_fpn", 320),
        *(two_stage_heads, "up to its heads, boxes given"),
    ),
    "ssdlite320_mobilenet_v3_large-whole": ("ssdlite320_mobilenet_v3_large", 320, whole, "with post-processing"),
    "retinanet_resnet50_fpn-whole": ("retinanet_resnet50_fpn", 320, whole, "with post-processing"),
}


def _detector(name: str, size: int) -> nn.Module:
    sizes = {} if name.startswith("ssd") else {"min_size": size, "max_size": size}  # images are scaled to these
    return getattr(detection, name)(weights=None, weights_backbone=None, **sizes)


def networks() -> Iterator[Network]:
    for name, (build, size) in CLASSIFIERS.items():
        yield Network(*(name, "torchvision", build, image(size)), quick=name in QUICK, planted=name in PLANTED)
    for name in SEGMENTATION:
        build = partial(getattr(segmentation, name), weights=None, weights_backbone=None)
        yield Network(name, "segmentation", build, image(224), planted=name == "lraspp_mobilenet_v3_large")
    for name, (builder, size, forward_fn, note) in DETECTORS.items():
        yield Network(
            *(name, "detection", partial(_detector, builder, size), image(size), forward_fn, note),
            quick=name == "retinanet_resnet50_fpn",
        )
    for name in VIDEO:
        yield Network(name, "video", getattr(video, name), tensor(1, 3, 8, 64, 64), planted=name == "r3d_18")
