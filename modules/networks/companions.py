"""What goes with a network so that others can use it: tokenizer, pictures, sounds, names of classes, a model card."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.networks.image_transform import ImageTransform
from trunkline.names import looks_like_path

TOKENIZER_FILE = "tokenizer.json"
TARGET_TOKENIZER_FILE = "target_tokenizer.json"
PREPROCESSING_FILE = "preprocessing.json"
CARD_FILE = "README.md"
COMPANION_FILES = (TOKENIZER_FILE, TARGET_TOKENIZER_FILE, PREPROCESSING_FILE)

PLAIN_FIELDS = ("sounds", "class_names", "start_token")
"""Fields of plain values."""

SCORE = re.compile(r"val/(?!skipped_|truncated_|unfit_)")
"""Scores of a validation, without its counts of rows that were left out or cut."""


@dataclass
class Companions:
    """What goes with a network, as far as it is known."""

    tokenizer_json: str | Path | None = None
    """Content of a tokenizer.json, or the file, which is read only when it is needed."""
    target_tokenizer_json: str | Path | None = None
    """Of the targets of a translation, if it is another."""
    transform: ImageTransform | None = None
    """Prepares pictures."""
    sounds: dict[str, Any] | None = None
    """How waveforms become log-mel features: the fields of `datamodules.audio.log_mel.LogMel`."""
    class_names: list[str] | None = None
    """Names of the outputs."""
    start_token: str | None = None
    """With which a decoder begins every text."""
    facts: dict[str, Any] = field(default_factory=dict)
    """About the training, for the model card: what -> value."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of the last validation before the checkpoint, for the model card: name -> value."""

    @cached_property
    def tokenizer(self) -> Any:
        """As `tokenizers.Tokenizer`; None if there is none.

        Raises:
            TrunklineError: if the library is not installed, or cannot read the tokenizer.
        """
        return read_tokenizer(self.tokenizer_json)

    @cached_property
    def target_tokenizer(self) -> Any:
        """The same of the targets; that of the sources if they share it."""
        return self.tokenizer if self.target_tokenizer_json is None else read_tokenizer(self.target_tokenizer_json)

    @classmethod
    def of_checkpoint(cls, content: Mapping[str, Any], file: str | Path) -> Self:
        """What a training checkpoint holds beside its network, and what the record of its run says.

        A datamodule of somebody's own may keep other things under the same names; those are passed over.

        Args:
            content: content of the checkpoint.
            file: its place.
        """
        classes = content.get("classes")
        name = str(classes.get("data", "")).rpartition(".")[2] if isinstance(classes, dict) else ""
        kinds = {"preprocessing", "tokenizer", "log_mel"}
        usual = (state for state in content.values() if isinstance(state, dict) and kinds & state.keys())
        data = content.get(name) or next(usual, {})
        if not isinstance(data, dict):
            return cls()
        words, target_words, class_names = (data.get(n) for n in ("tokenizer", "target_tokenizer", "class_names"))
        settings, sounds = data.get("settings"), data.get("log_mel")
        start = settings.get("start_token") if isinstance(settings, dict) else None
        return cls(
            words if isinstance(words, str) else None,
            target_words if isinstance(target_words, str) else None,
            transform_in(data),
            sounds if isinstance(sounds, dict) else None,
            [str(each) for each in class_names] if isinstance(class_names, list) else None,
            start if isinstance(start, str) else None,
            facts_of_training(content, name, data) | facts_of_run(Path(file)),
            {score: value for score, value in validation_in(content).items() if SCORE.match(score)},
        )

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        """What `save_pretrained` wrote beside a network.

        Raises:
            TrunklineError: if a file is damaged.
        """
        words, target_words = (folder / name for name in (TOKENIZER_FILE, TARGET_TOKENIZER_FILE))
        found = cls(words if words.is_file() else None, target_words if target_words.is_file() else None)
        file = folder / PREPROCESSING_FILE
        if not file.is_file():
            return found
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            pictures = content.get("pictures")
            found.transform = None if pictures is None else ImageTransform(**pictures)
            for name in PLAIN_FIELDS:
                setattr(found, name, content.get(name))
            return found
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise TrunklineError(f"{file} does not say how inputs are prepared: {error}; copy it again") from error

    def files(self) -> dict[str, str]:
        """Name -> content of the files of `in_folder`, without those that would be empty."""
        given = {TOKENIZER_FILE: self.tokenizer_json, TARGET_TOKENIZER_FILE: self.target_tokenizer_json}
        found = {name: tokenizer_text(source) for name, source in given.items() if source is not None}
        pictures = None if self.transform is None else asdict(self.transform)
        rest = {"pictures": pictures} | {name: getattr(self, name) for name in PLAIN_FIELDS}
        known = {name: value for name, value in rest.items() if value is not None}
        return found | ({PREPROCESSING_FILE: json.dumps(known, indent=2) + "\n"} if known else {})


def check_rows(tokenizer: Any, companions: Companions, rows: int) -> None:
    """Compare the tokenizer that goes with a network with the rows of its embedding.

    Raises:
        TrunklineError: if it has more tokens; names the file and both sizes.
    """
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > rows:
        file = companions.tokenizer_json if isinstance(companions.tokenizer_json, Path) else "that of the checkpoint"
        raise TrunklineError(
            f"the tokenizer has {size} tokens, but the network's embedding only {rows} rows ({file}); take the "
            "tokenizer.json that belongs to the weights"
        )


def transform_in(data: Mapping[str, Any]) -> ImageTransform | None:
    """What a datamodule saved about its pictures, as a transform; None if it says nothing that is known here."""
    try:
        return ImageTransform.of_preprocessing(data["preprocessing"])
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        return None


def tokenizer_text(source: str | Path) -> str:
    """Content of a tokenizer.json that is given as such or as a file."""
    return source.read_text(encoding="utf-8") if isinstance(source, Path) else source


def read_tokenizer(source: str | Path | None) -> Any:
    """A tokenizer of the tokenizers library; None for None.

    Raises:
        TrunklineError: if the library is not installed, or cannot read it.
    """
    if source is None:
        return None
    place = source if isinstance(source, Path) else "the checkpoint"
    try:
        library = import_module("tokenizers")  # by name: networks need only torch
        return library.Tokenizer.from_str(tokenizer_text(source))
    except ImportError as error:
        raise TrunklineError("a network's tokenizer needs the library: pip install tokenizers") from error
    except Exception as error:  # the library raises plain `Exception`
        raise TrunklineError(f"the tokenizer in {place} is none of the tokenizers library: {error}") from error


def facts_of_training(content: Mapping[str, Any], data_name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about its training, for the model card."""
    classes, callbacks = content.get("classes"), content.get("callbacks")
    named = classes.get("objective") if isinstance(classes, dict) else content.get("objective")
    source, rows = str(data.get("source") or ""), data.get("rows")
    source = Path(source).name if looks_like_path(source) else source  # others have no such folder
    facts = {
        "objective": str(named or "").rpartition(".")[2],
        "data": " ".join(filter(None, (data_name, source))),
        "rows": ", ".join(f"{split} {count:,}" for split, count in rows.items()) if isinstance(rows, dict) else None,
        "steps": content.get("global_step"),
        "epochs": content.get("epoch"),
        "validated at step": validation_in(content).get("step"),
    }
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        score = state.get("best_model_score") if isinstance(state, dict) else None
        if isinstance(score, float | Tensor) and state.get("monitor") not in (None, "step"):
            facts[f"best {state['monitor']}"] = f"{float(score):.4g}"
    return {name: value for name, value in facts.items() if value not in (None, "")}


def validation_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the last validation before a checkpoint, and `step`, at which it was; empty if it keeps none."""
    callbacks = content.get("callbacks")
    state = callbacks.get("LastScores") if isinstance(callbacks, dict) else None
    return state if isinstance(state, dict) else {}


def facts_of_run(checkpoint: Path) -> dict[str, str]:
    """The command of the run that a checkpoint lies in, for the model card; empty if it left no record."""
    try:
        record = json.loads((checkpoint.parents[1] / "record.json").read_text(encoding="utf-8"))
        return {"command": f"`{record['command']}`", "trained with": f"Trunkline {record['versions']['trunkline']}"}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}
