"""What TensorBoard shows of a classifier: pictures with labels, the confusion matrix, the features."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from trunkline.modules.callbacks.drawing import GREEN, RED, captioned, grid, tensorboard, to_pictures
from trunkline.modules.image_classifier import ImageClassifier


class ClassificationReport(Callback):
    """After each validation a grid of images and the confusion matrix; at the end the embedding projector.

    Args:
        images: number of validation images in the grid (`val/images`; wrong ones have a red frame).
        projected: number of validation images whose pooled features go to the projector.
        max_classes: leave the confusion matrix (`val/confusion`) out if there are more classes.
    """

    def __init__(self, images: int = 32, projected: int = 256, max_classes: int = 100) -> None:
        self.images, self.projected, self.max_classes = images, projected, max_classes
        self.matrix: MulticlassConfusionMatrix | None = None
        self.kept: list[dict[str, Tensor]] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the validation before."""
        assert isinstance(pl_module, ImageClassifier)
        classes = pl_module.network.config.num_classes
        self.kept = []
        if classes <= self.max_classes:
            self.matrix = MulticlassConfusionMatrix(classes).to(pl_module.device)

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Tensor], *rest: Any
    ) -> None:
        """Count the predictions and keep the first images."""
        if self.matrix is not None:
            self.matrix.update(outputs["prediction"], outputs["label"])
        room = max(self.images, self.projected) - sum(len(k["label"]) for k in self.kept)
        if room > 0 and trainer.is_global_zero:
            self.kept.append({name: value[:room].cpu() for name, value in outputs.items()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        counts = None if self.matrix is None else self.matrix.compute()  # on all processes: it gathers
        writer = tensorboard(trainer)
        if trainer.sanity_checking or writer is None or not self.kept:
            return
        names, kept = self._names(trainer, pl_module), self._gathered()
        first = {name: value[: self.images] for name, value in kept.items()}
        tiles = []
        for picture, prediction, label in zip(
            to_pictures(first["image"], trainer, side=96), first["prediction"], first["label"], strict=True
        ):
            right = bool(prediction == label)
            caption = names[int(label)] if right else f"{names[int(prediction)]} not {names[int(label)]}"
            tiles.append(captioned(picture, caption, GREEN if right else RED))
        writer.add_image("val/images", grid(tiles, columns=8), trainer.global_step, dataformats="HWC")
        if counts is not None:
            writer.add_figure("val/confusion", draw_confusion(counts.cpu(), names), trainer.global_step)

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send the pooled features of the kept images to the projector."""
        writer = tensorboard(trainer)
        if writer is None or not self.kept or not self.projected:
            return
        assert isinstance(pl_module, ImageClassifier)
        kept, names = self._gathered(), self._names(trainer, pl_module)
        network, training = pl_module.network, pl_module.network.training
        network.eval()
        image = kept["image"][: self.projected].to(pl_module.device)
        features = network.forward_head(network.forward_features(image), pre_logits=True)
        network.train(training)
        thumbnails = torch.stack([_to_tensor(p) for p in to_pictures(image, trainer, side=32)])
        writer.add_embedding(
            features.float(),
            metadata=[names[int(n)] for n in kept["label"][: self.projected]],
            label_img=thumbnails,
            global_step=trainer.global_step,
            tag="val/features",
        )

    def _gathered(self) -> dict[str, Tensor]:
        return {name: torch.cat([k[name] for k in self.kept]) for name in self.kept[0]}

    @staticmethod
    def _names(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        assert isinstance(pl_module, ImageClassifier)
        return names or [str(n) for n in range(pl_module.network.config.num_classes)]


def draw_confusion(counts: Tensor, names: list[str]) -> Figure:
    """Figure of a (true class, predicted class) matrix of counts; cells are shaded by share of the row."""
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
