"""`trunkline predict`: classify images, sounds or texts, tag words, answer questions."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from trunkline import TrunklineError
from trunkline.datamodules.images.image_data import ImageFiles
from trunkline.datamodules.images.image_sources import given_images
from trunkline.datamodules.samplers import SampleKey, plain_errors
from trunkline.datamodules.skipping import first_names
from trunkline.files import atomic_write
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.commands.predict_audio import predict_audio
from trunkline.pipelines.commands.predict_text import Run, conll, predict_texts
from trunkline.pipelines.objectives import PREDICT_IMAGES, PREDICT_TEXTS
from trunkline.pipelines.run_checks import trainer_error
from trunkline.pipelines.trained import Trained
from trunkline.pipelines.translating import check_batch


def predict(
    checkpoint: str,
    images: str | None = None,
    output: str = "predictions.csv",
    audio: str | None = None,
    texts: str | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    threshold: float | None = None,
    skip_corrupt: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> None:
    """Classify images, sounds or texts, tag words or answer questions, and write a table. The checkpoint decides which.

    Columns of the table. Images and sounds: path, label, probability; if sounds can have several labels, a row for each
    of them. Texts: text (and pair), label, probability. Tags: row, word,
    tag, probability. Answers: id, question, answer, score.

    Args:
        checkpoint: a checkpoint of a classifier, a tagger or a model that answers questions, from `trunkline fit`.
        images: an image file, or a folder; every image file below it is classified.
        output: a .csv or .parquet file, in the order of the input; tags can also go to a .conll file.
        audio: a folder or file; every audio file below a folder is classified. Of a recording that is longer than the
            clips of training, the probabilities are the mean of its windows.
        texts: to classify, a .txt file with one text per line (- is the standard input) or a table (.jsonl, .csv,
            .parquet); to tag, a .txt file with one sentence per line or a .conll file with one word per line; to
            answer, a .json file as SQuAD's, or a table with the columns question, context and optionally id.
        text_column: column of the texts in a table; default: the column of training.
        pair_column: column of the second text of a pair; default: the column of training.
        threshold: for sounds with several labels: smallest probability of a label that is written; None is 0.5.
        skip_corrupt: leave label and probability of images and sounds that cannot be read empty, instead of stopping.
        batch_size: number of images, texts or windows at a time.
        num_workers: number of processes that read the input.
        accelerator: device, as Lightning names it: auto, cpu, gpu, …
        precision: precision, as Lightning names it.

    Raises:
        TrunklineError: for a missing or damaged file, or for another output format (before any work).
    """
    given = [name for name, value in (("images", images), ("audio", audio), ("texts", texts)) if value is not None]
    if len(given) != 1:
        has = f"--{' and --'.join(given)}" if given else "none of them"
        raise TrunklineError(f"trunkline predict needs --images FOLDER, --audio FOLDER or --texts FILE, not {has}")
    if threshold is not None and audio is None:
        raise TrunklineError(f"--threshold {threshold:g} is for --audio; leave it out")
    content = table_writer(output)
    check_batch(batch_size, num_workers)
    trained = Trained.read(checkpoint)
    run = partial(run_batches, batch_size, num_workers, accelerator, precision)
    if content is conll and trained.objective != "TokenClassifier":
        raise TrunklineError(
            f"--output {output}: only tags can be written to a .conll file; give a .csv or .parquet file"
        )
    if images is not None:
        table = predict_images(trained, images, skip_corrupt, run)
    elif audio is not None:
        table = predict_audio(trained, audio, threshold, skip_corrupt, run)
    else:
        assert texts is not None
        table = predict_texts(trained, texts, {"text_column": text_column, "pair_column": pair_column}, run)
    atomic_write(Path(output), [content(table)], field="output")
    print(f"wrote {len(table)} rows to {output}")


def run_batches(
    batch_size: int, num_workers: int, accelerator: str, precision: Any, model: L.LightningModule, dataset: Dataset[Any]
) -> list[Any]:
    """The result of `predict_step` for each batch of a dataset; arguments as for `predict`."""
    # In a prediction, Lightning replaces the batch sampler by its own, which keeps the sampler.
    keys = [SampleKey(0, n) for n in range(len(dataset))]  # type: ignore[arg-type]
    # Keyword arguments only: Lightning records them to build the loader again, which an earlier error can disturb.
    loader = DataLoader(dataset=dataset, batch_size=batch_size, sampler=keys, num_workers=num_workers)
    try:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise trainer_error(error) from error
    with plain_errors(num_workers):
        batches: Any = trainer.predict(model, loader)
    return batches


def table_writer(output: str) -> Any:
    """A function that gives a file's content for a table, in the format of the suffix of `output`."""
    writers = {
        ".csv": lambda table: table.to_csv(index=False).encode(),
        ".parquet": lambda table: table.to_parquet(index=False),
        ".conll": conll,
    }
    return writers[check_output(output, tuple(writers))]


class ReadableImages(ImageFiles):
    """Image files; an image that cannot be read becomes black, with `valid` False."""

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        try:
            return super().__getitem__(key)
        except TrunklineError:  # the file is named when all are read
            image = torch.zeros(self.preprocessing.channels, *self.preprocessing.size)
            return {"image": image, "index": key.index, "valid": False}


def predict_images(trained: Trained, folder: str, skip_corrupt: bool, run: Run) -> pd.DataFrame:
    """A table with `path`, `label` and `probability` of every image below a folder.

    Raises:
        TrunklineError: if the checkpoint cannot be used, or if an image cannot be read, unless `skip_corrupt`.
    """
    if trained.suits(PREDICT_TEXTS):
        trained.require(PREDICT_IMAGES, "give --texts instead of --images")
    trained.require(PREDICT_IMAGES)
    model, preprocessing, class_names = trained.module(), trained.preprocessing, trained.class_names
    files = given_images(folder)
    batches = run(model, (ReadableImages if skip_corrupt else ImageFiles)(files, preprocessing))
    best, label = torch.cat([b["probability"] for b in batches]).max(dim=1)
    rows = [int(i) for b in batches for i in b["index"]]
    found = pd.DataFrame({"label": [class_names[n] for n in label.tolist()], "probability": best.tolist()}, index=rows)
    if len(rows) < len(files):
        unread = [str(files[n]) for n in sorted(set(range(len(files))) - set(rows))]
        print(f"{len(unread)} images cannot be read; their labels are empty: {first_names(unread)}")
    return pd.concat([pd.Series(map(str, files), name="path"), found], axis=1)
