"""Encoder-decoders with bfloat16 and int8 weights: close to float32, and with the tables of tokens that they had."""

import copy
from typing import Any

import pytest
import torch
from tiny_translator import END, network_config

from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.low_precision import Int8Embedding, Int8Linear, RowLinear, to_bfloat16, to_int8
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import EncoderDecoder

KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "two tables": {"share_embeddings": False, "target_vocab_size": 9},
    "untied": {"tie_embeddings": False, "output_bias": True},
    "relative": {"positions": "relative", "scale_embeddings": True, "embed_norm": True},
    "sinusoidal": {"positions": "sinusoidal"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_close_to_float(kind: str, dtype: str) -> None:
    torch.manual_seed(0)
    network = EncoderDecoder(network_config(**KINDS[kind])).eval()
    small = {"bfloat16": to_bfloat16, "int8": to_int8}[dtype](copy.deepcopy(network))
    tokens = torch.tensor([[3, 4, 5, END], [6, END, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    targets = torch.tensor([[END, 5, 6], [END, 7, 2]])
    with torch.no_grad():
        want, got = network(tokens, targets, mask), small(tokens, targets, mask)
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).norm() / want.norm()).item() < 0.05
    linears = [m for m in small.modules() if isinstance(m, Int8Linear if dtype == "int8" else RowLinear)]
    assert len(linears) == sum(isinstance(m, torch.nn.Linear) for m in network.modules())
    if dtype == "int8":
        assert isinstance(small.token_embed, Int8Embedding)
        assert isinstance(small.target_embed, Int8Embedding)
    assert (small.token_embed is small.target_embed) == (kind != "two tables")
    prompts = torch.full((2, 1), END)
    for options in ({}, {"num_beams": 3}):
        config = GenerationConfig(5, temperature=0, **options)  # type: ignore[arg-type]
        assert len(generate(small.decoder_of(tokens, mask), prompts, config=config, end_ids=[END])) == 2
