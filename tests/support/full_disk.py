"""A disk that becomes full while a run trains, and has space again when a file is removed."""

import errno
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

FULL = "full"
"""Name of the file that takes the space; where the disk is only pretended to be full, of the one that says so."""


def mount_small(disk: Path, size: str) -> None:
    """Mount a file system of this size at a new folder, or skip the test; `umount` it afterwards."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk")


def umount(disk: Path) -> None:
    """Remove the file system, also while something has it open."""
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


class FullDisk(Callback):
    """Fills a disk at a step, once: a resumed run has the space again.

    Args:
        folder: on the disk.
        step: the number of optimiser steps.
        pretended: let only the writing of checkpoints fail, in the middle of a file.
    """

    def __init__(self, folder: str, step: int, pretended: bool) -> None:
        self.file, self.step, self.pretended = Path(folder, FULL), step, pretended

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step:
            self.step = -1

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step != self.step or not trainer.is_global_zero:
            return
        self.step = -1
        if self.pretended:
            save = torch.save

            def fail(content: Any, path: Path) -> None:
                save(content, path)
                os.truncate(path, path.stat().st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            torch.save = fail  # type: ignore[assignment]
            return
        with suppress(OSError), self.file.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 12))
