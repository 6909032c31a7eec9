"""`trunkline predict`: classify a folder of images."""

from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.datamodules.image import ImageFiles, Preprocessing
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.sources import image_files
from trunkline.modules.checkpoints import load_checkpoint
from trunkline.modules.image_classifier import ImageClassifier


def predict(
    checkpoint: str,
    images: str,
    output: str = "predictions.csv",
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> None:
    """Classify every image file below a folder and write a table of path, label and probability.

    Args:
        checkpoint: of a `trunkline fit` of an image classifier.
        images: the folder.
        output: a .csv or .parquet file; one row an image, in the order of their paths.
        batch_size: images at a time.
        num_workers: processes that read images.
        accelerator: Lightning's name of the device: auto, cpu, gpu, …
        precision: Lightning's name of the precision.

    Raises:
        TrunklineError: for a missing or damaged file, or an ending other than those two; before any work.
    """
    writer = table_writer(output)
    model, preprocessing, class_names = load_classifier(checkpoint)
    files = image_files(images)
    # Lightning replaces the batch sampler of a prediction by one of its own, which keeps the sampler.
    keys = [SampleKey(0, n) for n in range(len(files))]
    # By keyword alone: Lightning builds the loader again from these, and an earlier error may have left it recording.
    loader = DataLoader(
        dataset=ImageFiles(files, preprocessing), batch_size=batch_size, sampler=keys, num_workers=num_workers
    )
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    batches: Any = trainer.predict(model, loader)
    probability = torch.cat([b["probability"] for b in batches])
    best, label = probability.max(dim=1)
    table = pd.DataFrame(
        {
            "path": [str(files[int(i)]) for b in batches for i in b["index"]],
            "label": [class_names[n] for n in label.tolist()],
            "probability": best.tolist(),
        }
    )
    writer(table)
    print(f"wrote {len(table)} rows to {output}")


def table_writer(output: str) -> Any:
    """A function that writes a table to `output` in the format of its ending."""
    writers = {
        ".csv": lambda table: table.to_csv(output, index=False),
        ".parquet": lambda table: table.to_parquet(output, index=False),
    }
    suffix = Path(output).suffix.lower()
    if suffix not in writers:
        raise TrunklineError(f"--output {output} must end in .csv or .parquet")
    if not Path(output).absolute().parent.is_dir():
        raise TrunklineError(f"--output {output}: there is no folder {Path(output).absolute().parent}; make it first")
    return writers[suffix]


def load_classifier(checkpoint: str) -> tuple[ImageClassifier, Preprocessing, list[str]]:
    """Model, preprocessing and class names of a training checkpoint.

    Raises:
        TrunklineError: if it is damaged, or of another objective.
    """
    content = load_checkpoint(checkpoint)
    data: Any = content.get("ImageData")
    if content.get("objective") == ImageClassifier.__name__ and data is None:
        raise TrunklineError(f"{checkpoint} was trained without ImageData, so how to prepare an image is not known")
    if content.get("objective") != ImageClassifier.__name__:
        raise TrunklineError(
            f"{checkpoint} is no checkpoint of an image classifier, but of {content.get('objective', 'something else')}"
        )
    model = ImageClassifier(**{**content["hyper_parameters"], "init_from": None})
    model.load_state_dict(content["state_dict"])
    return model, Preprocessing(**data["preprocessing"]), data["class_names"]
