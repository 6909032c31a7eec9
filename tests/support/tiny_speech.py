"""Tones that spell words, tiny networks that hear them, and their evaluation on several processes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import machine_settings
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from trunkline.contract import IGNORE, DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import GPT, GPTConfig, SpeechEncoderConfig
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.speech_recognizer import SpeechRecognizer
from trunkline.modules.training.optim import OptimizerConfig

START, END, SPACE, LANGUAGE = 0, 1, 2, 6
NAMES = ["<s>", "</s>", " ", "a", "b", "c", "<en>"]
"""Tokens by number; the letters are also the classes of sounds."""
CLASSES = NAMES[3:6]
V, MELS, FRAMES = len(NAMES), 6, 72
LONGEST = 6
"""Tokens of the longest text, without its end."""
Batch = dict[str, Tensor]
Kind = Literal["ctc", "decoder", "labels"]
"""What a batch is for: CTC, and classes with one label a clip; a decoder; clips with several labels."""


def letters() -> Tokenizer:
    """0 starts a text, 1 ends it, and the others are characters."""
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(NAMES)}, "<s>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", "<en>"])
    return tokenizer


def spelt(draw: torch.Generator) -> list[int]:
    """The tokens of a text: words of one or two letters with single spaces between them."""
    text = torch.randint(3, 6, (int(torch.randint(2, LONGEST + 1, (1,), generator=draw)),), generator=draw).tolist()
    return [SPACE if place in (2, 4) and place + 1 < len(text) else token for place, token in enumerate(text)]


def sound(text: Sequence[int]) -> Tensor:
    """(T, MELS) frames: each token is a tone of 6 frames with a bend of its own, then come 3 to 5 silent frames."""
    frames = torch.zeros(4 + 12 * len(text), MELS)
    at = 2
    for place, token in enumerate(text):
        frames[at : at + 6, token] = 1 + torch.arange(6) / 6
        at += 9 + (place * token) % 3
    return frames[:at]


class Tones(L.LightningDataModule):
    """Clips with texts and classes, so that all objectives that hear can use them.

    Args:
        rows: number of clips in validation and test.
        size: clips in a batch.
        kind: what the batches are for.
        facts: facts that differ from the usual ones.
    """

    def __init__(self, rows: int = 10, size: int = 4, kind: Kind = "ctc", **facts: Any) -> None:
        super().__init__()
        self.size, self.kind, self.words = size, kind, letters()
        draw = torch.Generator().manual_seed(3)
        self.texts = [spelt(draw) for _ in range(rows)]
        usual: dict[str, Any] = {"tokenizer": self.words, "vocab_size": V, "num_mels": MELS, "max_frames": FRAMES}
        usual |= {"frame_seconds": 0.25, "transcript": self.transcript, "row_name": lambda split, row: f"{split}{row}"}
        usual |= {"class_names": CLASSES, "multi_label": kind == "labels"}
        if kind == "decoder":
            usual |= {"start_tokens": [START, LANGUAGE], "end_token": END, "max_target_length": LONGEST + 2}
        self.facts = DataFacts(**{**usual, **facts})

    def transcript(self, split: str, row: int) -> str:
        """The text of a row; in a test in capital letters, so that splits cannot be mixed up."""
        text = self.words.decode(self.texts[row])
        return text.upper() if split == "test" else text

    def batches(self) -> list[Batch]:
        """All clips; the last batch is filled up with rows that are not valid."""
        rows = list(range(len(self.texts)))
        parts = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
        return [self.collate(part) for part in parts]

    def collate(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows."""
        return collate([self.texts[row] for row in rows], rows, self.size, self.kind)

    def train_dataloader(self) -> Any:
        return DataLoader(drawn(3, self.size, self.kind), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches(), batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


def collate(texts: Sequence[list[int]], rows: Sequence[int], size: int, kind: Kind = "ctc") -> Batch:
    """A batch of clips, filled up to `size` rows with short ones that have no text.

    A clip's label is its first letter; if it has several labels, they are all its letters.
    """
    clips = [sound(text) for text in texts] + [sound([3])] * (size - len(texts))
    frames = -(-max(map(len, clips)) // 8) * 8
    lengths = torch.tensor([[len(clip)] for clip in clips])
    features = torch.stack([torch.nn.functional.pad(clip, (0, 0, 0, frames - len(clip))) for clip in clips])
    none = torch.zeros(size, dtype=torch.long)
    batch = {"features": features, "mask": torch.arange(frames) < lengths, "truncated": none, "skipped": none}
    batch |= {"index": torch.tensor([*rows, *[0] * size][:size]), "valid": torch.arange(size) < len(texts)}
    texts = [*texts, *[[]] * (size - len(texts))]
    if kind == "labels":
        found = [[float(token in text) for token in range(3, 6)] for text in texts]
        return {**batch, "target": torch.tensor(found)}
    if kind == "decoder":
        before = [[START, LANGUAGE, *text] for text in texts]
        batch["target_tokens"] = padded(before, START)
        return {**batch, "targets": padded([[IGNORE, *text, END] if text else [] for text in texts], IGNORE)}
    label = torch.tensor([text[0] - 3 if text else 0 for text in texts])
    return {**batch, "label": label, "targets": padded(texts, IGNORE)}


def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """(number of rows, longest row) with the filler after the end of a row."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.long)


def drawn(count: int, size: int, kind: Kind = "ctc", seed: int = 5) -> list[Batch]:
    """Batches for training."""
    draw = torch.Generator().manual_seed(seed)
    return [collate([spelt(draw) for _ in range(size)], range(size), size, kind) for _ in range(count)]


def noisy(made: Any, noise: float) -> Any:
    """An objective whose weights tell one clip from another."""
    with torch.no_grad():
        for p in made.network.parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    return made


def encoder(dim: int = 16, **options: Any) -> SpeechEncoderConfig:
    trunk = TransformerConfig(dim=dim, depth=1, num_heads=2, rope_theta=10000.0)
    sizes = {"vocab_size": V, "num_mels": MELS, "max_frames": FRAMES, "strides": (2, 1), "positions": "none"}
    return SpeechEncoderConfig(**{**sizes, "backbone": trunk, **options})  # type: ignore[arg-type]


def recognizer(network: SpeechEncoderConfig | None = None, noise: float = 0.3, **options: Any) -> SpeechRecognizer:
    torch.manual_seed(0)
    options = {"optimizer": OptimizerConfig(lr=0.01, warmup=0.1), **options}
    made: SpeechRecognizer = noisy(SpeechRecognizer(network or encoder(), **options), noise)
    return made


def gpt() -> GPT:
    """A language model of the same tokens."""
    torch.manual_seed(1)
    made = GPT(GPTConfig(V, 16, backbone=TransformerConfig(dim=16, depth=1, num_heads=2)))
    torch.nn.init.normal_(made.token_embed.weight, std=0.5)
    return made


def evaluation(make: Callable[[], TrunklineModule], data: Tones, counts: list[int]) -> dict[str, Any]:
    """What a validation logs and has written, if this process has its share of the rows in batches of 3."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    logged: dict[str, Any] = {}
    module: Any = make()
    start = sum(counts[:rank])
    rows = list(range(start, start + counts[rank]))
    data.size = 3
    state: dict[str, Any] = {"world_size": len(counts), "testing": False, "sanity_checking": False, "datamodule": data}
    module.trainer = SimpleNamespace(**state)
    module.log = lambda name, value, **_: logged.update({name: value})
    module.eval()
    with torch.no_grad():
        module.on_validation_epoch_start()
        for first in range(0, sum(counts), 3):  # as many batches in each process; some have only rows that fill up
            module.validation_step(data.collate(rows[first : first + 3]), 0)
        module.on_validation_epoch_end()
    found = {name: float(value.compute() if isinstance(value, Metric) else value) for name, value in logged.items()}
    return {"logged": found, "written": [tuple(text) for text in getattr(module, "written", [])]}


def worker(rank: int, jobs: dict[str, Any], counts: list[int], port: int, folder: Path) -> None:
    """Run one process, and write what it found for each job (how to make an objective, and its data)."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    machine_settings.apply()
    dist.init_process_group("gloo", rank=rank, world_size=len(counts))
    found = {name: evaluation(make, data(sum(counts)), counts) for name, (make, data) in jobs.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
