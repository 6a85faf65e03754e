"""Is removing the same as masking, to rounding, on transformers and networks with norms over channels?

Outputs of the masked network (zeros in what goes; means, variances and norms over channels run over what is kept) are
compared with those of a copy that has lost it, end to end. Half of the units of every group go, drawn twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from benchmarks.experiment import Experiment, Run
from benchmarks.tables import Rows, listing

NETWORKS = (
    *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"),
    *("convnextv2_atto", "coatnet_nano_rw_224", "maxvit_pico_rw_256", "vit_b_16", "swin_t", "convnext_tiny"),
    *("bert", "bert-encoder", "bert-eager", "roberta", "distilbert", "minilm", "minilm-classifier", "hf-vit", "gpt2"),
    *("llama", "qwen3", "t5-encoder", "word-transformer", "permuted-convnext", "diffusion-unet-128", "yolo11n"),
)
REWRITTEN = ("vit_b_16", "swin_t", "gpt2", "yolo11n")
"""Whose sizes of heads are wired: :func:`~tp_importance.explicit_attention` comes first."""


def cell(run: Run, key: dict[str, Any]) -> dict[str, Any]:
    import torch

    from benchmarks.zoo.catalogue import CATALOGUE
    from tp_importance import count_ops, explicit_attention, prunable_groups
    from tp_importance.core.batches import tensors_in
    from tp_importance.graph.cost import CostModel
    from tp_importance.graph.masking import masked_units
    from tp_importance.graph.surgery import remove_units
    from tp_importance.graph.verify import sample_units

    network = CATALOGUE[key["network"]]
    model, inputs = network.ready()
    if key["network"] in REWRITTEN:
        explicit_attention(model, inputs, forward_fn=network.forward_fn)
    groups = prunable_groups(model, inputs, attention=key["attention"], forward_fn=network.forward_fn)
    cost = CostModel.from_groups(groups)
    least = cost.cost({g.name: g.min_units * g.unit_size for g in groups})
    left_out = [f"{e.name}: {e.reason}" for e in groups.excluded if e.kind not in ("output", "minimum")]
    found: dict[str, Any] = {
        "groups": len(groups),
        "left_out": left_out,
        "least": round(least.macs / cost.dense.macs, 5),
        "macs": count_ops(model, inputs, forward_fn=network.forward_fn)[0],
    }
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        net, worst = copy.deepcopy(model).to(dtype), 0.0
        x = torch.utils._pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)  # noqa: B023
        dense = tensors_in(network.run(net, x))
        for seed in (0, 1):
            removed = sample_units(groups, seed)
            small = copy.deepcopy(net)
            remove_units(groups, removed, model=small)
            with torch.no_grad():
                with masked_units(net, groups, removed):
                    masked = tensors_in(network.run(net, x))
                pruned = tensors_in(network.run(small, x))
            worst = max(worst, difference(masked, pruned))
        found[name] = worst
        found["moved"] = difference(dense, pruned)
    return found


def difference(expected: list[Any], found: list[Any]) -> float:
    """Largest difference, relative to the largest value."""
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.is_floating_point()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


def keys(run: Run) -> Iterator[dict[str, Any]]:
    from benchmarks.zoo.catalogue import CATALOGUE

    for name in run.axis("network"):
        for attention in run.axis("attention") if name in CATALOGUE else ():
            yield {"network": name, "attention": attention}


def table(rows: Rows) -> str:
    """One line per network and unit of attention."""
    lines = [
        {
            "network": r["network"],
            "attention": r["attention"],
            "groups": r["groups"],
            "left out": len(r["left_out"]),
            "least MACs": f"{r['least']:.2%}",
            "moved": f"{r['moved']:.2f}",
            "float64": f"{r['float64']:.0e}",
            "float32": f"{r['float32']:.0e}",
        }
        for r in rows
    ]
    return listing(lines, {name: f"{{{name}}}" for name in lines[0]} if lines else {})


EXPERIMENTS = (
    Experiment(
        "masked-removed",
        "compare masked with pruned transformers and networks with norms over channels, end to end",
        {"network": NETWORKS, "attention": ("heads", "dims")},
        cell,
        settings={},
        show={"networks": table},
        dense=False,
        smoke={"network": ["word-transformer", "permuted-convnext"], "attention": ["heads"]},
        threads=1,
        device="cpu",
        keys=keys,
    ),
)
