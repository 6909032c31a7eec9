"""Cases of `trunkline benchmark` with text."""

import copy
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.datamodules.text.text_sources import open_text
from trunkline.datamodules.text_encoder import TextEncoder
from trunkline.datamodules.tokenizers import train_tokenizer
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.low_precision import to_bfloat16, to_int8
from trunkline.modules.generation.sampling import GenerationConfig, generate
from trunkline.modules.losses import linear_cross_entropy
from trunkline.modules.networks import BERT, GPT, BERTConfig, GPTConfig
from trunkline.modules.networks.convert.families import from_foreign
from trunkline.pipelines.benchmarks.memory import peak_memory
from trunkline.pipelines.benchmarks.timing import Side, bare_loop, compare

LENGTH = 256
MASKED_LENGTH = 128
NEW_TOKENS = 64


def transformers() -> Any:
    """Import transformers, which only the benchmark needs.

    Raises:
        TrunklineError: if it is not installed.
    """
    try:
        import transformers as library
    except ImportError as error:
        raise TrunklineError("this case compares with transformers; run pip install 'trunkline[bench]'") from error
    return library


def _gpt_pair() -> tuple[GPT, nn.Module]:
    """Our GPT and Hugging Face's GPT-2, with 6 layers, width 384 and no dropout."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    trunk = TransformerConfig(dim=384, depth=6, num_heads=6, mlp="gelu_tanh", norm_eps=1e-5)
    ours = GPT(GPTConfig(max_length=LENGTH, backbone=trunk))
    sizes = {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": LENGTH}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    library = transformers()
    theirs = library.GPT2LMHeadModel(library.GPT2Config(**sizes, **off))
    return ours.to(device), theirs.to(device)


def _gpt_loops(batch_size: int, bf16: bool = False, compiled: bool = False) -> tuple[Side, Side]:
    """Training steps of both GPTs on (batch, 256) tokens."""
    ours, theirs = _gpt_pair()
    if compiled:
        ours.compile()
        theirs.compile()
    row = torch.randint(0, 50257, (batch_size, LENGTH + 1), device=next(ours.parameters()).device)
    tokens, targets = row[:, :-1].contiguous(), row[:, 1:].flatten()

    def our_loss() -> Tensor:
        states = ours(tokens, return_logits=False)
        return linear_cross_entropy(states.flatten(0, 1), ours.head.weight, targets) / targets.numel()

    return (
        bare_loop(ours, our_loss, bf16),
        bare_loop(theirs, lambda: theirs(input_ids=tokens, labels=tokens, use_cache=False).loss, bf16),
    )


def gpt_eager(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """GPT of 6 layers and width 384 in float32, eager, on both sides."""
    return [compare("GPT fp32 eager", "transformers fp32 eager", *_gpt_loops(batch_size or 8), rounds)]


def gpt_compiled(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """The same GPT compiled in bfloat16, ours and theirs, each against theirs in float32 eager."""
    peer = _gpt_loops(batch_size or 8)[1]
    fast = _gpt_loops(batch_size or 8, bf16=True, compiled=True)
    name = "transformers fp32 eager"
    return [
        compare("GPT bf16 compiled", name, fast[0], peer, rounds),
        compare("transformers' own, bf16 compiled", name, fast[1], peer, rounds),
    ]


def _bert_loops(batch_size: int, bf16: bool = False, compiled: bool = False) -> tuple[Side, Side]:
    """Training steps of both BERT-minis (4 layers, width 256) on (batch, 128) tokens, 15% of them masked."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    trunk = TransformerConfig(dim=256, depth=4, num_heads=4, norm_eps=1e-12, norm_first=False, final_norm=False)
    ours = BERT(BERTConfig(backbone=trunk)).to(device)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    library = transformers()
    theirs = library.BertForMaskedLM(library.BertConfig(**sizes, **off)).to(device)
    if compiled:
        ours.compile()
        theirs.compile()
    tokens = torch.randint(0, 30522, (batch_size, MASKED_LENGTH), device=device)
    count = round(0.15 * MASKED_LENGTH)
    positions = torch.rand(tokens.shape, device=device).argsort(dim=1)[:, :count].sort(dim=1).values
    labels = torch.full_like(tokens, -100).scatter(1, positions, tokens.gather(1, positions))
    targets = tokens.gather(1, positions).flatten()

    def our_loss() -> Tensor:
        states = ours(tokens, keep=positions, return_logits=False).flatten(0, 1)
        return linear_cross_entropy(states, ours.head.weight, targets, ours.head.bias) / targets.numel()

    return bare_loop(ours, our_loss, bf16), bare_loop(
        theirs, lambda: theirs(input_ids=tokens, labels=labels).loss, bf16
    )


def bert_eager(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """BERT-mini in float32, eager, on both sides."""
    return [compare("BERT-mini fp32 eager", "transformers fp32 eager", *_bert_loops(batch_size or 32), rounds)]


def bert_compiled(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """BERT-mini compiled in bfloat16, on both sides."""
    loops = _bert_loops(batch_size or 32, bf16=True, compiled=True)
    return [compare("BERT-mini bf16 compiled", "transformers bf16 compiled", *loops, rounds)]


def bert_memory(batch_size: int | None) -> tuple[float, float]:
    """Peak memory in MiB of BERT-mini's first training step, including the optimiser's state: (ours, theirs)."""
    ours, theirs = (peak_memory(partial(_bert_step, side, batch_size or 32)) / 2**20 for side in (0, 1))
    return ours, theirs


def _bert_step(side: int, batch_size: int) -> Side:
    return _bert_loops(batch_size)[side]


def generation(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """Greedy generation with GPT-2 124M, ours in float32, bfloat16 and int8, each against theirs in float32."""
    library = transformers()
    torch.manual_seed(0)
    theirs: Any = library.GPT2LMHeadModel(library.GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    ours = from_foreign(theirs.config.to_dict(), theirs.state_dict()).eval()
    tokens = torch.randint(0, theirs.config.vocab_size, (batch_size or 1, 16))
    new = NEW_TOKENS
    config = GenerationConfig(new, temperature=0)

    def our_turn(network: GPT) -> float:
        start = time.perf_counter()
        generate(network, tokens, config=config)
        return (time.perf_counter() - start) / new

    def their_turn() -> float:
        start = time.perf_counter()
        theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
        return (time.perf_counter() - start) / new

    formats = {"fp32": ours, "bf16": to_bfloat16(copy.deepcopy(ours)), "int8": to_int8(copy.deepcopy(ours))}
    return [
        compare(f"GPT-2 124M token, {name}", "transformers fp32", partial(our_turn, network), their_turn, rounds)
        for name, network in formats.items()
    ]


def tokenization(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """Byte-level BPE with 8,192 tokens on the King James Bible, with an empty cache, against the bare library."""
    texts = [piece.text for piece in open_text("kjv", "text").pieces({"train": 1.0})]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = train_tokenizer("bpe", texts, 8192)

    def our_turn() -> float:
        start = time.perf_counter()
        TextEncoder(tokenizer).encode(texts)
        return time.perf_counter() - start

    def their_turn() -> float:
        start = time.perf_counter()
        sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts))
        return time.perf_counter() - start

    row = compare(f"BPE of {megabytes:.1f} MB", "tokenizers' encode_batch_fast", our_turn, their_turn, rounds)
    print(f"byte-level BPE: {megabytes / row['ms'] * 1e3:.1f} MB a second; the library alone: "
          f"{megabytes / row['peer_ms'] * 1e3:.1f}")  # fmt: skip
    return [row]
