"""A classifier in TensorBoard: confusion matrix, images or sounds with their predictions, and features."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from trunkline import TrunklineError
from trunkline.modules.callbacks.drawing import (
    GREEN,
    RED,
    captioned,
    grid,
    new_figure,
    play,
    tensorboard,
    to_pictures,
    tokenizer_of,
    wrapped,
)
from trunkline.modules.callbacks.spectrograms import sound_picture
from trunkline.modules.objectives.checks import facts_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

SOUND = (192, 96)
"""Pixels: width and height of a spectrogram; the latter is also the longer side of an image."""


@runtime_checkable
class Classifies(Protocol):
    """An objective that tells classes apart."""

    num_classes: int


class ClassificationReport(Callback):
    """Shows the confusion matrix and a grid of images or sounds after each validation, and features after training.

    Uses what `validation_step` returns: `label` and `prediction` (N,), or where a row can have several labels `target`
    and `probability` (N, K); for the grid `image` (N, C, height, width), or `features` (N, T, M) with `index` and maybe
    `mask` (N, T); these or `tokens` (N, T) for the embedding projector. The module must have `num_classes`, and for the
    projector a method `features`. The data should know its class names; for texts it must have a tokenizer.

    Args:
        images: number of validation images in the grid (`val/images`), or of sounds (`val/sounds`); wrong predictions
            have a red frame. With several labels, as many of the likeliest classes are shown as a row has labels.
        projected: number of validation images, sounds or texts whose pooled features go to the projector
            (`val/features`).
        max_classes: with more classes than this there is no confusion matrix (`val/confusion`); nor with several
            labels.
        played: number of the sounds that can be heard (`val/audio/<row>`), written once.
    """

    def __init__(self, images: int = 32, projected: int = 256, max_classes: int = 100, played: int = 8) -> None:
        self.images, self.projected, self.max_classes, self.played = images, projected, max_classes, played
        self.matrix: MulticlassConfusionMatrix | None = None
        self.kept: list[dict[str, Tensor]] = []
        """What the first batches have returned, on the CPU."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse an objective without classes before training starts."""
        if not isinstance(pl_module, Classifies):
            raise TrunklineError(
                f"ClassificationReport needs an objective with classes, but {type(pl_module).__name__} has none; leave "
                "the callback out"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept = []
        classes: int = pl_module.num_classes  # type: ignore[assignment]
        if classes <= self.max_classes:
            self.matrix = MulticlassConfusionMatrix(classes).to(pl_module.device)

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Tensor], *rest: Any
    ) -> None:
        if "label" not in outputs:
            self.matrix = None
        elif self.matrix is not None:
            self.matrix.update(outputs["prediction"], outputs["label"])
        room = max(self.images, self.projected) - sum(map(count_rows, self.kept))
        if room > 0 and trainer.is_global_zero:
            self.kept.append({name: value[:room].cpu() for name, value in outputs.items()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        counts = None if self.matrix is None else self.matrix.compute()  # in all processes, because it communicates
        writer = tensorboard(trainer)
        if trainer.sanity_checking or writer is None or not self.kept:
            return
        names = names_of_classes(trainer, pl_module)
        if {"image", "features"} & self.kept[0].keys():
            self._draw_rows(names, trainer, writer)
        if "features" in self.kept[0] and self.played:
            rows = [row for batch in leading_rows(self.kept, self.played) for row in batch["index"].tolist()]
            play(writer, rows, facts_of(trainer), trainer.global_step)
            self.played = 0
        if counts is not None:
            writer.add_figure("val/confusion", draw_confusion(counts.cpu(), names), trainer.global_step)

    def _draw_rows(self, names: list[str], trainer: L.Trainer, writer: "SummaryWriter") -> None:
        tiles = []
        for batch in leading_rows(self.kept, self.images):
            for picture, (caption, right) in zip(
                pictures_of(batch, trainer, SOUND), verdicts(batch, names), strict=True
            ):
                tiles.append(captioned(picture, caption, GREEN if right else RED))
        tag, columns = ("images", 8) if "image" in self.kept[0] else ("sounds", 4)  # whose pictures are twice as wide
        if tiles:
            writer.add_image(f"val/{tag}", grid(tiles, columns), trainer.global_step, dataformats="HWC")

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        seen = {"image", "features", "tokens"}
        if writer is None or not self.kept or not self.projected or not seen & self.kept[0].keys():
            return
        kept, names = leading_rows(self.kept, self.projected), names_of_classes(trainer, pl_module)
        module: Any = pl_module
        training = module.network.training
        module.network.eval()
        # One batch at a time: they may have different lengths, and many sounds at once would take much memory.
        features = [module.features({k: v.to(module.device) for k, v in batch.items()}).float() for batch in kept]
        module.network.train(training)
        labels: list[Any] = [label for batch in kept for label in right_labels(batch, names)]
        shown: dict[str, Any] = {"metadata": labels}
        if "tokens" not in kept[0]:
            pictures = [picture for batch in kept for picture in pictures_of(batch, trainer, (32, 32))]
            shown["label_img"] = torch.stack([_to_tensor(picture) for picture in pictures])
        else:
            tokenizer = tokenizer_of(trainer, self)
            rows = [row.tolist() for batch in kept for row in batch["tokens"]]
            texts = [" ".join(tokenizer.decode(row).split()) for row in rows]
            shown = {"metadata": list(zip(labels, texts, strict=True)), "metadata_header": ["label", "text"]}
        writer.add_embedding(torch.cat(features), **shown, global_step=trainer.global_step, tag="val/features")


# --- what is said about the rows of a batch


def count_rows(batch: dict[str, Tensor]) -> int:
    """Number of rows that a validation step has returned."""
    return len(next(iter(batch.values())))


def leading_rows(batches: Sequence[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """The first rows of all batches together."""
    found = []
    for batch in batches:
        if count > 0 and count_rows(batch):
            found.append({name: value[:count] for name, value in batch.items()})
            count -= count_rows(batch)
    return found


def pictures_of(batch: dict[str, Tensor], trainer: L.Trainer, size: tuple[int, int]) -> list[Image.Image]:
    """Images whose longer side is the height of `size`, or spectrograms of this (width, height) in pixels."""
    if "image" in batch:
        return to_pictures(batch["image"], trainer, side=size[1])
    masks = batch.get("mask", [None] * count_rows(batch))
    return [sound_picture(frames, mask, size) for frames, mask in zip(batch["features"], masks, strict=True)]


def right_labels(batch: dict[str, Tensor], names: Sequence[str]) -> list[str]:
    """The label of each row; if there can be several, with commas between them."""
    if "label" in batch:
        return [names[label] for label in batch["label"].tolist()]
    return [", ".join(names[n] for n in row.nonzero()[:, 0].tolist()) for row in batch["target"]]


def verdicts(batch: dict[str, Tensor], names: Sequence[str]) -> list[tuple[str, bool]]:
    """A caption for each row, and whether the prediction is right.

    With several labels, as many of the likeliest classes are predicted as the row has labels, but at least one.
    """
    labels = right_labels(batch, names)
    if "label" in batch:
        predictions = [names[prediction] for prediction in batch["prediction"].tolist()]
        rights = (batch["prediction"] == batch["label"]).tolist()
        found = zip(labels, predictions, rights, strict=True)
        return [(label if right else f"{prediction} not {label}", right) for label, prediction, right in found]
    captions = []
    for label, target, probability in zip(labels, batch["target"], batch["probability"].float(), strict=True):
        best = probability.topk(max(1, int(target.sum())))
        said = [f"{names[n]} {p:.2f}" for p, n in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        lines = [wrapped(line, SOUND[0], 1) for line in (label or "no label", ", ".join(said))]
        captions.append(("\n".join(lines), bool(target[best.indices].all())))
    return captions


def names_of_classes(trainer: L.Trainer, module: L.LightningModule) -> list[str]:
    """The data's class names; numbers if it has none."""
    return facts_of(trainer).class_names or [str(n) for n in range(module.num_classes)]  # type: ignore[arg-type]


def draw_confusion(counts: Tensor, names: list[str]) -> "Figure":
    """Draw a matrix of counts (true class, predicted class); a cell's colour shows its share of the row."""
    side = max(4.0, 0.4 * len(names))
    figure = new_figure(side, side)
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
