"""The attention of a ViT or an AST, drawn over images or spectrograms in TensorBoard."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageOps
from torch import Tensor

from trunkline.modules.callbacks.classification import SOUND, ClassificationReport, leading_rows
from trunkline.modules.callbacks.drawing import LINE, colour_map, grid, tensorboard, to_pictures, written
from trunkline.modules.callbacks.spectrograms import spectrogram
from trunkline.modules.callbacks.text import check_network
from trunkline.modules.networks import AST, ASTConfig, ViT

GAP = 4
"""Pixels between pictures."""


class AttentionMaps(Callback):
    """After each validation, draws the attention over some images or sounds (`val/attention`).

    Each has a row: the image or spectrogram itself, the attention rollout, and the heads of the last block, as the line
    above says. They come from a `ClassificationReport`; without one among the callbacks nothing is drawn.

    Args:
        images: number of images or sounds.
        heads: largest number of heads shown.
    """

    def __init__(self, images: int = 4, heads: int = 8) -> None:
        self.images, self.heads = images, heads

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse another network before training starts."""
        check_network(self, pl_module.network, ViT, AST)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        report = next((c for c in trainer.callbacks if isinstance(c, ClassificationReport)), None)  # type: ignore[attr-defined]
        if writer is None or trainer.sanity_checking or report is None:
            return
        tiles: list[Image.Image] = []
        for batch in leading_rows(report.kept, self.images):
            seen = {name: value.to(pl_module.device) for name, value in batch.items()}
            for picture, maps in self._looked_at(seen, pl_module.network, trainer):
                row = [picture, *(overlay(picture, weights) for weights in maps)]
                tiles += [ImageOps.expand(tile, (0, 0, GAP, GAP), "white") for tile in row]
                columns = 1 + len(maps)
        if tiles:
            names = ["input", "rollout", *(f"head {head}" for head in range(columns - 2))]
            titles = grid([written(name, (tiles[0].width, LINE)) for name in names], columns)
            sheet = np.vstack([titles, grid(tiles, columns)])
            writer.add_image("val/attention", sheet, trainer.global_step, dataformats="HWC")

    def _looked_at(
        self, batch: dict[str, Tensor], network: Any, trainer: L.Trainer
    ) -> Iterator[tuple[Image.Image, Tensor]]:
        """Each picture of a batch, and the maps (1 + heads, rows, columns) over it."""
        if isinstance(network, ViT):
            pictures = to_pictures(batch["image"], trainer, side=SOUND[1])
            yield from zip(pictures, attention_maps(network, batch["image"], self.heads), strict=True)
            return
        # Clips one at a time: a long one has a thousand tokens, and all the weights between them.
        for row, frames in enumerate(batch["features"]):
            frames = frames[batch["mask"][row]] if "mask" in batch else frames
            maps = over_frames(attention_maps(network, frames[None], self.heads)[0], network.config, len(frames))
            yield spectrogram(frames).resize(SOUND, Image.Resampling.BOX), maps


def attention_maps(network: ViT | AST, source: Tensor, heads: int) -> Tensor:
    """The rollout and the first heads of the last block over the patches of images or clips (B, ...).

    Returns:
        (B, 1 + heads, rows, columns).
    """
    attention = network.forward_features(source, return_attention=True).attention
    assert attention is not None
    shown = [attention_rollout(attention)[:, None], attention[-1][:, :heads]]
    return torch.cat([to_patches(weights.float(), network) for weights in shown], dim=1)


def attention_rollout(attention: list[Tensor]) -> Tensor:
    """How much each output token attends to each input token through all blocks (arXiv:2005.00928).

    Args:
        attention: one tensor (B, H, T, T) per block.

    Returns:
        (B, T, T); rows sum to 1.
    """
    rollout = torch.eye(attention[0].shape[-1], device=attention[0].device)
    for weights in attention:
        mean = weights.float().mean(dim=1)
        rollout = (0.5 * mean + 0.5 * torch.eye(mean.shape[-1], device=mean.device)) @ rollout
    return rollout


def to_patches(weights: Tensor, network: ViT | AST) -> Tensor:
    """Attention of the pooled output to the patches: (B, M, T, T) weights -> (B, M, rows, columns)."""
    prefix, pool = network.num_prefix_tokens, network.config.pool
    read = {"cls": slice(0, 1), "distilled": slice(0, 2)}.get(pool, slice(prefix, None))  # what the head reads
    pooled = weights[:, :, read].mean(dim=2)  # (B, M, T)
    rows = network.config.grid[0] if isinstance(network, AST) else network.patch_embed.grid[0]
    return pooled[:, :, prefix:].unflatten(-1, (rows, -1))


def over_frames(weights: Tensor, config: ASTConfig, frames: int) -> Tensor:
    """Lay the weights of patches, which may overlap, over a spectrogram.

    Args:
        weights: (N, rows, columns), the lowest mel bins first.
        config: shape of the network.
        frames: number T of frames of the clip.

    Returns:
        (N, M, T), the highest mel bin first, as in a picture: the mean weight of the patches that see a place, and 0
        where none does.
    """
    size, (time, mel) = config.patch_size, config.steps
    patch = weights.new_ones(1, 1, size, size)
    laid, count = (
        F.conv_transpose2d(values[:, None], patch, stride=(mel, time))[:, 0]
        for values in (weights, torch.ones_like(weights[:1]))
    )
    bins, width = laid.shape[1:]
    means = F.pad(laid / count, (0, max(0, frames - width), 0, config.num_mels - bins))
    return means[:, :, :frames].flip(1)


def overlay(picture: Image.Image, weights: Tensor) -> Image.Image:
    """Lay a coloured map (rows, columns) over a picture; the map's largest value is the brightest."""
    size = (picture.height, picture.width)
    smooth = F.interpolate(weights[None, None].cpu(), size=size, mode="bilinear", align_corners=False)[0, 0]
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min()).clamp(min=1e-8)
    colours = colour_map("inferno")(smooth.numpy())[..., :3]
    return Image.blend(picture, Image.fromarray((colours * 255).astype(np.uint8)), alpha=0.6)
