"""A tiny CLIP that learns four colours: its pictures, its tokenizer and its checkpoints."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from trunkline.datamodules.images.preprocessing import Preprocessing
from trunkline.datamodules.pairs.captions import CaptionEncoder
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.losses import infonce_loss
from trunkline.modules.networks import CLIP, CLIPConfig, GPTConfig, ViTConfig
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.training.checkpoints import SafeCheckpointIO

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "thing", "dark", *COLOURS]
PREPROCESSING = Preprocessing(8, 3, (0.5,), (0.5,), "bicubic", 1.0)


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(WORDS[:5])
    return made


def encoder() -> CaptionEncoder:
    return CaptionEncoder(tokenizer(), 6)


def picture(colour: str, number: int = 0) -> Image.Image:
    noise = np.random.default_rng(number).integers(-25, 26, (8, 8, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def pixels(image: Image.Image) -> Tensor:
    """Preprocess a picture by hand: (3, 8, 8)."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def module(config: CLIPConfig | None = None) -> ContrastiveImageText:
    torch.manual_seed(0)
    if config is not None:
        return ContrastiveImageText(config)
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2)
    text = GPTConfig(len(WORDS), 6, backbone=TransformerConfig(dim=16, depth=1, num_heads=2, causal=True))
    return ContrastiveImageText(CLIPConfig(ViTConfig(8, 4, pool="mean", backbone=trunk), gpt=text, dim=8))


@cache
def overfitted() -> CLIP:
    """A CLIP that has learned the colours."""
    network = module().network
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    texts = [f"a {prefix}{colour} thing" for prefix in ("", "photo of ") for colour in COLOURS]
    tokens, mask, _ = encoder().encode(texts)
    for step in range(60):
        images = torch.stack([pixels(picture(text.split()[-2], 100 * step + n)) for n, text in enumerate(texts)])
        found = network(images, tokens, mask)
        keys = torch.arange(len(texts)) % len(COLOURS)
        loss = infonce_loss(*found, *found, network.scale.factor, 0, keys) / len(texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def save(folder: Path, network: CLIP | None = None, **changes: Any) -> str:
    """Write a checkpoint as `trunkline fit` does, of this network or of a random one; returns the path."""
    made = module(None if network is None else network.config)
    if network is not None:
        made.network.load_state_dict(network.state_dict())
    data = {"preprocessing": asdict(PREPROCESSING), "tokenizer": tokenizer().to_str(), "max_length": 6}
    content = {"objective": "ContrastiveImageText", "state_dict": made.state_dict(), "ImageTextData": data}
    content = {**content, "hyper_parameters": dict(made.hparams), **changes}
    SafeCheckpointIO().save_checkpoint(content, folder / "clip.ckpt")
    return str(folder / "clip.ckpt")


def folders(folder: Path, count: int) -> Path:
    """Write `count` pictures of each colour, into one folder per colour."""
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for n in range(count):
            picture(colour, n).save(folder / colour / f"{n}.png")
    return folder


def listed(folder: Path, rows: list[tuple[str, list[str]]]) -> Path:
    """Write pictures and a table of their captions, from rows (colour, captions); returns the table's path."""
    folder.mkdir()
    lines = []
    for n, (colour, captions) in enumerate(rows):
        picture(colour, n).save(folder / f"{n}.png")
        lines.append(json.dumps({"image": f"{n}.png", "caption": captions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"
