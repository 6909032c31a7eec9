"""A ViT's attention, drawn over images in TensorBoard."""

import lightning as L
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from trunkline.modules.callbacks.classification import ClassificationReport
from trunkline.modules.callbacks.drawing import grid, tensorboard, to_pictures
from trunkline.modules.networks import ViT


class AttentionMaps(Callback):
    """After each validation, draws the attention over some images (`val/attention`).

    Each image has a row: the image itself, the attention rollout, and the heads of the last block. The images come from
    a `ClassificationReport`; without one among the callbacks nothing is drawn.

    Args:
        images: number of images.
        heads: largest number of heads shown.
    """

    def __init__(self, images: int = 4, heads: int = 8) -> None:
        self.images, self.heads = images, heads

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        report = next((c for c in trainer.callbacks if isinstance(c, ClassificationReport)), None)  # type: ignore[attr-defined]
        if writer is None or trainer.sanity_checking or report is None or not report.kept:
            return
        network: ViT = pl_module.network  # type: ignore[assignment]
        image = report.kept[0]["image"][: self.images].to(pl_module.device)
        attention = network.forward_features(image, return_attention=True).attention
        assert attention is not None
        rows = [attention_rollout(attention)[:, None], attention[-1][:, : self.heads]]
        maps = torch.cat([to_patches(r.float(), network) for r in rows], dim=1)  # (B, 1 + H, rows, columns)
        tiles: list[Image.Image] = []
        for picture, shown in zip(to_pictures(image, trainer, side=96), maps, strict=True):
            tiles += [picture, *(overlay(picture, m) for m in shown)]
        columns = maps.shape[1] + 1
        writer.add_image("val/attention", grid(tiles, columns), trainer.global_step, dataformats="HWC")


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


def to_patches(weights: Tensor, network: ViT) -> Tensor:
    """Attention of the pooled output to the patches: (B, M, T, T) weights -> (B, M, rows, columns)."""
    prefix = network.num_prefix_tokens
    pooled = weights[:, :, 0] if network.config.pool == "cls" else weights[:, :, prefix:].mean(dim=2)  # (B, M, T)
    return pooled[:, :, prefix:].unflatten(-1, network.patch_embed.grid)


def overlay(picture: Image.Image, weights: Tensor) -> Image.Image:
    """Lay a coloured map (rows, columns) over a picture; the map's largest value is the brightest."""
    size = (picture.height, picture.width)
    smooth = F.interpolate(weights[None, None].cpu(), size=size, mode="bilinear", align_corners=False)[0, 0]
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min()).clamp(min=1e-8)
    colours = matplotlib.colormaps["inferno"](smooth.numpy())[..., :3]
    return Image.blend(picture, Image.fromarray((colours * 255).astype(np.uint8)), alpha=0.6)
