"""The reader of checkpoints that `trunkline fit` wrote: their classes, network, tokenizer and preprocessing."""

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.audio.transcripts import TranscriptNormalization
from trunkline.datamodules.images.preprocessing import Preprocessing
from trunkline.datamodules.pairs.captions import CaptionEncoder
from trunkline.datamodules.tokenizers import load_tokenizer, size_of, tokenizer_of_checkpoint
from trunkline.files import check_parts, load_checkpoint
from trunkline.modules.networks import Network
from trunkline.modules.networks.base import network_of, refuse_nan
from trunkline.modules.training.warm_start import names_weights
from trunkline.pipelines.objectives import KINDS, Kind, able, known_class, short
from trunkline.run_folders import find_checkpoint

UNKNOWN = "something else"


class Trained:
    """A training checkpoint.

    A checkpoint names its classes; for old ones, which do not, the table of objectives gives them. A class that is not
    Trunkline's own must have been imported before: a file must not decide what is imported.

    Args:
        file: name of the checkpoint's file, for messages.
        content: content of the checkpoint.
    """

    def __init__(self, file: str, content: dict[str, Any]) -> None:
        self.file, self.content = file, content
        if "classes" in content:
            check_parts(content, file, {"classes": dict})
        self.classes: dict[str, str] = dict(content.get("classes") or {})
        """Class paths of `objective`, `network` and `data`; empty for old checkpoints."""
        path = self.classes.get("objective", "")
        self.objective: str = short(path) or content.get("objective", UNKNOWN)
        """Name of the objective's class."""
        own = path != "" and not path.startswith("trunkline.")
        self.kind: Kind | None = None if own else KINDS.get(self.objective)
        """The objective's entry in the table; None for an objective that is not Trunkline's."""

    @classmethod
    def read(cls, file: str, command: str | None = None) -> "Trained":
        """Read a checkpoint.

        Args:
            file: a file that `trunkline fit` wrote, or a folder of runs, see `find_checkpoint`.
            command: a command that must be able to use it, see `require`; None for any checkpoint.

        Raises:
            TrunklineError: if it is missing, damaged, or if the command cannot use it.
        """
        path = find_checkpoint(file, "checkpoint")
        if str(path) != str(Path(file)):
            print(f"reading {path}", file=sys.stderr)
        trained = cls(str(path), load_checkpoint(path, field="checkpoint"))
        if command is not None:
            trained.require(command)
        return trained

    def suits(self, command: str) -> bool:
        """Whether a command of the table can use the checkpoint.

        With an objective that is not Trunkline's, a command can still use the network if that is Trunkline's. Only
        predictions need the objective itself.
        """
        if self.kind is not None:
            return command in self.kind.commands
        return not command.startswith("predict") and self._class_path("network") in {
            KINDS[name].network for name in able(command)
        }

    def require(self, command: str, mend: str = "give such a checkpoint") -> None:
        """Raise an error if a command cannot use the checkpoint.

        Args:
            command: a command of the table.
            mend: what the user can do, for the message.

        Raises:
            TrunklineError: with the objectives whose checkpoints the command can use.
        """
        if not self.suits(command):
            *others, last = able(command)
            named = f"{', '.join(others)} or {last}" if others else last
            own = self.objective if self.kind else self.classes.get("objective", self.objective)
            raise TrunklineError(f"{self.file} is no checkpoint of {named}, but of {own}; {mend}")

    def _class_path(self, part: str) -> str:
        """Class path of a part, empty if not known; for Trunkline's own classes the current path in the table."""
        path = self.classes.get(part, "")
        if path and not path.startswith("trunkline."):
            return path
        if not path:
            return "" if self.kind is None else str(getattr(self.kind, part))
        return next((own for kind in KINDS.values() if short(own := getattr(kind, part)) == short(path)), path)

    def _class(self, part: str, base: type) -> Any:
        """The class of a part. It must derive from `base`, so that a file cannot make us call anything else.

        Raises:
            TrunklineError: if the class is not known.
        """
        path = self._class_path(part)
        if not path:
            raise TrunklineError(f"{self.file} is of {self.objective} and does not name the class of its {part}")
        found = known_class(path)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise TrunklineError(
                f"the {part} of {self.file} is {path}, which is not known here; import its module first"
            )
        return found

    @property
    def network_class(self) -> type[Network]:
        """Class of the network.

        Raises:
            TrunklineError: if the class is not known.
        """
        found: type[Network] = self._class("network", Network)
        return found

    @cached_property
    def network(self) -> Network:
        """The network in evaluation mode, with averaged weights if the run kept an average.

        Raises:
            TrunklineError: if its class is not known, or its weights do not fit.
        """
        return network_of(self.network_class, self.content, self.file).eval()

    def module(self) -> Any:
        """The objective with its network, as a LightningModule.

        Raises:
            TrunklineError: if its class is not known.
        """
        from trunkline.modules.objectives.base import TrunklineModule

        check_parts(self.content, self.file, {"hyper_parameters": dict, "state_dict": dict})
        given = self.content["hyper_parameters"]
        # The weights to start from are no longer needed, and may be gone.
        arguments = {name: None if names_weights(name) else value for name, value in given.items()}
        model = self._class("objective", TrunklineModule)(**arguments)
        model.load_state_dict(self.content["state_dict"])
        refuse_nan(model, self.file)
        return model

    @property
    def data_class(self) -> Any:
        """Class of the datamodule of the run, or the objective's usual one.

        Raises:
            TrunklineError: if the class is not known.
        """
        from lightning import LightningDataModule

        return self._class("data", LightningDataModule)

    @property
    def data_name(self) -> str:
        """Name of the run's datamodule, or of the objective's usual one."""
        return short(self._class_path("data")) or "a datamodule"

    @property
    def data(self) -> dict[str, Any] | None:
        """What the datamodule saved in the checkpoint; None if the run had no datamodule."""
        return self.content.get(self.data_name)

    def data_state(self, field: str) -> Any:
        """A field of `data`.

        Raises:
            TrunklineError: if the field is missing.
        """
        if self.data is None or field not in self.data:
            raise TrunklineError(
                f"{self.file} was trained without {self.data_name}, so how to prepare its inputs is not known"
            )
        return self.data[field]

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images were prepared.

        Raises:
            TrunklineError: if the checkpoint does not say.
        """
        return Preprocessing(**self.data_state("preprocessing"))

    @property
    def log_mel(self) -> LogMel:
        """How waveforms became features.

        Raises:
            TrunklineError: if the checkpoint does not say.
        """
        return LogMel(**self.data_state("log_mel"))

    @property
    def normalization(self) -> TranscriptNormalization:
        """How transcripts were written.

        Raises:
            TrunklineError: if the checkpoint does not say.
        """
        return TranscriptNormalization(**self.data_state("normalization"))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes.

        Raises:
            TrunklineError: if the checkpoint does not say.
        """
        return self.data_state("class_names")

    def tokenizer(self, mend: str = "give a checkpoint that `trunkline fit` wrote") -> Tokenizer:
        """The tokenizer in the checkpoint.

        Args:
            mend: what the user can do if there is none, for the message.

        Raises:
            TrunklineError: if it is missing or broken.
        """
        text = tokenizer_of_checkpoint(self.content if self.data is None else {"data": self.data})
        if text is None:
            raise TrunklineError(f"{self.file} holds no tokenizer; {mend}")
        return self._read_tokenizer(text, mend)

    def target_tokenizer(self) -> Tokenizer:
        """The tokenizer of the targets; that of the sources if they share it. Errors as in `tokenizer`."""
        text = None if self.data is None else self.data.get("target_tokenizer")
        return self.tokenizer() if text is None else self._read_tokenizer(text, "train again")

    def _read_tokenizer(self, text: str, mend: str) -> Tokenizer:
        try:
            return Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain `Exception`
            raise TrunklineError(
                f"the tokenizer in {self.file} is no tokenizer of the tokenizers library: {error}; {mend}"
            ) from error

    def encoder(self) -> CaptionEncoder:
        """Prepares texts like the captions in training.

        Raises:
            TrunklineError: if the checkpoint does not say how.
        """
        return CaptionEncoder(self.tokenizer(), self.data_state("max_length"))


def read_language_model(file: str, command: str, tokenizer: str | None = None) -> tuple[Any, Tokenizer]:
    """Read the checkpoint of a language model: its network in evaluation mode, and its tokenizer.

    Args:
        file: the checkpoint.
        command: the command that will use it.
        tokenizer: as in `load_tokenizer`, used instead of the checkpoint's own tokenizer.

    Raises:
        TrunklineError: if the checkpoint is damaged, cannot be used by the command, or has no tokenizer; or if network
            and tokenizer do not fit each other.
    """
    trained = Trained.read(file, command)
    return language_model_of(trained, tokenizer)


def language_model_of(trained: Trained, tokenizer: str | None = None) -> tuple[Any, Tokenizer]:
    """Network and tokenizer of a checkpoint, as `read_language_model` returns them."""
    if tokenizer is None:
        words = trained.tokenizer("name its file with --tokenizer tokenizer.json")
        source = f"the tokenizer in {trained.file}"
    else:
        words, source = load_tokenizer(tokenizer, "tokenizer"), f"--tokenizer {tokenizer}"
    network: Any = trained.network
    if size_of(words) > network.config.vocab_size:
        raise TrunklineError(
            f"{source} has {size_of(words)} tokens, but the network of {trained.file} knows "
            f"{network.config.vocab_size}; use the tokenizer that it was trained with"
        )
    return network, words
