"""A classifier in TensorBoard: confusion matrix, images with their predictions, and features."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.classification import MulticlassConfusionMatrix

from trunkline.modules.callbacks.drawing import GREEN, RED, captioned, grid, tensorboard, to_pictures, tokenizer_of
from trunkline.modules.objectives.checks import facts_of


class ClassificationReport(Callback):
    """Shows the confusion matrix and a grid of images after each validation, and features at the end of training.

    Uses what `validation_step` returns: `label` and `prediction` (N,) for the matrix, `image` (N, C, height, width) for
    the grid, and `image` or `tokens` (N, T) for the embedding projector. The module must have `num_classes`, and for
    the projector a method `features`. The data should know its class names; for texts it must have a tokenizer.

    Args:
        images: number of validation images in the grid (`val/images`); wrong predictions have a red frame.
        projected: number of validation images or texts whose pooled features go to the projector (`val/features`).
        max_classes: with more classes than this there is no confusion matrix (`val/confusion`).
    """

    def __init__(self, images: int = 32, projected: int = 256, max_classes: int = 100) -> None:
        self.images, self.projected, self.max_classes = images, projected, max_classes
        self.matrix: MulticlassConfusionMatrix | None = None
        self.kept: list[dict[str, Tensor]] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept = []
        classes: int = pl_module.num_classes  # type: ignore[assignment]
        if classes <= self.max_classes:
            self.matrix = MulticlassConfusionMatrix(classes).to(pl_module.device)

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Tensor], *rest: Any
    ) -> None:
        if self.matrix is not None:
            self.matrix.update(outputs["prediction"], outputs["label"])
        room = max(self.images, self.projected) - sum(len(k["label"]) for k in self.kept)
        if room > 0 and trainer.is_global_zero:
            self.kept.append({name: value[:room].cpu() for name, value in outputs.items()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        counts = None if self.matrix is None else self.matrix.compute()  # in all processes, because it communicates
        writer = tensorboard(trainer)
        if trainer.sanity_checking or writer is None or not self.kept:
            return
        names, kept = names_of_classes(trainer, pl_module), self._gathered()
        if "image" in kept:
            self._draw_images(kept, names, trainer, writer)
        if counts is not None:
            writer.add_figure("val/confusion", draw_confusion(counts.cpu(), names), trainer.global_step)

    def _draw_images(
        self, kept: dict[str, Tensor], names: list[str], trainer: L.Trainer, writer: SummaryWriter
    ) -> None:
        first = {name: value[: self.images] for name, value in kept.items()}
        tiles = []
        for picture, prediction, label in zip(
            to_pictures(first["image"], trainer, side=96), first["prediction"], first["label"], strict=True
        ):
            right = bool(prediction == label)
            caption = names[int(label)] if right else f"{names[int(prediction)]} not {names[int(label)]}"
            tiles.append(captioned(picture, caption, GREEN if right else RED))
        writer.add_image("val/images", grid(tiles, columns=8), trainer.global_step, dataformats="HWC")

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is None or not self.kept or not self.projected or not {"image", "tokens"} & self.kept[0].keys():
            return
        kept = {name: value[: self.projected].to(pl_module.device) for name, value in self._gathered().items()}
        names = names_of_classes(trainer, pl_module)
        module: Any = pl_module
        training = module.network.training
        module.network.eval()
        features = module.features(kept)
        module.network.train(training)
        labels: list[Any] = [names[int(n)] for n in kept["label"]]
        shown: dict[str, Any] = {"metadata": labels}
        if "image" in kept:
            shown["label_img"] = torch.stack([_to_tensor(p) for p in to_pictures(kept["image"], trainer, side=32)])
        else:
            tokenizer = tokenizer_of(trainer, self)
            texts = [" ".join(tokenizer.decode(row.tolist()).split()) for row in kept["tokens"]]
            shown = {"metadata": list(zip(labels, texts, strict=True)), "metadata_header": ["label", "text"]}
        writer.add_embedding(features.float(), **shown, global_step=trainer.global_step, tag="val/features")

    def _gathered(self) -> dict[str, Tensor]:
        return {name: torch.cat([k[name] for k in self.kept]) for name in self.kept[0]}


def names_of_classes(trainer: L.Trainer, module: L.LightningModule) -> list[str]:
    """The data's class names; numbers if it has none."""
    return facts_of(trainer).class_names or [str(n) for n in range(module.num_classes)]  # type: ignore[arg-type]


def draw_confusion(counts: Tensor, names: list[str]) -> Figure:
    """Draw a matrix of counts (true class, predicted class); a cell's colour shows its share of the row."""
    side = max(4.0, 0.4 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts / counts.sum(dim=1, keepdim=True).clamp(min=1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", xticks=range(len(names)), yticks=range(len(names)))
    axes.set_xticklabels(names, rotation=90)
    axes.set_yticklabels(names)
    if len(names) <= 30:
        for row, column in counts.nonzero().tolist():
            share = counts[row, column] / counts[row].sum()
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=7)
    return figure


def _to_tensor(picture: Any) -> Tensor:
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(picture).float() / 255
