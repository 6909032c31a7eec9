"""A callback that evaluates an image network on labelled images while it trains on other data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from trunkline import TrunklineError
from trunkline.contract import DataFacts, HasFacts
from trunkline.datamodules.base import preserved_generators
from trunkline.datamodules.images.image_data import ImageData, LabelledImages
from trunkline.datamodules.images.image_sources import Subset
from trunkline.datamodules.images.preprocessing import ImageInput
from trunkline.datamodules.pairs.captions import CaptionEncoder
from trunkline.modules.metrics.probes import Labelled, linear_probe_accuracy
from trunkline.modules.networks import CLIP, ViT
from trunkline.pipelines.embedding import ImageNetwork
from trunkline.pipelines.evaluation.data import as_trained
from trunkline.pipelines.evaluation.images import label_names, read_templates
from trunkline.pipelines.evaluation.measures import Features, Runner, neighbours, zero_shot
from trunkline.pipelines.objectives import able

Probe = Literal["zero_shot", "knn", "linear_probe"]


class ImageProbes(Callback):
    """Measures at every n-th validation what `trunkline evaluate` measures on labelled images.

    It logs `val/zero_shot_acc` (and `val/zero_shot_acc_top5`, if there are more than 5 classes), `val/knn_acc` and
    `val/linear_probe_acc`. All are measured on the source's validation split; the test split is not used, so that it is
    still unseen at the end. The linear probe chooses its regularisation on a fifth of the training rows. The network
    must be that of a `ContrastiveImageText` or an `ImageClassifier`. Its weights are those that the validation uses
    (averaged weights, if there are any), in float32.

    With several processes, the first one computes while the others wait. Only the first one knows the results, so
    `ModelCheckpoint` cannot monitor them there. Sharded weights are not supported.

    Args:
        data: ImageData with labelled images. They are prepared like the training data. If the training data is
            ImageData too, fractions and seed that you leave out are those of training, so that no row of the final test
            is used here. Without `num_workers`, no worker processes are started.
        what: the probes to run; None runs all that the network supports (a classifier has no text tower).
        every: measure at every n-th validation; `trunkline validate` always measures.
        templates: zero-shot prompts with {} for the class name: a list, a single one, or a file with one per line.
        class_names: names that replace those of the source: a list, or a file with one name per line.
        k: number of neighbours that vote.
        max_train: largest number of training rows for neighbours and probe. Each class keeps its share.
        max_val: largest number of validation rows to measure on. Each class keeps its share.
    """

    def __init__(
        self,
        data: ImageData,
        what: list[Probe] | None = None,
        every: int = 1,
        templates: list[str] | str | None = None,
        class_names: list[str] | str | None = None,
        k: int = 20,
        max_train: int = 2000,
        max_val: int = 2000,
    ) -> None:
        for name, value in (("every", every), ("max_train", max_train), ("max_val", max_val)):
            if value < 1:
                raise TrunklineError(f"ImageProbes: {name} must be 1 or more, not {value}")
        self.what, self.every, self.k = what, every, k
        self.given_data, self.given_templates, self.given_names = data, templates, class_names
        self.limits = {"train": max_train, "val": max_val}
        self.tasks: list[Probe] = []
        self.data: ImageData | None = None
        self.encoder: CaptionEncoder | None = None
        self.names: list[str] = []
        self.templates: list[str] = []
        self.validations, self.due = 0, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the images, and find errors before the first step.

        Raises:
            TrunklineError: for a source that cannot be read, more neighbours than training rows, a prompt without {},
                or a network, strategy or precision that is not supported.
        """
        if stage not in ("fit", "validate"):
            return
        self.tasks = choose_probes(trainer, pl_module, self.what)
        learnt: Any = trainer.datamodule  # type: ignore[attr-defined]
        with said_by_the_probes():
            self.templates = read_templates(self.given_templates)
            if trainer.is_global_zero:
                self.data = self._load(learnt)
                self.names = label_names(self.given_names, self.data.class_names)
        if "zero_shot" in self.tasks:
            self.encoder = CaptionEncoder(learnt.facts.tokenizer, learnt.facts.max_length)

    def _load(self, learnt: ImageInput) -> ImageData:
        """The labelled images, prepared like the training data and reduced to the wanted number of rows."""
        splits = learnt.state_dict() if isinstance(learnt, ImageData) else {}
        data = as_trained(self.given_data, learnt.preprocessing, splits)
        data.setup("validate")
        self._thin_out(data)
        return data

    def _thin_out(self, data: ImageData) -> None:
        """Reduce each split to at most `max_train` or `max_val` rows.

        Raises:
            TrunklineError: if there are no validation rows, or too few training rows.
        """
        source = data.source
        if "val" not in data.datasets:
            raise TrunklineError(f"{source} has no validation rows; set val_fraction or val_split")
        rows = {split: data.datasets[split].rows for split in self.limits}  # type: ignore[attr-defined]
        kept = {split: Subset(rows[split], spread(rows[split].labels, limit)) for split, limit in self.limits.items()}
        data.datasets = {
            split: LabelledImages(few, data.preprocessing, None, 0, data.skip_corrupt) for split, few in kept.items()
        }
        labels = kept["train"].labels
        if len(data.class_names) < 2 or ("linear_probe" in self.tasks and (len(set(labels)) < 2 or len(labels) < 5)):
            raise TrunklineError(
                f"the {len(labels)} training rows taken from {source} are too few to learn classes; give at least "
                "5 rows and 2 classes, or raise max_train"
            )
        if "knn" in self.tasks and not 1 <= self.k <= len(labels):
            raise TrunklineError(f"k={self.k} must be from 1 to {len(labels)}, the number of training rows")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        on_time = trainer.state.fn != "fit" or (self.validations + 1) % self.every == 0
        self.due = on_time and trainer.is_global_zero and not trainer.sanity_checking

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        # Why not at the end of the epoch: here the network is in evaluation mode and has its averaged weights. At the
        # end, the callback that averages weights may run first and put the trained weights back.
        if self.due:
            self.due = False
            with preserved_generators(), said_by_the_probes():
                figures = self.measure(pl_module)
            for name, value in figures.items():
                # `rank_zero_only` avoids the collective; `sync_dist=True` only silences Lightning's warning.
                pl_module.log(f"val/{name}", value, batch_size=1, rank_zero_only=True, sync_dist=True)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validations += not trainer.sanity_checking and trainer.state.fn == "fit"

    def measure(self, module: Any) -> dict[str, float]:
        """The results by their logged names without `val/`. The network must be in evaluation mode."""
        assert self.data is not None
        clip = module.network if isinstance(module.network, CLIP) else None
        trunk = module.network if clip is None else clip.image
        network = ImageNetwork(trunk, self.data.preprocessing, clip, self.encoder)
        batch_size = self.data.eval_batch_size or self.data.batch_size
        run = Runner(network, batch_size, module.device, self.data.num_workers or 0, self.data.skip_corrupt)
        features, found = Features(run, self.data), dict[str, float]()
        if "zero_shot" in self.tasks:
            for result in zero_shot(run, features.of("val"), self.names, self.templates):
                found["zero_shot_acc" + result.metric.removeprefix("top1").replace("top5", "_top5")] = result.value
        if "knn" in self.tasks:
            found["knn_acc"] = neighbours(features, "val", self.k)[0].value
        if "linear_probe" in self.tasks:
            choosing, learning = fifth(features.of("train"))
            found["linear_probe_acc"] = linear_probe_accuracy(learning, choosing, features.of("val"))[0]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]


def choose_probes(trainer: L.Trainer, module: L.LightningModule, what: list[Probe] | None) -> list[Probe]:
    """The given probes, or all that the network supports.

    Raises:
        TrunklineError: if network, strategy, precision or training data do not allow them.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise TrunklineError(
            f"ImageProbes cannot read weights that {type(trainer.strategy).__name__} shards over processes; set "
            "--trainer.strategy ddp, or leave ImageProbes out and run `trunkline evaluate` on a checkpoint"
        )
    if trainer.precision.endswith("-true") and trainer.precision != "32-true":
        raise TrunklineError(
            f"ImageProbes needs weights in float32, not --trainer.precision {trainer.precision}; set bf16-mixed"
        )
    network = getattr(module, "network", None)
    if not isinstance(network, CLIP | ViT):
        raise TrunklineError(
            f"ImageProbes supports the networks of {' and '.join(able('evaluate'))}, not of {type(module).__name__}; "
            "leave it out"
        )
    possible: list[Probe] = ["knn", "linear_probe"]
    if isinstance(network, CLIP):
        possible.insert(0, "zero_shot")
    learnt = getattr(trainer, "datamodule", None)
    facts = learnt.facts if isinstance(learnt, HasFacts) else DataFacts()
    if not isinstance(learnt, ImageInput) or ("zero_shot" in possible and None in (facts.tokenizer, facts.max_length)):
        raise TrunklineError(
            "ImageProbes does not know how the training data prepares images and texts; train with ImageTextData or "
            "ImageData"
        )
    for probe in what or ():
        if probe not in possible:
            raise TrunklineError(
                f"ImageProbes: what has {probe}, but {type(module).__name__} allows {', '.join(possible)}; remove it"
            )
    return possible if what is None else what


def spread(labels: np.ndarray, limit: int) -> np.ndarray:
    """Row numbers of at most `limit` rows, ascending.

    Each class keeps its share, and rows are evenly spaced; nothing is random.
    """
    order = np.argsort(labels, kind="stable")
    count = min(limit, len(order))
    return np.sort(order[np.arange(count) * len(order) // count])


def fifth(rows: Labelled) -> tuple[Labelled, Labelled]:
    """Every fifth row, with the rows sorted by class, and the other rows."""
    place = np.argsort(np.argsort(rows.labels, kind="stable"))
    taken = place % 5 == 4
    return Labelled(*(part[taken] for part in rows)), Labelled(*(part[~taken] for part in rows))


@contextmanager
def said_by_the_probes() -> Iterator[None]:
    """Put `ImageProbes:` in front of errors, because they name fields of its data, not of the training data."""
    try:
        yield
    except TrunklineError as error:
        raise TrunklineError(f"ImageProbes: {error}") from error
