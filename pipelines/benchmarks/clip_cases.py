"""Cases of `trunkline benchmark` with pairs of images and texts."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.losses import infonce_loss
from trunkline.modules.networks import CLIP, CLIPConfig, GPTConfig, ViTConfig
from trunkline.pipelines.benchmarks.memory import peak_memory
from trunkline.pipelines.benchmarks.timing import Side, bare_loop, compare

IMAGE_SIZE, PATCH_SIZE, WIDTH, IMAGE_LAYERS, TEXT_LAYERS = 72, 8, 256, 6, 4
VOCABULARY, LENGTH = 49408, 77
"""Vocabulary of OpenAI's tokenizer, and tokens of a caption; both are open_clip's defaults."""


def small_clip() -> CLIP:
    """A ViT of 6 layers with cls pooling and CLIP's norm before the trunk, and a causal text tower of 4; width 256."""
    trunks = [
        TransformerConfig(dim=WIDTH, depth=depth, num_heads=4, norm_eps=1e-5) for depth in (IMAGE_LAYERS, TEXT_LAYERS)
    ]
    image = ViTConfig(IMAGE_SIZE, PATCH_SIZE, embed_norm=True, backbone=trunks[0])
    return CLIP(CLIPConfig(image, gpt=GPTConfig(VOCABULARY, LENGTH, backbone=trunks[1]), dim=WIDTH))


def open_clip_peer() -> tuple[Any, nn.Module]:
    """open_clip's network of the same shape, and its loss; errors as in `open_clip_network`."""
    image = {"layers": IMAGE_LAYERS, "width": WIDTH, "patch_size": PATCH_SIZE, "image_size": IMAGE_SIZE}
    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 4, "layers": TEXT_LAYERS}
    return open_clip_network(WIDTH, image, text)


def open_clip_network(dim: int, image: dict[str, int], text: dict[str, int]) -> tuple[Any, nn.Module]:
    """open_clip's network with random weights, with heads of 64 in the image tower, and its loss.

    Args:
        dim: of the shared space.
        image: fields of its `CLIPVisionCfg`.
        text: fields of its `CLIPTextCfg`.

    Raises:
        TrunklineError: if open_clip is not installed.
    """
    try:
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP as TheirCLIP
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        raise TrunklineError("this case compares with open_clip; run pip install 'trunkline[bench]'") from error
    vision: Any = {"head_width": 64, **image}
    return TheirCLIP(dim, CLIPVisionCfg(**vision), CLIPTextCfg(**text)), ClipLoss()


def pairs(batch_size: int) -> dict[str, Tensor]:
    """Random images (batch, 3, 72, 72), and captions of random lengths in (batch, 77) tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return random_pairs(batch_size, IMAGE_SIZE, LENGTH, VOCABULARY, device)


def random_pairs(
    batch_size: int, image_size: int, length: int, vocabulary: int, device: torch.device
) -> dict[str, Tensor]:
    """Random images (batch, 3, image_size, image_size), and captions of random lengths in (batch, length) tokens."""
    lengths = torch.randint(5, length + 1, (batch_size, 1), device=device)
    places = torch.arange(length, device=device)
    tokens = torch.randint(1, vocabulary - 1, (batch_size, length), device=device)
    end = vocabulary - 1  # open_clip pools a text at its largest id
    return {
        "image": torch.randn(batch_size, 3, image_size, image_size, device=device),
        "tokens": tokens.masked_fill(places == lengths - 1, end).masked_fill(places >= lengths, 0),
        "mask": places < lengths,
        "caption_key": torch.arange(batch_size, device=device),
    }


def _clip_loops(batch_size: int, bf16: bool = False, compiled: bool = False) -> tuple[Side, Side]:
    """Training steps of our CLIP and of open_clip's."""
    torch.manual_seed(0)
    batch = pairs(batch_size)
    ours, (theirs, their_criterion) = small_clip(), open_clip_peer()
    ours, theirs = ours.to(batch["image"].device), theirs.to(batch["image"].device)
    if compiled:
        ours.compile()
        theirs.compile()

    def our_loss() -> Tensor:
        images, texts = ours(batch["image"], batch["tokens"], batch["mask"])
        return infonce_loss(images, texts, images, texts, ours.scale.factor) / batch_size

    def their_loss() -> Tensor:
        return their_criterion(*theirs(batch["image"], batch["tokens"])[:3])

    return bare_loop(ours, our_loss, bf16), bare_loop(theirs, their_loss, bf16)


def clip_eager(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """A CLIP in float32, eager, on both sides."""
    return [compare("CLIP fp32 eager", "open_clip fp32 eager", *_clip_loops(batch_size or 64), rounds)]


def clip_compiled(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """A CLIP compiled in bfloat16, ours and open_clip's, each against open_clip in float32 eager."""
    peer = _clip_loops(batch_size or 64)[1]
    fast = _clip_loops(batch_size or 64, bf16=True, compiled=True)
    name = "open_clip fp32 eager"
    return [
        compare("CLIP bf16 compiled", name, fast[0], peer, rounds),
        compare("open_clip's own, bf16 compiled", name, fast[1], peer, rounds),
    ]


LARGE, CHUNK = 2048, 128


def clip_chunks(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """Gradient caching: 2,048 pairs in chunks of 128 against batches of 128; prints memory, returns time per pair."""
    chunked, plain = partial(_contrastive_step, LARGE, CHUNK), partial(_contrastive_step, CHUNK, None)
    large, small = (peak_memory(prepare) / 2**20 for prepare in (chunked, plain))
    print(f"CLIP step, peak memory: {CHUNK} pairs {small:.0f} MiB, {LARGE} in chunks of {CHUNK} {large:.0f} MiB")
    ours, peer = partial(_seconds_a_pair, chunked(), LARGE), partial(_seconds_a_pair, plain(), CHUNK)
    return [compare("a pair, in chunks", "a pair, plain", ours, peer, min(rounds, 3))]


def _contrastive_step(batch_size: int, chunk: int | None) -> Side:
    """A training step, including making its batch."""
    from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText

    torch.manual_seed(0)
    module = ContrastiveImageText(small_clip().config, chunk_size=chunk)
    module.to("cuda" if torch.cuda.is_available() else "cpu")

    def loss() -> Tensor:
        batch: Any = pairs(batch_size)
        (term,) = module.loss(batch)
        return term.total / term.count

    return bare_loop(module, loss)


def _seconds_a_pair(step: Side, size: int) -> float:
    return step() / size
