"""A language model in TensorBoard: generated texts, filled masks, and attention of the heads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.callbacks.drawing import new_figure, tensorboard, tokenizer_of
from trunkline.modules.generation.decoding import Decoder
from trunkline.modules.generation.filling import fill_masks
from trunkline.modules.generation.sampling import GenerationConfig, generate
from trunkline.modules.networks import BERT, GPT, TextHead
from trunkline.modules.objectives.checks import facts_of
from trunkline.names import with_article

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TextSamples(Callback):
    """After each validation, continues fixed prompts (`val/samples`); at the end of training, prints the last texts.

    The data must have a tokenizer. All processes generate, because sharded weights need all of them.

    Args:
        prompts: beginnings of the texts.
        max_new_tokens: number of tokens after the prompt.
        temperature: as in `GenerationConfig`.
        top_p: as in `GenerationConfig`.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_p: float | None = 0.95,
    ) -> None:
        self.prompts = list(prompts)
        self.config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        self.texts: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a network that writes no text, and a prompt without tokens, before training starts."""
        check_network(self, pl_module.network, Decoder)
        for prompt in self.prompts:
            if not tokenizer_of(trainer, self).encode(prompt, add_special_tokens=False).ids:
                raise TrunklineError(f"TextSamples: the prompt {prompt!r} has no tokens; give it some text")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        tokenizer, network = tokenizer_of(trainer, self), pl_module.network
        assert isinstance(network, Decoder)
        self.texts = []
        for prompt in self.prompts:
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids[-network.max_length :]
            (new,) = generate(network, torch.tensor([ids], device=pl_module.device), config=self.config)
            self.texts.append(tokenizer.decode(ids + new))
        writer = tensorboard(trainer)
        if writer is not None:
            fenced = "\n\n".join(f"```\n{text}\n```" for text in self.texts)
            writer.add_text("val/samples", fenced, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for text in self.texts:
                print(f"\n{text}\n" + "─" * 40)


class FilledMasks(Callback):
    """After each validation, shows the likeliest words for the masks in fixed sentences (`val/filled`).

    The datamodule must be `MaskedTextData`. All processes compute, because sharded weights need all of them.

    Args:
        sentences: each holds the tokenizer's mask (`[MASK]`, `<mask>`) at least once.
        count: number of words shown for each mask.
    """

    def __init__(self, sentences: Sequence[str], count: int = 5) -> None:
        self.sentences, self.count = list(sentences), count
        self.rows: list[tuple[list[int], int]] = []
        """For each sentence, its token ids and the id of the mask."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a sentence without a mask, or one that is too long, before training starts."""
        encode = facts_of(trainer).encode_masked
        if encode is None:
            raise TrunklineError("FilledMasks needs MaskedTextData; leave the callback out with other data")
        network: Any = check_network(self, pl_module.network, BERT)
        limit = network.config.max_length
        self.rows = [encode(sentence, limit, "FilledMasks: the sentence") for sentence in self.sentences]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        tokenizer, network = tokenizer_of(trainer, self), pl_module.network
        assert isinstance(network, BERT)
        lines = ["| sentence | likeliest |", "|---|---|"]
        for sentence, (ids, mask) in zip(self.sentences, self.rows, strict=True):
            tokens = torch.tensor(ids, device=pl_module.device)
            for filling in fill_masks(network, tokens, mask, self.count):
                found = zip(filling.tokens, filling.probabilities, strict=True)
                words = ", ".join(f"{tokenizer.decode([token])} ({p:.2f})" for token, p in found)
                lines.append(f"| {sentence} | {words} |")
        writer = tensorboard(trainer)
        if writer is not None:
            writer.add_text("val/filled", "\n".join(lines), trainer.global_step)


class AttentionHeads(Callback):
    """After each validation, draws the attention of each head on a sentence (`val/attention`).

    Args:
        sentence: should be short, because each token gets a row and a column.
        blocks: largest number of blocks drawn, evenly spread from the first to the last.
        heads: largest number of heads drawn in each block.
    """

    def __init__(self, sentence: str, blocks: int = 4, heads: int = 8) -> None:
        self.sentence, self.blocks, self.heads = sentence, blocks, heads

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse another network before training starts."""
        check_network(self, pl_module.network, GPT, BERT, TextHead)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        tokenizer, network = tokenizer_of(trainer, self), pl_module.network
        if isinstance(network, TextHead):
            network = network.body
        assert isinstance(network, GPT | BERT)
        ids = tokenizer.encode(self.sentence).ids[: network.config.max_length]
        tokens = torch.tensor([ids], device=pl_module.device)
        training = network.training
        network.eval()
        attention = network.forward_features(tokens, return_attention=True).attention
        network.train(training)
        assert attention is not None
        writer = tensorboard(trainer)
        if writer is not None:
            shown = torch.linspace(0, len(attention) - 1, min(self.blocks, len(attention))).round().int().unique()
            maps = {int(n): attention[n][0, : self.heads].float().cpu() for n in shown}
            labels = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
            writer.add_figure("val/attention", draw_heads(maps, labels), trainer.global_step)


def check_network(callback: Callback, network: Any, *kinds: type) -> Any:
    """The network, if it is of one of the kinds.

    Raises:
        TrunklineError: otherwise; before the first step, not after the first validation.
    """
    if not isinstance(network, kinds):
        needed = with_article(" or ".join(kind.__name__ for kind in kinds))
        raise TrunklineError(
            f"{type(callback).__name__} needs {needed}, but the network is "
            f"{with_article(type(network).__name__)}; leave the callback out"
        )
    return network


def draw_heads(maps: dict[int, Tensor], labels: list[str]) -> "Figure":
    """Draw a row of maps (H, T, T) for each block; a map has a row for each query and a column for each key."""
    heads = len(next(iter(maps.values())))
    side = max(1.6, 0.14 * len(labels))
    figure = new_figure(side * heads + 1, side * len(maps) + 1)
    axes = figure.subplots(len(maps), heads, squeeze=False)
    for row, (block, weights) in zip(axes, maps.items(), strict=True):
        for head, (place, picture) in enumerate(zip(row, weights, strict=True)):
            place.imshow(picture, cmap="viridis", vmin=0)
            place.set(xticks=[], yticks=[])
            place.set_title(f"block {block}, head {head}", fontsize=7)
        row[0].set_yticks(range(len(labels)), labels, fontsize=6)
    for place in axes[-1]:
        place.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
    return figure
