"""A CLIP in TensorBoard: similarities of fixed pairs, pictures that texts find, and embeddings of pictures."""

from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from trunkline.modules.callbacks.drawing import (
    GREEN,
    GREY,
    RED,
    captioned,
    grid,
    new_figure,
    tensorboard,
    to_pictures,
    wrapped,
    written,
)
from trunkline.modules.metrics.retrieval import retrieval_ranks
from trunkline.modules.objectives.checks import facts_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 80
"""Longer side of a stored picture, in pixels."""


class RetrievalReport(Callback):
    """Shows cosines and retrieval for fixed pairs after each validation, and embeddings at the end of training.

    Uses what `validation_step` returns: `image` (N, C, height, width), `image_embedding` and `text_embedding` (N, E) of
    length 1, `caption_key` and `index` (N,). A pair is labelled with its caption if the data knows it, else with its
    index. Only the first process draws, from the pairs that it validates itself.

    Args:
        pairs: number of pairs in the matrix of cosines, texts by pictures (`val/similarity`).
        queries: number of texts for which the five most similar pictures are shown (`val/retrieval`). Pictures with the
            same caption have a green frame, others a red one; below the text is the rank of the first right picture.
        pool: number of pictures that are searched, and that go to the projector (`val/pictures`).
    """

    def __init__(self, pairs: int = 32, queries: int = 8, pool: int = 1000) -> None:
        self.pairs, self.queries, self.pool = pairs, queries, pool
        self.kept: list[dict[str, Tensor]] = []
        self.pictures: list[Image.Image] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept, self.pictures = [], []

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Tensor], *rest: Any
    ) -> None:
        room = self.pool - len(self.pictures)
        if room > 0 and len(outputs["index"]) and not trainer.sanity_checking and tensorboard(trainer) is not None:
            self.pictures += to_pictures(outputs["image"][:room], trainer, SIDE)
            self.kept.append({name: value[:room].cpu() for name, value in outputs.items() if name != "image"})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        if trainer.sanity_checking or writer is None or not self.kept:
            return
        kept = self._gathered()
        images, texts, keys = kept["image_embedding"], kept["text_embedding"], kept["caption_key"]
        captions = self._captions(trainer, kept["index"])
        cosines = texts[: self.pairs] @ images[: self.pairs].T
        writer.add_figure("val/similarity", draw_similarity(cosines, captions[: self.pairs]), trainer.global_step)
        ranks = retrieval_ranks(texts[: self.queries], images, keys[: self.queries], keys)
        cosines = texts[: self.queries] @ images.T  # (queries, pool)
        best = cosines.topk(min(5, len(images)), dim=1)
        tiles = []
        for query, (values, rows) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            text = written(captions[query], self.pictures[0].size)
            tiles.append(captioned(text, wrapped(f"rank {ranks[query]} of {len(images)}", text.width, 3), GREY))
            for cosine, row in zip(values, rows, strict=True):
                below = f"{cosine:.3f}\n" + wrapped(captions[row], text.width, 2)
                tiles.append(captioned(self.pictures[row], below, GREEN if keys[row] == keys[query] else RED))
        writer.add_image("val/retrieval", grid(tiles, columns=1 + len(rows)), trainer.global_step, dataformats="HWC")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is None or not self.kept:
            return
        kept = self._gathered()
        metadata = [" ".join(caption.split()) for caption in self._captions(trainer, kept["index"])]
        writer.add_embedding(
            kept["image_embedding"],
            metadata=metadata,
            label_img=sprites(self.pictures),
            global_step=trainer.global_step,
            tag="val/pictures",
        )

    def _gathered(self) -> dict[str, Tensor]:
        return {
            name: torch.cat([k[name] for k in self.kept]).float()
            if "embedding" in name
            else torch.cat([k[name] for k in self.kept])
            for name in self.kept[0]
        }

    def _captions(self, trainer: L.Trainer, index: Tensor) -> list[str]:
        """Captions of the validation rows with these numbers."""
        caption = facts_of(trainer).caption
        return [str(n) if caption is None else caption("val", n) for n in index.tolist()]


def sprites(pictures: list[Image.Image], side: int = 32) -> Tensor:
    """Shrink pictures of equal size for the projector: (N, 3, height, width) from 0 to 1, longer side `side`."""
    width, height = pictures[0].size
    size = round(width * side / max(width, height)), round(height * side / max(width, height))
    pixels = np.stack([np.asarray(picture.resize(size)) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def draw_similarity(cosines: Tensor, captions: list[str]) -> "Figure":
    """Draw a matrix of cosines (N, N), texts by pictures; the right pairs are on the diagonal."""
    side = 2.5 + 0.2 * len(captions)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    shown = axes.imshow(cosines, cmap="viridis")
    names = [caption if len(caption) <= 20 else caption[:19] + "…" for caption in captions]
    axes.set(xlabel="picture of", ylabel="text", xticks=range(len(names)), yticks=range(len(names)))
    axes.set_xticklabels(names, rotation=90, fontsize=6)
    axes.set_yticklabels(names, fontsize=6)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="cosine")
    return figure
