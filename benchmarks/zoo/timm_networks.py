"""Networks of timm, one or two of each family, at the size they are made for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.entry import Network, image

SIZES: dict[str, int] = {
    "botnet26t_256": 256,
    "coatnet_nano_rw_224": 224,
    "convmixer_768_32": 224,
    "convnextv2_atto": 224,
    "cspdarknet53": 256,
    "cspresnet50": 256,
    "deit_tiny_patch16_224": 224,
    "dla34": 224,
    "dpn68": 224,
    "eca_resnet33ts": 256,
    "edgenext_xx_small": 256,
    "efficientformer_l1": 224,
    "efficientnet_lite0": 224,
    "efficientvit_b0": 224,
    "ese_vovnet19b_dw": 224,
    "eva02_tiny_patch14_224": 224,
    "fastvit_t8": 256,
    "focalnet_tiny_srf": 224,
    "gernet_s": 224,
    "ghostnet_100": 224,
    "hardcorenas_a": 224,
    "hgnetv2_b0": 224,
    "hrnet_w18_small": 224,
    "inception_next_atto": 224,
    "inception_v4": 299,
    "lambda_resnet26t": 256,
    "lcnet_050": 224,
    "legacy_seresnet18": 224,
    "legacy_xception": 299,
    "levit_128s": 224,
    "mambaout_femto": 224,
    "maxvit_pico_rw_256": 256,
    "mixer_s32_224": 224,
    "mobilenetv3_small_100": 224,
    "mobilenetv4_conv_small": 224,
    "mobileone_s0": 224,
    "mobilevit_xxs": 256,
    "nasnetalarge": 224,
    "nf_regnet_b0": 192,
    "nf_resnet50": 224,
    "pit_ti_224": 224,
    "poolformer_s12": 224,
    "pvt_v2_b0": 224,
    "regnety_002": 224,
    "repghostnet_050": 224,
    "repvgg_a0": 224,
    "repvit_m0_9": 224,
    "res2net50_26w_4s": 224,
    "resmlp_12_224": 224,
    "resnest14d": 224,
    "resnet50_gn": 224,
    "resnetv2_50": 224,
    "rexnet_100": 224,
    "selecsls42b": 224,
    "seresnext26d_32x4d": 224,
    "shvit_s1": 224,
    "skresnet18": 224,
    "starnet_s1": 224,
    "swin_tiny_patch4_window7_224": 224,
    "tf_efficientnet_b0": 224,
    "tresnet_m": 224,
    "visformer_tiny": 224,
    "vit_small_patch32_224": 224,
    "vit_tiny_patch16_224": 224,
    "vit_tiny_patch16_dinov3_qkvb": 256,
    "xception41": 299,
}
OPTIONS: dict[str, dict[str, Any]] = {"nasnetalarge": {"stem_size": 32, "num_features": 1056}}
BAKED = ("nf_regnet_b0", "nf_resnet50")
NOTES = {
    "nasnetalarge": "with the widths of NASNet-A mobile",
    "eva02_tiny_patch14_224": "rotary embedding, gated MLP",
    "vit_tiny_patch16_dinov3_qkvb": "rotary embedding, registers, scaled residual branches",
    **dict.fromkeys(BAKED, "standardised weights, baked by `bake_weights`"),
}
QUICK = ("resnest14d", "res2net50_26w_4s", "ghostnet_100", "cspdarknet53", "skresnet18", "nf_regnet_b0")
PLANTED = ("repvgg_a0", "lcnet_050", "legacy_seresnet18")


def _build(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **OPTIONS.get(name, {}))


def networks() -> Iterator[Network]:
    for name, size in SIZES.items():
        yield Network(
            *(name, "timm", partial(_build, name), image(size)),
            note=NOTES.get(name, ""),
            quick=name in QUICK,
            planted=name in PLANTED,
            baked=name in BAKED,
        )
