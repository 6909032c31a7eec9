"""A short training that writes to TensorBoard, and what it wrote."""

import io
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def logged_trainer(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    """A trainer on one CPU that writes events to a folder, and no checkpoints."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=list(callbacks),
        **options,
    )


def logged_texts(found: EventAccumulator, tag: str) -> dict[int, str]:
    """Step -> text of a tag."""
    return {e.step: e.tensor_proto.string_val[0].decode() for e in found.Tensors(f"{tag}/text_summary")}


def logged_picture(found: EventAccumulator, tag: str, number: int = -1) -> np.ndarray:
    """(H, W, 3) uint8, one of the pictures of a tag."""
    return np.asarray(Image.open(io.BytesIO(found.Images(tag)[number].encoded_image_string)).convert("RGB"))
