"""Texts that a trained encoder-decoder writes: what `translate` and `evaluate` share."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.tokenizers import end_of_text_id
from trunkline.datamodules.translation.source_encoder import SourceEncoder
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.networks import EncoderDecoder
from trunkline.pipelines.generating import NumberFormat, SourceWriter, prepared
from trunkline.pipelines.trained import Trained
from trunkline.ranges import check_ranges


class Translator(NamedTuple):
    """An encoder-decoder in evaluation mode, with what its texts need."""

    network: EncoderDecoder
    writer: SourceWriter
    sources: SourceEncoder
    """Turns sources into tokens."""
    words: Tokenizer
    """The tokenizer of the targets."""
    start: int
    """Token that the decoder reads first."""
    longest: int
    """Largest number of tokens of a target in training, its end included."""
    device: torch.device

    @classmethod
    def of(
        cls,
        trained: Trained,
        device: torch.device,
        dtype: NumberFormat = "float32",
        too_long: Literal["cut", "refuse"] = "cut",
        compile: bool = False,
    ) -> "Translator":
        """The translator in a checkpoint.

        Args:
            trained: the checkpoint.
            device: where it computes.
            dtype: number format of its weights.
            too_long: what happens to sources that are too long, as in `SourceEncoder`.
            compile: compile the step that makes a token.

        Raises:
            TrunklineError: if the checkpoint is of another objective, was not trained on pairs of texts, or is broken.
        """
        trained.require("translate")
        settings = pair_settings(trained)
        known = {name: settings[name] for name in ("prefix", "languages", "max_length")}
        sources = SourceEncoder(trained.tokenizer(), **known, too_long=too_long)
        words, longest = trained.target_tokenizer(), settings["max_target_length"]
        start = words.token_to_id(settings["start_token"])
        if start is None:
            raise TrunklineError(f"the tokenizer in {trained.file} has no token {settings['start_token']}; train again")
        network: Any = prepared(trained.network, dtype, device)
        return cls(network, SourceWriter(network, compile), sources, words, start, longest, device)

    def write(
        self, sources: Sequence[Sequence[int]], config: GenerationConfig, batch_size: int, doing: str = "translating"
    ) -> list[str]:
        """The text for each source.

        Sources of like length are batched, the longest first, so that too large a batch fails at once.

        Args:
            sources: token ids of each source.
            config: how the tokens are chosen; with sampling, the number of a source decides its random numbers.
            batch_size: number of sources at a time.
            doing: what a terminal shows beside the progress.

        Raises:
            TrunklineError: if `batch_size` is below 1, or a text can be longer than the network can see.
        """
        check_batch(batch_size)
        self.check_length(config)
        order = sorted(range(len(sources)), key=lambda n: -len(sources[n]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        end, texts = end_of_text_id(self.words), [""] * len(order)
        console = Console(stderr=True)  # a translation may go to the standard output
        for batch in track(batches, doing, console=console, transient=True, disable=not console.is_terminal):
            rows, mask = right_padded([sources[n] for n in batch], self.device)
            prompts = torch.full((len(batch), 1), self.start, device=self.device)
            found = self.writer.write(rows, mask, prompts, config, [end], batch)
            for number, text in zip(batch, self.words.decode_batch(found, skip_special_tokens=True), strict=True):
                texts[number] = text
        return texts

    def check_length(self, config: GenerationConfig) -> None:
        """Compare the length of the texts with what the network can see.

        Raises:
            TrunklineError: if a text can be longer.
        """
        limit = self.network.config.max_target_length
        if config.max_new_tokens > limit:
            raise TrunklineError(
                f"max_new_tokens={config.max_new_tokens} is more than the {limit} tokens of a target that the network "
                f"can see (max_target_length); set it to at most {limit}",
                "max_new_tokens",
            )


def pair_settings(trained: Trained) -> dict[str, Any]:
    """The settings with which a checkpoint's pairs of texts were prepared.

    Raises:
        TrunklineError: if it was trained on other data.
    """
    settings = trained.data_state("settings") if trained.data is None else trained.data.get("settings", {})
    if "start_token" not in settings:
        raise TrunklineError(
            f"{trained.file} was trained with {trained.data_name}, which has no pairs of sources and targets; train it "
            "on TranslationData first"
        )
    found: dict[str, Any] = settings
    return found


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows at their end: tokens (B, S) and their mask (B, S), False for padding."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(width, device=device) < lengths[:, None]


def check_batch(batch_size: int, num_workers: int = 0) -> None:
    """Refuse a batch without rows, and fewer than no processes that read."""
    given = {"batch_size": batch_size, "num_workers": num_workers}
    check_ranges("", given, batch_size="[1, inf)", num_workers="[0, inf)")


def generation_of(trained: Trained, longest: int, **given: Any) -> GenerationConfig:
    """How texts are generated: as in the validation of the run, except for what is given.

    Args:
        trained: the checkpoint; if its recipe says nothing, the likeliest token is always taken.
        longest: largest number of tokens, if neither the recipe nor `given` says it.
        **given: fields of `GenerationConfig`; None if they are left out. Filters of sampling set the temperature to 1,
            unless it is given.

    Raises:
        TrunklineError: for values out of range or that exclude each other.
    """
    fields: dict[str, Any] = trained.content["hyper_parameters"].get("generation") or {}
    fields = {"max_new_tokens": longest, "temperature": 0.0} | fields
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() & {"top_k", "top_p", "min_p"}:
        fields["temperature"] = fields["temperature"] or 1.0
    return GenerationConfig(**{**fields, **given})
