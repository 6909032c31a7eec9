"""What TensorBoard shows of a language model: texts it writes, and where its heads look."""

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.callbacks.drawing import tensorboard, tokenizer_of
from trunkline.modules.generation.filling import fill_masks
from trunkline.modules.generation.sampling import GenerationConfig, generate
from trunkline.modules.networks import BERT, GPT, TextHead
from trunkline.modules.objectives.checks import facts_of


class TextSamples(Callback):
    """After each validation, continue fixed prompts (`val/samples`); at the end of training print the last texts.

    The data has a tokenizer. All processes generate, because sharded weights need them all.

    Args:
        prompts: how the texts begin.
        max_new_tokens: tokens of each text after its prompt.
        temperature: see `GenerationConfig`, as `top_p`.
        top_p: see there.
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
        """Find a prompt without tokens before the first step."""
        for prompt in self.prompts:
            if not tokenizer_of(trainer, self).encode(prompt, add_special_tokens=False).ids:
                raise TrunklineError(f"TextSamples: the prompt {prompt!r} has no tokens; give it some text")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        if trainer.sanity_checking:
            return
        tokenizer, network = tokenizer_of(trainer, self), pl_module.network
        assert isinstance(network, GPT)
        self.texts = []
        for prompt in self.prompts:
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids[-network.config.max_length :]
            (new,) = generate(network, torch.tensor([ids], device=pl_module.device), config=self.config)
            self.texts.append(tokenizer.decode(ids + new))
        writer = tensorboard(trainer)
        if writer is not None:
            fenced = "\n\n".join(f"```\n{text}\n```" for text in self.texts)
            writer.add_text("val/samples", fenced, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print."""
        if trainer.is_global_zero:
            for text in self.texts:
                print(f"\n{text}\n" + "─" * 40)


class FilledMasks(Callback):
    """After each validation, the likeliest words for the masks of fixed sentences (`val/filled`).

    The datamodule is `MaskedTextData`. All processes compute, because sharded weights need them all.

    Args:
        sentences: with the tokenizer's mask (`[MASK]`, `<mask>`) in each.
        count: words shown for each mask.
    """

    def __init__(self, sentences: Sequence[str], count: int = 5) -> None:
        self.sentences, self.count = list(sentences), count
        self.rows: list[tuple[list[int], int]] = []
        """Ids of each sentence, and that of the mask."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find a sentence without a mask, or one that is too long, before the first step."""
        encode = facts_of(trainer).encode_masked
        if encode is None:
            raise TrunklineError("FilledMasks needs MaskedTextData; leave the callback out with other data")
        network = pl_module.network
        assert isinstance(network, BERT)
        limit = network.config.max_length
        self.rows = [encode(sentence, limit, "FilledMasks: the sentence") for sentence in self.sentences]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
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
    """After each validation, a picture of every head's attention over a sentence (`val/attention`).

    Args:
        sentence: a short one: each token gets a row and a column.
        blocks: at most this many blocks, evenly spread from the first to the last.
        heads: at most this many heads of each.
    """

    def __init__(self, sentence: str, blocks: int = 4, heads: int = 8) -> None:
        self.sentence, self.blocks, self.heads = sentence, blocks, heads

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
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


def draw_heads(maps: dict[int, Tensor], labels: list[str]) -> Figure:
    """A row of (H, T, T) maps for each block; a row of a map is the token that looks."""
    heads = len(next(iter(maps.values())))
    side = max(1.6, 0.14 * len(labels))
    figure = Figure(figsize=(side * heads + 1, side * len(maps) + 1), layout="constrained")
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
