"""A task of reversing letters, a tiny encoder-decoder for it, and its evaluation on several processes."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import machine_settings
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from trunkline.contract import IGNORE, DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.networks import EncoderDecoderConfig
from trunkline.modules.objectives.seq2seq import Seq2Seq
from trunkline.modules.training.distributed import gather_lists, sum_over_processes
from trunkline.modules.training.optim import OptimizerConfig

LETTERS = "abcdefg"
START, END = 0, 1
LENGTH = 8
"""Tokens of the longest source or target, with its end."""
Batch = dict[str, Tensor]


def words() -> Tokenizer:
    """Letters with spaces between them; 0 starts a target, 1 ends a text."""
    vocabulary = {name: number for number, name in enumerate(["<s>", "</s>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


class Reversing(L.LightningDataModule):
    """Pairs of letters and the same letters reversed.

    Args:
        rows: number of pairs in validation and test.
        size: pairs in a batch.
        facts: facts that differ from the usual ones.
    """

    def __init__(self, rows: int = 10, size: int = 4, **facts: Any) -> None:
        super().__init__()
        self.size, self.words = size, words()
        draw = torch.Generator().manual_seed(3)
        lengths = torch.randint(2, LENGTH, (rows,), generator=draw).tolist()
        self.sources = [torch.randint(2, 9, (length,), generator=draw).tolist() for length in lengths]
        usual = {"tokenizer": self.words, "vocab_size": 9, "max_length": LENGTH, "max_target_length": LENGTH}
        usual |= {"start_token": START, "end_token": END, "pair": self.pair}
        self.facts = DataFacts(**{**usual, **facts})

    def pair(self, split: str, row: int) -> tuple[str, str]:
        """The texts of a row; those of a test are capital letters, so that splits cannot be mixed up."""
        source, target = self.words.decode(self.sources[row]), self.words.decode(self.sources[row][::-1])
        return (source, target.upper()) if split == "test" else (source, target)

    def batches(self) -> list[Batch]:
        """All pairs; the last batch is filled up with rows that are not valid."""
        rows = list(range(len(self.sources)))
        parts = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
        return [collate([self.sources[row] for row in part], part, self.size) for part in parts]

    def train_dataloader(self) -> Any:
        return DataLoader(drawn(3, self.size), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches(), batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


def collate(sources: Sequence[list[int]], rows: Sequence[int], size: int) -> Batch:
    """A batch of sources and their reversed targets, filled up to `size` rows."""
    width = max(map(len, sources), default=1) + 1
    batch = {
        "tokens": torch.full((size, width), START),
        "mask": torch.zeros(size, width, dtype=torch.bool),
        "target_tokens": torch.full((size, width), START),
        "targets": torch.full((size, width), IGNORE),
        "truncated": torch.zeros(size, dtype=torch.long),
        "index": torch.zeros(size, dtype=torch.long),
        "valid": torch.arange(size) < len(sources),
    }
    batch["mask"][:, 0] = True  # a source that fills up is not empty
    for place, (source, row) in enumerate(zip(sources, rows, strict=True)):
        source, target = [*source, END], [*source[::-1], END]
        batch["tokens"][place, : len(source)] = torch.tensor(source)
        batch["mask"][place, : len(source)] = True
        batch["target_tokens"][place, 1 : len(target)] = torch.tensor(target[:-1])
        batch["targets"][place, : len(target)] = torch.tensor(target)
        batch["index"][place] = row
    return batch


def drawn(count: int, size: int, seed: int = 5) -> list[Batch]:
    """Batches for training."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LENGTH, (count, size), generator=draw).tolist()
    return [
        collate([torch.randint(2, 9, (n,), generator=draw).tolist() for n in row], list(range(size)), size)
        for row in lengths
    ]


def config(dim: int = 16, **options: Any) -> EncoderDecoderConfig:
    trunk = TransformerConfig(dim=dim, depth=1, num_heads=2)
    sizes = {"vocab_size": 9, "max_length": LENGTH, "max_target_length": LENGTH, "positions": "learned"}
    return EncoderDecoderConfig(**{**sizes, "encoder": trunk, "decoder": trunk, **options})  # type: ignore[arg-type]


def model(network: EncoderDecoderConfig | None = None, noise: float = 0.3, **options: Any) -> Seq2Seq:
    torch.manual_seed(0)
    made = Seq2Seq(network or config(), **{"optimizer": OptimizerConfig(lr=0.01, warmup=0.1), **options})
    with torch.no_grad():
        for p in made.network.parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    return made


def evaluation(counts: list[int]) -> dict[str, Any]:
    """What a validation logs and has written, if this process has its share of the rows in batches of 3."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    data, logged = Reversing(sum(counts)), {}
    module = model(generation=GenerationConfig(LENGTH))  # a row keeps its random numbers, whichever process has it
    start = sum(counts[:rank])
    rows = list(range(start, start + counts[rank]))
    state: dict[str, Any] = {"world_size": len(counts), "testing": False, "sanity_checking": False, "datamodule": data}
    module.trainer = SimpleNamespace(**state)  # type: ignore[assignment]
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    module.eval()
    with torch.no_grad():
        module.on_validation_epoch_start()
        for first in range(0, 9, 3):  # as many batches in each process; some have only rows that fill up
            part = rows[first : first + 3]
            module.validation_step(collate([data.sources[row] for row in part], part, 3), 0)
        module.on_validation_epoch_end()
    found = {name: float(value.compute() if isinstance(value, Metric) else value) for name, value in logged.items()}
    return {"logged": found, "written": [tuple(text) for text in module.written]}


def worker(rank: int, counts: list[int], port: int, folder: Path) -> None:
    """Run one process, and write what it found."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    machine_settings.apply()
    dist.init_process_group("gloo", rank=rank, world_size=len(counts))
    found = evaluation(counts)
    found["lists"] = gather_lists(list(range(rank, 3)), len(counts))
    found["sums"] = [int(sum_over_processes(own, len(counts))) for own in (5, torch.tensor(10 + rank))]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
