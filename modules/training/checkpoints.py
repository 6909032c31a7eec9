"""Checkpoints that survive a kill, a full disk and a flipped bit."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from trunkline import TrunklineError

DIGEST_SUFFIX = ".sha256"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes whole files or none, keeps a SHA-256 beside each, and loads plain data only.

    Lightning's writer moves a file across file systems without fsync: a kill can leave it torn.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write beside the target, flush to the disk, then rename.

        Raises:
            TrunklineError: if the disk is full or not writable; names the path and the free space. An
                older file of the same name stays as it was.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left_over in path.parent.glob(".*.ckpt.*"):  # of a save that was killed
                left_over.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary = Path(file.name)
            try:
                torch.save(checkpoint, temporary)
                digest = _digest(temporary)
                # The digest goes first and names the file that is about to be replaced too, so that a kill
                # between the two renames leaves a valid pair, even if that happens several times.
                known = _known_digests(path)[:7]
                _replace(path, temporary, "\n".join([digest, *known]) + "\n")
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            free = shutil.disk_usage(_existing(path.parent)).free / 1e6
            raise TrunklineError(
                f"cannot write the checkpoint {path} ({free:,.0f} MB free there): {error}; free some space or choose "
                "another --run_dir, then --resume auto"
            ) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """See `load_checkpoint`; never unpickles code, whatever `weights_only` says."""
        return load_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a file and its digest."""
        path = Path(path)
        super().remove_checkpoint(path)
        _digest_file(path).unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint after comparing it with its digest.

    Raises:
        TrunklineError: if it is missing, damaged, or holds more than plain data.
    """
    path = Path(path)
    fault = find_fault(path)
    if fault is not None:
        raise TrunklineError(f"{fault}; use an older checkpoint, or --resume auto, which finds the newest valid one")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # on other files torch raises nearly anything
        refused = re.search("WeightsUnpickler error: *(.*)", str(error))
        reason = (refused[1] if refused else str(error).partition("\n")[0]) or type(error).__name__
        raise TrunklineError(
            f"{path} is no checkpoint of plain data: {reason}; it is refused, because loading anything else could run "
            "code"
        ) from error
    if not isinstance(content, dict):
        raise TrunklineError(f"{path} is no checkpoint of a training run: it holds a {type(content).__name__}")
    return content


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if it is whole."""
    if not path.is_file():
        return f"there is no checkpoint {path}"
    if path.stat().st_size == 0:
        return f"the checkpoint {path} is empty"
    known = _known_digests(path)
    if known and _digest(path) not in known:
        return f"the checkpoint {path} is damaged: it does not match its {DIGEST_SUFFIX} file"
    return None


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint below a folder, and what is wrong with the newer ones."""
    faults: list[str] = []
    files = [p for p in folder.rglob("*.ckpt") if _digest_file(p).exists()]
    for path in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        fault = find_fault(path)
        if fault is None:
            return path, faults
        faults.append(fault)
    return None, faults


def follow_folder(state: dict[str, Any], folder: str) -> None:
    """Let a checkpoint callback find its files in a run's folder that was moved, or is reached by another path.

    Args:
        state: of a `ModelCheckpoint`, changed in place.
        folder: where it writes now.
    """
    before, best = state["dirpath"], state["best_model_path"]
    if before == folder or (best and not Path(folder, Path(best).name).exists()):
        return

    def moved(path: str) -> str:
        return str(Path(folder, Path(path).name)) if path else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    kept = {moved(path): score for path, score in state["best_k_models"].items()}
    state.update({name: moved(state[name]) for name in paths}, best_k_models=kept, dirpath=folder)


def _replace(path: Path, temporary: Path, digests: str) -> None:
    """Put a written file and its digests in their places, durably."""
    digest_temporary = temporary.with_suffix(DIGEST_SUFFIX)
    try:
        digest_temporary.write_text(digests, encoding="ascii")
        for file in (temporary, digest_temporary):
            _fsync(file)
        os.replace(digest_temporary, _digest_file(path))
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        digest_temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + DIGEST_SUFFIX)


def _known_digests(path: Path) -> list[str]:
    """The file's digest, then those of the files before it, the newest first."""
    file = _digest_file(path)
    return file.read_text(encoding="ascii", errors="replace").split() if file.exists() else []


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(f for f in (folder, *folder.parents) if f.exists())
