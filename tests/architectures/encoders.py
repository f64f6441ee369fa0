"""Text encoders."""

from __future__ import annotations

from typing import Any

from .base import PAD, VOCAB, Architecture, text
from .decoders import SIZES, SLIDING

BERT_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def encoder(
    name: str,
    model_class: str,
    config_class: str,
    notes: str = "",
    *,
    sharpness: float = 2.0,
    **settings: Any,
) -> Architecture:
    """An encoder of BERT's shape."""
    return text(
        name,
        "encoder",
        model_class,
        config_class,
        BERT_SIZES | settings,
        sharpness=sharpness,
        notes=notes,
    )


ENCODERS = [
    encoder("bert", "BertForMaskedLM", "BertConfig", "scaling by default, softmax not upcast"),
    text(
        "bert_decoder",
        "decoder",
        "BertLMHeadModel",
        "BertConfig",
        BERT_SIZES | {"is_decoder": True},
        notes="BERT as a causal decoder",
    ),
    encoder("roberta", "RobertaForMaskedLM", "RobertaConfig", "positions offset by the pad id"),
    encoder("camembert", "CamembertForMaskedLM", "CamembertConfig"),
    encoder("xlm_roberta", "XLMRobertaForMaskedLM", "XLMRobertaConfig"),
    encoder("roberta_prelayernorm", "RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig"),
    encoder(
        "electra", "ElectraForMaskedLM", "ElectraConfig", "narrow embedding", embedding_size=16
    ),
    encoder("ernie", "ErnieForMaskedLM", "ErnieConfig"),
    encoder("layoutlm", "LayoutLMForMaskedLM", "LayoutLMConfig", "softmax upcast", sharpness=3.0),
    encoder(
        "esm",
        "EsmForMaskedLM",
        "EsmConfig",
        "rotary, queries scaled before the rotation",
        position_embedding_type="rotary",
        token_dropout=True,
        mask_token_id=4,
    ),
    encoder("nomic_bert", "NomicBertForMaskedLM", "NomicBertConfig", "rotary, fused map"),
    encoder(
        "mobilebert",
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        "bottlenecks: the attention's width is not the residual's",
        hidden_size=48,
        embedding_size=32,
        intra_bottleneck_size=32,
        sharpness=0.9,
    ),
    text(
        "albert",
        "encoder",
        "AlbertForMaskedLM",
        "AlbertConfig",
        BERT_SIZES | {"embedding_size": 16, "num_hidden_layers": 3},
        sharpness=2.5,
        notes="one module for all three layers",
    ),
    text(
        "distilbert",
        "encoder",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
        },
    ),
    text(
        "modernbert",
        "encoder",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
        | {
            "num_hidden_layers": 3,
            "local_attention": 8,
            "layer_types": [*SLIDING, "sliding_attention"],
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
        notes="fused map, bidirectional window in two layers of three",
    ),
    text(
        "eurobert",
        "encoder",
        "EuroBertForMaskedLM",
        "EuroBertConfig",
        SIZES | {"mask_token_id": 4},
        notes="grouped keys without causality",
    ),
]
