"""Checkpoints that survive a kill or a full disk, and in which a flipped bit is noticed."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from trunkline.base_weights import BASE
from trunkline.files import check_parts, digest_file, in_use, load_checkpoint, remove_unused, replacing
from trunkline.modules.training.sharded_checkpoints import cannot_save, previous_of, remove
from trunkline.seal import seal

CHECKPOINT_PARTS = {
    "state_dict": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": dict,
}
"""What Lightning needs of any checkpoint: key -> type."""
RESUMED = {"callbacks": dict, "optimizer_states": list, "lr_schedulers": list}
"""What it also needs to go on from one, and `save_weights_only` leaves out."""


class WritesBeside(Protocol):
    """Weights that are stored beside checkpoints, once."""

    def beside(self, checkpoint: Path) -> dict[str, Any]:
        """Write them beside a checkpoint if they are not there; return what the checkpoint says about them."""
        ...


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes each file completely or not at all, with its own SHA-256 inside, and loads only plain data.

    Lightning's writer moves a file across file systems without fsync, so that a kill can leave an incomplete file.
    """

    frozen: WritesBeside | None = None
    """What writes the weights that a checkpoint leaves out: see `lora_runs`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write to a temporary file beside the target, flush it to the disk, then rename it.

        Raises:
            TrunklineError: if the disk is full or not writable, with the path and the space, needed and free. An older
                file of the same name stays as it was.
        """
        path = Path(path)
        try:
            remove_unused(path.parent.glob(".*.ckpt.*"))  # what killed saves left
            if self.frozen is not None and BASE in checkpoint:
                checkpoint = {**checkpoint, BASE: self.frozen.beside(path)}
            with ExitStack() as held, replacing(path) as (content,):
                held.enter_context(in_use(content))  # until it is renamed
                try:
                    torch.save(checkpoint, content)
                except RuntimeError:  # it does not tell why it cannot write; the system does, if it is asked again
                    with content.open("ab") as stream:
                        stream.write(bytes(1 << 20))
                    raise
                seal(content)
                if path.is_dir():  # of sharded training
                    os.replace(path, previous_of(path))
            remove(previous_of(path))
            digest_file(path).unlink(missing_ok=True)  # of an older version's file
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            raise cannot_save(path, error, checkpoint) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load with `trunkline.files.load_checkpoint`, which never runs code from a file; `weights_only` is ignored.

        Raises:
            TrunklineError: also if a part of a run's checkpoint is missing.
        """
        content = load_checkpoint(path, map_location)
        check_parts(content, path, CHECKPOINT_PARTS)
        return content

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if path.is_dir():  # of sharded training
            remove(path)
            return
        super().remove_checkpoint(path)
        digest_file(path).unlink(missing_ok=True)


def follow_folder(state: dict[str, Any], folder: str) -> None:
    """Correct the paths in a checkpoint callback's state if the run's folder was moved or has another path now.

    Args:
        state: state of a `ModelCheckpoint`, changed in place.
        folder: the folder that the callback writes to now.
    """
    before, best = state["dirpath"], state["best_model_path"]
    if before == folder or (best and not Path(folder, Path(best).name).exists()):
        return

    def moved(path: str) -> str:
        return str(Path(folder, Path(path).name)) if path else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    kept = {moved(path): score for path, score in state["best_k_models"].items()}
    state.update({name: moved(state[name]) for name in paths}, best_k_models=kept, dirpath=folder)
