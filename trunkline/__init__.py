"""Trunkline: every modality through one transformer trunk."""

from importlib import import_module
from os import PathLike
from typing import Any

__version__ = "0.1.0"


class TrunklineError(ValueError):
    """Bad input. The message names the file, row or field at fault and says how to fix it.

    Args:
        message: one sentence. It uses the Python names of fields, because only `pipelines/` knows the flags.
        field: path of the field at fault in a config, such as `data.batch_size`, `model.network.max_length` or
            `trainer.max_epochs`. The commands add the flag, or the line of the config, that set it.
    """

    def __init__(self, message: str = "", field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class FoundByAll(TrunklineError):
    """Bad input that all processes of a run have found together, so that the first one alone prints it.

    Args:
        message: as in `TrunklineError`.
        field: as in `TrunklineError`.
        first: whether this is the first process.
    """

    def __init__(self, message: str, field: str | None, first: bool) -> None:
        super().__init__(message, field)
        self.first = first


class LostProcess(TrunklineError):
    """A process of the run has ended or does not answer, so that another attempt may succeed."""


def load(source: str | PathLike[str]) -> Any:
    """Load any network, in evaluation mode; its class is found by itself.

    What goes with it is attached: `tokenizer` (of the tokenizers library, which is imported when it is asked for) and
    `transform` (picture -> tensor, as in the evaluation of its training); None where it is not known.

    Args:
        source: a checkpoint of `trunkline fit` or a run's folder; a folder that `save_pretrained` wrote; a folder or a
            file of a model of transformers, timm or open_clip; a folder of peft, whose adapters are merged into the
            model that it names; or the name of a Hugging Face hub repository of these.

    Returns:
        a network of `trunkline.modules.networks`.

    Raises:
        TrunklineError: if there is no such file, it is damaged, or holds what no network of Trunkline's can be.
    """
    # By name, so that importing the package imports nothing, and the ground floor knows no other.
    return import_module("trunkline.modules.networks.loading").load_network(source)
