"""What a checkpoint makes unnecessary that replaces all weights: the files that its run once started from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from trunkline.datamodules.tokenizers import tokenizer_of_checkpoint
from trunkline.modules.networks.base import stored_config
from trunkline.modules.training.warm_start import starts_from_weights
from trunkline.names import looks_like_path

TOKENIZERS = ("tokenizer", "target_tokenizer")
"""Arguments of datamodules that may name a file with a tokenizer."""


def network_instead(model: Namespace | None, content: Mapping[str, Any]) -> Any:
    """The configuration of a checkpoint's network, to be used instead of the weights that a recipe starts from.

    Args:
        model: part of a config.
        content: of the checkpoint.

    Returns:
        plain data; None if the recipe starts from no weights, or the checkpoint does not tell its network.
    """
    arguments = (model and model.get("init_args")) or {}
    return stored_config(content) if starts_from_weights(arguments) else None


def replace_missing_tokenizers(data: Namespace | None, checkpoint: Path, content: Mapping[str, Any]) -> list[str]:
    """Let the data take each tokenizer whose file is gone from the checkpoint, which holds it too.

    Args:
        data: part of a config, changed in place.
        checkpoint: the file.
        content: of it.

    Returns:
        what to tell the user.
    """
    said = []
    for name in TOKENIZERS:
        place = f"init_args.{name}"
        given = data.get(place) if data else None
        gone = isinstance(given, str) and looks_like_path(given) and not Path(given).exists()
        if data is not None and gone and checkpoint.is_file() and tokenizer_of_checkpoint(content, name) is not None:
            data[place] = str(checkpoint)
            said.append(f"there is no {name} {given} any more: taking that in {checkpoint}")
    return said
