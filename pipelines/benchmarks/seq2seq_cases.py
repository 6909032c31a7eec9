"""Cases of `trunkline benchmark` with an encoder-decoder."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trunkline.modules.generation.sampling import GenerationConfig, generate
from trunkline.modules.losses import linear_cross_entropy
from trunkline.modules.networks import EncoderDecoder
from trunkline.modules.networks.convert.transformers_t5 import t5_config_from_transformers, t5_to_transformers
from trunkline.pipelines.benchmarks.text_cases import transformers
from trunkline.pipelines.benchmarks.timing import Side, bare_loop, compare

SHAPE = {"vocab_size": 32128, "d_model": 256, "d_kv": 64, "d_ff": 688, "num_layers": 4, "num_heads": 4}
"""4 layers on each side, width 256."""
PAIR_LENGTH = 64
"""Tokens of a source, and of a target."""
WRITTEN = 32
"""New tokens of each text in generation."""
BEAMS = 4


def _t5_pair() -> tuple[EncoderDecoder, Any]:
    """Ours and transformers' T5 1.1 with equal weights, tied embeddings and no dropout.

    They begin as ours does: in transformers' own start, logits differ by more than 80, and PyTorch computes the
    exponentials of such differences several times more slowly, in our loss only.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    library = transformers()
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    theirs = library.T5ForConditionalGeneration(library.T5Config(**SHAPE, **options, dropout_rate=0.0))
    config = t5_config_from_transformers(theirs.config.to_dict())
    ours = EncoderDecoder(replace(config, tie_embeddings=True))  # transformers ties whatever is not loaded from a file
    theirs.load_state_dict(t5_to_transformers(ours.state_dict(), ours.config), strict=False)  # tied weights are absent
    return ours.to(device), theirs.to(device)


def _t5_loops(batch_size: int, fast: bool = False) -> tuple[Side, Side]:
    """Training steps of both on unpadded pairs; with `fast` both are compiled and compute in bfloat16."""
    ours, theirs = _t5_pair()
    if fast:
        ours.compile()
        theirs.compile()
    device = next(ours.parameters()).device
    tokens, targets = torch.randint(2, SHAPE["vocab_size"], (2, batch_size, PAIR_LENGTH), device=device)
    given = torch.cat((torch.zeros_like(targets[:, :1]), targets[:, :-1]), dim=1)
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def our_loss() -> Tensor:
        x = ours(tokens, given, mask, return_logits=False).flatten(0, 1)
        return linear_cross_entropy(x, ours.head.weight, targets.flatten()) / targets.numel()

    def their_loss() -> Tensor:
        return theirs(input_ids=tokens, attention_mask=mask, labels=targets, use_cache=False).loss

    return bare_loop(ours, our_loss, fast), bare_loop(theirs, their_loss, fast)


def _writers(batch_size: int) -> tuple[Side, Side]:
    """Both write texts of one length with 4 beams; seconds of a token in all texts."""
    ours, theirs = _t5_pair()
    device = next(ours.parameters()).device
    tokens = torch.randint(2, SHAPE["vocab_size"], (batch_size, PAIR_LENGTH), device=device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    start, config = torch.zeros_like(tokens[:, :1]), GenerationConfig(WRITTEN, num_beams=BEAMS)
    options = {"max_new_tokens": WRITTEN, "num_beams": BEAMS, "do_sample": False, "eos_token_id": None}
    theirs.eval()

    def our_turn() -> float:
        begin = time.perf_counter()
        generate(ours.decoder_of(tokens, mask), start, config=config)
        return (time.perf_counter() - begin) / WRITTEN

    def their_turn() -> float:
        begin = time.perf_counter()
        theirs.generate(tokens, attention_mask=mask, **options)
        return (time.perf_counter() - begin) / WRITTEN

    return our_turn, their_turn


def seq2seq(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """Training steps against transformers' T5: float32 on both sides, and bfloat16 compiled; then beam search."""
    rows, peer = batch_size or 32, "transformers fp32 eager"
    eager, fast = _t5_loops(rows), _t5_loops(rows, fast=True)
    return [
        compare("T5 fp32 eager", peer, *eager, rounds),
        compare("T5 bf16 compiled", peer, fast[0], eager[1], rounds),
        compare("transformers' own, bf16 compiled", peer, fast[1], eager[1], rounds),
        compare("T5 token, 4 beams", peer, *_writers(batch_size or 8), rounds),
    ]
