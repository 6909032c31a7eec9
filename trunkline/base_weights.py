"""Weights that a run with LoRA does not change: in one file beside its checkpoints, which name it by its SHA-256.

A checkpoint of such a run holds what learns, and under `BASE` the name and the digest of that file. Whoever reads the
checkpoint gets it whole (`whole`).
"""

import hashlib
from pathlib import Path
from typing import Any

from trunkline import TrunklineError

BASE = "base"
"""Key of a checkpoint: `file`, `sha256`, and `same`, second names of weights that have two."""
BASE_NAME = "base-{}.safetensors"
"""Name of the file, with the first digits of its digest: another base never takes its place."""
STATES = ("state_dict", "current_model_state")
"""Parts of a checkpoint that hold weights; the second one is that of runs that also average them."""


def whole(content: dict[str, Any], checkpoint: Path, field: str | None = None) -> dict[str, Any]:
    """The content of a checkpoint with the weights that its run did not change; others stay as they are.

    Args:
        content: of the checkpoint.
        checkpoint: its file.
        field: the field that gave the path, for the message.

    Raises:
        TrunklineError: if the file with these weights is missing or not as it was written.
    """
    named = content.get(BASE)
    if named is None:
        return content
    try:
        file = checkpoint.parent / Path(str(named["file"])).name
        wanted, same = str(named["sha256"]), dict(named["same"])
    except (TypeError, KeyError, ValueError) as error:
        raise TrunklineError(f"{checkpoint} does not say where its frozen weights are; train again", field) from error
    if not file.is_file():
        raise TrunklineError(
            f"{checkpoint} holds only what LoRA has trained, and needs {file.name} beside it, with the frozen weights "
            "of its run; copy that file there too",
            field,
        )
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wanted:
        raise TrunklineError(
            f"{file} is not as it was written, so that {checkpoint} cannot be used; copy it again from its run", field
        )
    from safetensors.torch import load_file  # here, so that importing this file stays fast

    weights = load_file(file)
    weights |= {name: weights[first] for name, first in same.items()}
    states = {name: {**weights, **content[name]} for name in STATES if name in content}
    return {**{key: value for key, value in content.items() if key != BASE}, **states}
