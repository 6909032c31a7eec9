"""Convert the weights of the BERT in transformers to those of a `BERT`."""

from collections.abc import Mapping

import torch
from torch import Tensor

# transformers' name of a part of BERT -> our name.
TRANSFORMERS_BERT = {
    "bert.embeddings.word_embeddings.": "token_embed.",
    "bert.embeddings.position_embeddings.": "pos_embed.",
    "bert.embeddings.token_type_embeddings.": "segment_embed.",
    "bert.embeddings.LayerNorm.": "embed_norm.",
    "bert.encoder.layer.": "backbone.blocks.",
    "bert.pooler.dense.": "pooler.dense.",
    "cls.predictions.transform.dense.": "masked_head.dense.",
    "cls.predictions.transform.LayerNorm.": "masked_head.norm.",
    "cls.predictions.decoder.": "head.",
    "cls.predictions.bias": "head.bias",
    "cls.seq_relationship.": "next_head.",
}
TRANSFORMERS_BERT_BLOCK = {
    ".attention.output.dense.": ".attn.proj.",
    ".attention.output.LayerNorm.": ".norm1.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
    ".output.LayerNorm.": ".norm2.",
}


def bert_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a transformers `BertForPreTraining` or `BertForMaskedLM` -> state dict of a `BERT`.

    Queries, keys and values are one matrix here. In transformers, class 0 means that the second text follows; here it
    is class 1.
    """
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        start = next((theirs for theirs in TRANSFORMERS_BERT if name.startswith(theirs)), None)
        if start is None or name.endswith("position_ids"):
            continue
        ours = TRANSFORMERS_BERT[start] + name.removeprefix(start)
        for theirs, part in TRANSFORMERS_BERT_BLOCK.items():
            if theirs in ours:
                ours = ours.replace(theirs, part)
                break
        if ".attention.self.query." in ours:
            parts = [weights[name.replace("query", kind)] for kind in ("query", "key", "value")]
            converted[ours.replace(".attention.self.query.", ".attn.qkv.")] = torch.cat(parts)
        elif ".attention.self." not in ours:
            converted[ours] = value.flip(0) if ours.startswith("next_head.") else value
    return converted
