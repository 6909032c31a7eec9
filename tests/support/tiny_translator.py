"""Checkpoints of tiny encoder-decoders over letters, and translations by hand: one text, one token at a time."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import EncoderDecoder, EncoderDecoderConfig
from trunkline.modules.training.checkpoints import SafeCheckpointIO

END, UP, REV = 0, 1, 2
"""Ids of the special tokens."""
LANGUAGES = ["up", "rev"]
LONGEST_SOURCE, LONGEST_TARGET = 12, 10
SETTINGS: dict[str, Any] = {
    "prefix": "",
    "languages": None,
    "max_length": LONGEST_SOURCE,
    "max_target_length": LONGEST_TARGET,
    "start_token": "</s>",
}


def letters(text: str = "abcdef -") -> Tokenizer:
    """A token for each character."""
    names = ["</s>", "<2up>", "<2rev>", "?", *text]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(names[:3])
    return tokenizer


def network_config(**options: Any) -> EncoderDecoderConfig:
    trunk = TransformerConfig(dim=32, depth=1, num_heads=2)
    fields = {"vocab_size": 12, "max_length": 14, "max_target_length": 11, "positions": "learned"}
    return EncoderDecoderConfig(**{**fields, "encoder": trunk, "decoder": trunk, **options})  # type: ignore[arg-type]


def random_network(seed: int = 4, **options: Any) -> EncoderDecoder:
    """A network whose texts depend on the source and end after different numbers of tokens."""
    torch.manual_seed(seed)
    network = EncoderDecoder(network_config(**options))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.4)
    return network.eval()


def save(
    folder: Path,
    settings: dict[str, Any] | None = None,
    target: Tokenizer | None = None,
    change: Callable[[dict[str, Any]], Any] = lambda content: None,
    **options: Any,
) -> str:
    """A checkpoint in the format of training, of a network with random weights.

    Args:
        folder: where it is written.
        settings: settings of the data that differ from `SETTINGS`.
        target: the tokenizer of the targets, if it is another one.
        change: changes the content.
        **options: `seed` of the weights, and fields of the network's configuration.
    """
    network = random_network(**options)
    content = {
        "objective": "Seq2Seq",
        "hyper_parameters": {
            "network": asdict(network.config),
            "generation": None,
            "scores": ["exact", "bleu", "chrf"],
            "tokenize": "13a",
        },
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "TranslationData": {
            "tokenizer": letters().to_str(),
            "target_tokenizer": None if target is None else target.to_str(),
            "settings": {**SETTINGS, **(settings or {})},
            "source": "trained.jsonl",
            "fractions": {"val": 0.25, "test": 0.0},
            "overlong": {"train": 0},
        },
    }
    change(content)
    SafeCheckpointIO().save_checkpoint(content, folder / "a.ckpt")
    return str(folder / "a.ckpt")


@torch.no_grad()
def written_ids(network: EncoderDecoder, source: list[int], longest: int = LONGEST_TARGET) -> list[int]:
    """The likeliest tokens, each by a pass over the whole text so far."""
    target = [END]
    while len(target) <= longest:
        best = int(network(torch.tensor([source]), torch.tensor([target]))[0, -1].argmax())
        if best == END:
            break
        target.append(best)
    return target[1:]


def by_hand(
    network: EncoderDecoder,
    text: str,
    first: tuple[int, ...] = (),
    words: Tokenizer | None = None,
    longest: int = LONGEST_TARGET,
) -> str:
    """The greedy translation of a text; `first` are the tokens before it, `words` the tokenizer of the targets."""
    source = [*first, *letters().encode(text).ids][: LONGEST_SOURCE - 1]
    return (words or letters()).decode(written_ids(network, [*source, END], longest), skip_special_tokens=True)
