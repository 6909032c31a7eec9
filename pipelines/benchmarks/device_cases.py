"""Cases of `trunkline benchmark --device`: a network of ours and a peer's, at the sizes for which GPUs are bought.

All networks have random weights and no dropout; nothing is downloaded.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.compiled import CompiledDecoder
from trunkline.modules.generation.low_precision import to_bfloat16, to_int8
from trunkline.modules.generation.sampling import GenerationConfig, generate
from trunkline.modules.networks import GPT, BERTConfig, CLIPConfig, GPTConfig, ViTConfig
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.objectives.reduction import as_terms
from trunkline.modules.training.flops import counted_flops
from trunkline.pipelines.benchmarks.clip_cases import open_clip_network, random_pairs
from trunkline.pipelines.benchmarks.loss_cases import loss_step
from trunkline.pipelines.benchmarks.text_cases import transformers
from trunkline.pipelines.benchmarks.timing import training_step

Turn = Callable[[], object]
"""Makes a training step, or writes a batch of texts."""
Prepared = tuple[Turn, int]
"""With its floating-point operations, or 0 where they are not what limits it."""
Batch = dict[str, Tensor]
PROMPT = 16


class Shape(NamedTuple):
    """Shape of a trunk."""

    dim: int
    depth: int
    heads: int


class Sizes(NamedTuple):
    """What the cases measure; the defaults are for a GPU."""

    gpt: Shape = Shape(768, 12, 12)
    gpt_vocabulary: int = 50304
    """Words of GPT-2, padded to a multiple of 64, as in nanoGPT's recipe."""
    gpt_length: int = 1024
    vit_small: Shape = Shape(384, 12, 6)
    vit_base: Shape = Shape(768, 12, 12)
    image_size: int = 224
    patch_size: int = 16
    classes: int = 1000
    bert: Shape = Shape(768, 12, 12)
    bert_vocabulary: int = 30522
    bert_length: int = 128
    clip_image: Shape = Shape(768, 12, 12)
    clip_patch: int = 32
    clip_text: Shape = Shape(512, 12, 8)
    clip_vocabulary: int = 49408
    clip_length: int = 77
    new_tokens: int = 128
    batch_sizes: tuple[int, ...] = (32, 256, 128, 256, 512, 1, 64, 4096)
    """Of the cases in their order."""


TINY = Sizes(
    gpt=Shape(16, 1, 2),
    gpt_vocabulary=64,
    gpt_length=24,
    vit_small=Shape(16, 1, 2),
    vit_base=Shape(16, 2, 2),
    image_size=32,
    classes=10,
    bert=Shape(16, 1, 2),
    bert_vocabulary=64,
    bert_length=16,
    clip_image=Shape(64, 1, 1),
    clip_patch=16,
    clip_text=Shape(16, 1, 2),
    clip_vocabulary=64,
    clip_length=8,
    new_tokens=4,
    batch_sizes=(4, 4, 4, 4, 4, 1, 4, 32),
)
"""For a rehearsal without a GPU: the same code in seconds."""


class Bench(NamedTuple):
    """Where and how a side is measured."""

    sizes: Sizes
    batch_size: int
    device: torch.device
    compiled: bool


class DeviceCase(NamedTuple):
    """A comparison."""

    what: str
    """Its `--what`."""
    name: str
    peer: str
    unit: str
    """What is counted in a second."""
    batch_size: int
    least: int
    """The smallest batch that means something."""
    units: int
    """In each row of a batch."""
    ours: Callable[[Bench], Prepared]
    theirs: Callable[[Bench], Prepared]


def device_cases(sizes: Sizes) -> Iterator[DeviceCase]:
    """All cases, the most telling first."""
    gpt, small, base, bert, clip, one, many, tokens = sizes.batch_sizes
    words, image, new = sizes.gpt_length, sizes.image_size, sizes.new_tokens
    tiny = "tiny " if sizes == TINY else ""
    name = f"{tiny}GPT-2 124M, rows of {words}"
    yield DeviceCase("gpt", name, "transformers", "tokens", gpt, 1, words, our_gpt, their_gpt)
    for letter, batch_size, shape in (("S", small, sizes.vit_small), ("B", base, sizes.vit_base)):
        name = f"{tiny}ViT-{letter}/{sizes.patch_size} at {image} pixels"
        ours, theirs = partial(our_vit, shape=shape), partial(their_vit, shape=shape)
        yield DeviceCase("vit", name, "timm", "images", batch_size, 1, 1, ours, theirs)
    name = f"{tiny}BERT-base, rows of {sizes.bert_length}"
    yield DeviceCase("bert", name, "transformers", "tokens", bert, 1, sizes.bert_length, our_bert, their_bert)
    name = f"{tiny}CLIP ViT-B/{sizes.clip_patch} at {image} pixels"
    yield DeviceCase("clip", name, "open_clip", "pairs", clip, 2, 1, our_clip, their_clip)
    for weights in ("bf16", "int8"):
        for batch_size in (one, many):
            name = f"{new} greedy tokens of {tiny}GPT-2 124M, {weights} weights, batch {batch_size}"
            sizes_of = "generation", name, "transformers", "tokens", batch_size, batch_size, new
            yield DeviceCase(*sizes_of, partial(our_generation, weights=weights), their_generation)
    name = f"output layer and loss of {tiny}GPT-2 124M"
    for peer in ("plain", "compiled"):
        title = {"plain": "plain loss", "compiled": "plain loss, compiled"}[peer]
        yield DeviceCase("loss", name, title, "tokens", tokens, 1, 1, our_loss, partial(their_loss, kind=peer))


def trunk(shape: Shape, **options: Any) -> TransformerConfig:
    """A trunk of this shape."""
    return TransformerConfig(dim=shape.dim, depth=shape.depth, num_heads=shape.heads, **options)


def our_step(bench: Bench, module: TrunklineModule, batch: Any) -> Prepared:
    """A training step of an objective, as `trunkline fit` makes it, and its floating-point operations."""
    module.to(bench.device)
    flops = module.flops_per_batch(batch)
    if bench.compiled:
        module.network.compile()

    def loss() -> Tensor:
        return torch.stack([term.total / term.count for term in as_terms(module.loss(batch))]).sum()

    return training_step(module, loss, bf16=True), flops


def their_step(bench: Bench, network: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor]) -> Prepared:
    """A training step of a peer's network, and its operations: where we leave tokens out, a peer may compute them."""
    network.to(bench.device)
    row = {name: field[:1] for name, field in batch.items()}
    flops = bench.batch_size * counted_flops(network, lambda: loss(row))
    if bench.compiled:
        network.compile()
    return training_step(network, lambda: loss(batch), bf16=True), flops


def gpt_batch(bench: Bench) -> Batch:
    """Random tokens (batch, length), and the next one of each."""
    shape = bench.batch_size, bench.sizes.gpt_length + 1
    row = torch.randint(0, bench.sizes.gpt_vocabulary, shape, device=bench.device)
    return {"tokens": row[:, :-1].contiguous(), "targets": row[:, 1:].contiguous()}


def gpt_config(sizes: Sizes) -> GPTConfig:
    """GPT-2's architecture."""
    backbone = trunk(sizes.gpt, mlp="gelu_tanh", norm_eps=1e-5)
    return GPTConfig(sizes.gpt_vocabulary, sizes.gpt_length, backbone=backbone)


def gpt_peer(sizes: Sizes) -> Any:
    """The same of transformers."""
    library, (dim, depth, heads) = transformers(), sizes.gpt
    shape = {"n_embd": dim, "n_layer": depth, "n_head": heads, "n_positions": sizes.gpt_length}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    return library.GPT2LMHeadModel(library.GPT2Config(vocab_size=sizes.gpt_vocabulary, **shape, **off))


def our_gpt(bench: Bench) -> Prepared:
    """A step of causal language modelling."""
    return our_step(bench, CausalLM(gpt_config(bench.sizes)), gpt_batch(bench))


def their_gpt(bench: Bench) -> Prepared:
    """The same of transformers; the labels are shifted there."""
    network = gpt_peer(bench.sizes)
    batch = {"input_ids": (tokens := gpt_batch(bench)["tokens"]), "labels": tokens}
    return their_step(bench, network, batch, lambda batch: network(**batch, use_cache=False).loss)


def image_batch(bench: Bench) -> Batch:
    """Random images, and their classes."""
    sizes, count = bench.sizes, bench.batch_size
    image = torch.randn(count, 3, sizes.image_size, sizes.image_size, device=bench.device)
    return {"image": image, "label": torch.randint(0, sizes.classes, (count,), device=bench.device)}


def our_vit(bench: Bench, shape: Shape) -> Prepared:
    """A step of image classification."""
    sizes = bench.sizes
    network = ViTConfig(sizes.image_size, sizes.patch_size, num_classes=sizes.classes, backbone=trunk(shape))
    return our_step(bench, ImageClassifier(network), image_batch(bench))


def their_vit(bench: Bench, shape: Shape) -> Prepared:
    """The same of timm."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = bench.sizes
    options: Any = {
        "embed_dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "num_classes": sizes.classes,
    }
    network = VisionTransformer(sizes.image_size, sizes.patch_size, **options)
    return their_step(
        bench, network, image_batch(bench), lambda batch: F.cross_entropy(network(batch["image"]), batch["label"])
    )


def masked_batch(bench: Bench) -> Batch:
    """Random tokens, 15% of which are to be predicted."""
    shape = bench.batch_size, bench.sizes.bert_length
    tokens = torch.randint(0, bench.sizes.bert_vocabulary, shape, device=bench.device)
    count = round(0.15 * bench.sizes.bert_length)
    positions = torch.rand(shape, device=bench.device).argsort(dim=1)[:, :count].sort(dim=1).values
    return {"tokens": tokens, "positions": positions, "targets": tokens.gather(1, positions)}


def our_bert(bench: Bench) -> Prepared:
    """A step of masked language modelling."""
    sizes = bench.sizes
    backbone = trunk(sizes.bert, norm_eps=1e-12, norm_first=False, final_norm=False)
    return our_step(bench, MaskedLM(BERTConfig(sizes.bert_vocabulary, backbone=backbone)), masked_batch(bench))


def their_bert(bench: Bench) -> Prepared:
    """The same of transformers."""
    library, (dim, depth, heads), batch = transformers(), bench.sizes.bert, masked_batch(bench)
    shape = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * dim}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    network = library.BertForMaskedLM(library.BertConfig(vocab_size=bench.sizes.bert_vocabulary, **shape, **off))
    tokens = batch["tokens"]
    labels = torch.full_like(tokens, -100).scatter(1, batch["positions"], batch["targets"])
    return their_step(bench, network, {"input_ids": tokens, "labels": labels}, lambda batch: network(**batch).loss)


def pair_batch(bench: Bench) -> Batch:
    """Random pairs of images and captions."""
    sizes = bench.sizes
    shape = sizes.image_size, sizes.clip_length, sizes.clip_vocabulary
    return random_pairs(bench.batch_size, *shape, bench.device)


def our_clip(bench: Bench) -> Prepared:
    """A step of contrastive learning."""
    sizes = bench.sizes
    image_trunk, text_trunk = trunk(sizes.clip_image, norm_eps=1e-5), trunk(sizes.clip_text, norm_eps=1e-5)
    image = ViTConfig(sizes.image_size, sizes.clip_patch, embed_norm=True, backbone=image_trunk)
    text = GPTConfig(sizes.clip_vocabulary, sizes.clip_length, backbone=text_trunk)
    network = CLIPConfig(image, gpt=text, dim=sizes.clip_text.dim)
    return our_step(bench, ContrastiveImageText(network), pair_batch(bench))


def their_clip(bench: Bench) -> Prepared:
    """The same of open_clip."""
    sizes = bench.sizes
    image, text = sizes.clip_image, sizes.clip_text
    vision = {"layers": image.depth, "width": image.dim, "patch_size": sizes.clip_patch, "image_size": sizes.image_size}
    words = {"context_length": sizes.clip_length, "vocab_size": sizes.clip_vocabulary}
    tower = {"width": text.dim, "heads": text.heads, "layers": text.depth}
    network, criterion = open_clip_network(text.dim, vision, {**words, **tower})
    return their_step(
        bench, network, pair_batch(bench), lambda batch: criterion(*network(batch["image"], batch["tokens"])[:3])
    )


def prompts(bench: Bench) -> Tensor:
    """Random tokens (batch, PROMPT)."""
    return torch.randint(0, bench.sizes.gpt_vocabulary, (bench.batch_size, PROMPT), device=bench.device)


def our_generation(bench: Bench, weights: str) -> Prepared:
    """Greedy generation with weights in bf16 or int8; its speed is that of reading the weights, not of computing."""
    convert = {"bf16": to_bfloat16, "int8": to_int8}[weights]
    network: Any = convert(GPT(gpt_config(bench.sizes)).to(bench.device))
    network = CompiledDecoder(network) if bench.compiled else network
    tokens, config = prompts(bench), GenerationConfig(bench.sizes.new_tokens, temperature=0)
    return lambda: generate(network, tokens, config=config), 0


def their_generation(bench: Bench) -> Prepared:
    """The same of transformers with weights in bfloat16; it compiles its step if its cache has a fixed size."""
    network, tokens = gpt_peer(bench.sizes).eval().to(bench.device, torch.bfloat16), prompts(bench)
    options: dict[str, Any] = {"max_new_tokens": bench.sizes.new_tokens, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static"} if bench.compiled else {}
    return lambda: network.generate(tokens, attention_mask=torch.ones_like(tokens), **options), 0


def our_loss(bench: Bench) -> Prepared:
    """The loss that never holds all logits, which compiles itself on a GPU."""
    return loss_side(bench, "chunked")


def their_loss(bench: Bench, kind: str) -> Prepared:
    """The loss of all logits at once, `plain` or `compiled`."""
    return loss_side(bench, kind if bench.compiled else "plain")


def loss_side(bench: Bench, kind: str) -> Prepared:
    """A step of a loss; its operations are a product of the output layer, and one for each of the two gradients."""
    dim, words = bench.sizes.gpt.dim, bench.sizes.gpt_vocabulary
    step = loss_step(kind, bench.batch_size, bench.device, True, dim, words)
    return step, 3 * 2 * bench.batch_size * dim * words
