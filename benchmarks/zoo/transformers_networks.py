"""Small networks of Hugging Face's transformers, from configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Network, image

WORDS, LENGTH = 500, 24
LARGE = 0.1
"""Standard deviation of the first weights. With the usual 0.02 all words are looked at alike, and no mistake shows."""


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states: what leaves the residual stream."""
    return model(**inputs).last_hidden_state


def image_logits(model: Any, images: Tensor) -> Tensor:
    return model(pixel_values=images).logits


def sentences(generator: torch.Generator) -> dict[str, Tensor]:
    """Two sentences, of which the second is shorter."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 6 :] = 0
    return {"input_ids": torch.randint(3, WORDS, (2, LENGTH), generator=generator), "attention_mask": mask}


@dataclass(frozen=True)
class Spec:
    """One network: class and configuration of the library, how it is run, and what to say of it."""

    model: str
    config: str
    options: dict[str, Any]
    forward_fn: Callable[[Any, Any], Tensor]
    note: str
    extra: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        import transformers

        config = getattr(transformers, self.config)(**self.options)
        return getattr(transformers, self.model)(config, **self.extra)


SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
BERT = {**SMALL, "vocab_size": WORDS, "max_position_embeddings": 64, "initializer_range": LARGE}
MINILM = {**BERT, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
VIT = {**SMALL, "image_size": 64, "patch_size": 16, "initializer_range": LARGE}
GPT2 = {
    **{"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": WORDS},
    **{"initializer_range": LARGE, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2},
}
LLAMA = {
    **{**SMALL, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": WORDS},
    **{"max_position_embeddings": 64, "initializer_range": LARGE, "use_cache": False},
}
DISTILBERT = {
    **{"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": WORDS},
    **{"max_position_embeddings": 64, "initializer_range": LARGE},
}
T5 = {
    **{"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "vocab_size": WORDS},
    **{"feed_forward_proj": "gated-gelu", "use_cache": False},
}
ENCODER = {"add_pooling_layer": False}
EAGER = {"attn_implementation": "eager"}
SPECS: dict[str, Spec] = {
    "bert": Spec("BertForSequenceClassification", "BertConfig", BERT, logits, "a head on the first word"),
    "bert-eager": Spec(
        *("BertForSequenceClassification", "BertConfig", {**BERT, **EAGER}, logits, "attention written out")
    ),
    "bert-encoder": Spec("BertModel", "BertConfig", BERT, states, "the residual stream is the output", ENCODER),
    "bert-encoder-eager": Spec(
        *("BertModel", "BertConfig", {**BERT, **EAGER}, states, "the stream is the output, attention written out"),
        ENCODER,
    ),
    "minilm": Spec("BertModel", "BertConfig", MINILM, states, "BERT in the size of all-MiniLM-L6", ENCODER),
    "minilm-classifier": Spec(
        *("BertForSequenceClassification", "BertConfig", MINILM, logits, "BERT in the size of all-MiniLM-L6, a head")
    ),
    "roberta": Spec(
        *("RobertaForSequenceClassification", "RobertaConfig", BERT, logits, "positions follow from the words")
    ),
    "distilbert": Spec("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT, logits, "a head"),
    "hf-vit": Spec("ViTForImageClassification", "ViTConfig", VIT, image_logits, "pre-norm, class token"),
    "gpt2": Spec("GPT2LMHeadModel", "GPT2Config", GPT2, logits, "packed projections with weights (in, out), tied"),
    "llama": Spec("LlamaForCausalLM", "LlamaConfig", LLAMA, logits, "RMS norms, rotary, 8 query heads on 2 of keys"),
    "qwen3": Spec(
        *("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 16}, logits, "norms on queries and keys"),
    ),
    "t5-encoder": Spec("T5EncoderModel", "T5Config", T5, states, "RMS norms, a table of relative positions, no scale"),
}


def networks() -> Iterator[Network]:
    for name, spec in SPECS.items():
        inputs = image(64, n=2) if spec.forward_fn is image_logits else sentences
        yield Network(name, "transformers", spec.build, inputs, spec.forward_fn, spec.note)
