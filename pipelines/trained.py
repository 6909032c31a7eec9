"""The one reader of checkpoints that `trunkline fit` wrote: what they are of, their network, and how to feed it."""

from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.images.preprocessing import Preprocessing
from trunkline.datamodules.pairs.captions import CaptionEncoder
from trunkline.datamodules.tokenizers import load_tokenizer, size_of, tokenizer_of_checkpoint
from trunkline.files import load_checkpoint
from trunkline.modules.networks import Network
from trunkline.modules.training.warm_start import network_of
from trunkline.pipelines.objectives import KINDS, PREDICT_IMAGES, PREDICT_TEXTS, Kind, able, known_class, short

UNKNOWN = "something else"


class Trained:
    """What a checkpoint holds.

    It names its classes itself; of one that is older than that the table of objectives says them. A class that is not
    Trunkline's own must have been imported already: reading a file imports nothing that the file chooses.

    Args:
        file: the checkpoint, for messages.
        content: of it.
    """

    def __init__(self, file: str, content: dict[str, Any]) -> None:
        self.file, self.content = file, content
        self.classes: dict[str, str] = dict(content.get("classes") or {})
        """Paths of the classes `objective`, `network` and `data`; of older checkpoints none."""
        path = self.classes.get("objective", "")
        self.objective: str = short(path) or content.get("objective", UNKNOWN)
        """Name of its class."""
        own = path != "" and not path.startswith("trunkline.")
        self.kind: Kind | None = None if own else KINDS.get(self.objective)
        """Of the table; None: an objective of somebody's own."""

    @classmethod
    def read(cls, file: str, command: str | None = None) -> "Trained":
        """The checkpoint in a file.

        Args:
            file: as `trunkline fit` wrote it.
            command: that must be able to use it, see `require`; None: no matter.

        Raises:
            TrunklineError: if it is missing, damaged, or of no use to the command.
        """
        trained = cls(file, load_checkpoint(file))
        if command is not None:
            trained.require(command)
        return trained

    def suits(self, command: str) -> bool:
        """Whether a command of the table can use it.

        One of somebody's own objective serves where Trunkline's own network is all that counts: not for predictions,
        which the objective makes.
        """
        if self.kind is not None:
            return command in self.kind.commands
        return command not in (PREDICT_IMAGES, PREDICT_TEXTS) and self._class_path("network") in {
            KINDS[name].network for name in able(command)
        }

    def require(self, command: str, mend: str = "give such a checkpoint") -> None:
        """Refuse what a command cannot use.

        Args:
            command: of the table.
            mend: what to do instead, for the message.

        Raises:
            TrunklineError: naming the objectives that it can use.
        """
        if not self.suits(command):
            *others, last = able(command)
            named = f"{', '.join(others)} or {last}" if others else last
            own = self.objective if self.kind else self.classes.get("objective", self.objective)
            raise TrunklineError(f"{self.file} is no checkpoint of {named}, but of {own}; {mend}")

    def _class_path(self, part: str) -> str:
        """Path of the class of a part; empty if it is not known. Trunkline's own have that of the table."""
        path = self.classes.get(part, "")
        if path and not path.startswith("trunkline."):
            return path
        if not path:
            return "" if self.kind is None else str(getattr(self.kind, part))
        return next((own for kind in KINDS.values() if short(own := getattr(kind, part)) == short(path)), path)

    def _class(self, part: str, base: type) -> Any:
        """The class of a part, below `base`: a file must not choose what else is called.

        Raises:
            TrunklineError: if it is not known here.
        """
        path = self._class_path(part)
        if not path:
            raise TrunklineError(f"{self.file} does not say what its {part} is, which is of {self.objective}")
        found = known_class(path)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise TrunklineError(
                f"the {part} of {self.file} is {path}, which is not known here; import its module first"
            )
        return found

    @property
    def network_class(self) -> type[Network]:
        """Of its network.

        Raises:
            TrunklineError: if it is not known here.
        """
        found: type[Network] = self._class("network", Network)
        return found

    @cached_property
    def network(self) -> Network:
        """In evaluation mode, with averaged weights where the run kept an average.

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

        model = self._class("objective", TrunklineModule)(**{**self.content["hyper_parameters"], "init_from": None})
        model.load_state_dict(self.content["state_dict"])
        return model

    @property
    def data_class(self) -> Any:
        """Of the datamodule that it was trained with, or should have been.

        Raises:
            TrunklineError: if it is not known here.
        """
        from lightning import LightningDataModule

        return self._class("data", LightningDataModule)

    @property
    def data_name(self) -> str:
        """Name of the datamodule that it was trained with, or should have been."""
        return short(self._class_path("data")) or "a datamodule"

    @property
    def data(self) -> dict[str, Any] | None:
        """What the datamodule keeps in the checkpoint; None if it was trained without."""
        return self.content.get(self.data_name)

    def data_state(self, field: str) -> Any:
        """A field of `data`.

        Raises:
            TrunklineError: if it is not there.
        """
        if self.data is None or field not in self.data:
            raise TrunklineError(
                f"{self.file} was trained without {self.data_name}, so how to prepare its inputs is not known"
            )
        return self.data[field]

    @property
    def preprocessing(self) -> Preprocessing:
        """Of its images.

        Raises:
            TrunklineError: if it does not say.
        """
        return Preprocessing(**self.data_state("preprocessing"))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes.

        Raises:
            TrunklineError: if it does not say.
        """
        return self.data_state("class_names")

    def tokenizer(self, mend: str = "give a checkpoint that `trunkline fit` wrote") -> Tokenizer:
        """The tokenizer.

        Args:
            mend: what to do if there is none, for the message.

        Raises:
            TrunklineError: if it is missing or broken.
        """
        text = tokenizer_of_checkpoint(self.content if self.data is None else {"data": self.data})
        if text is None:
            raise TrunklineError(f"{self.file} holds no tokenizer; {mend}")
        try:
            return Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare ones
            raise TrunklineError(
                f"the tokenizer in {self.file} is no tokenizer of the tokenizers library: {error}; {mend}"
            ) from error

    def encoder(self) -> CaptionEncoder:
        """Prepares texts as the captions of training.

        Raises:
            TrunklineError: if it does not say how.
        """
        return CaptionEncoder(self.tokenizer(), self.data_state("max_length"))


def read_language_model(file: str, command: str, tokenizer: str | None = None) -> tuple[Any, Tokenizer]:
    """Network in evaluation mode, and tokenizer, of a language model's checkpoint.

    Args:
        file: the checkpoint.
        command: that it must suit.
        tokenizer: see `load_tokenizer`, in place of the checkpoint's own.

    Raises:
        TrunklineError: if it is damaged, of another objective, or without a tokenizer, or if they do not fit.
    """
    trained = Trained.read(file, command)
    return language_model_of(trained, tokenizer)


def language_model_of(trained: Trained, tokenizer: str | None = None) -> tuple[Any, Tokenizer]:
    """See `read_language_model`; of a checkpoint that is read already."""
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
