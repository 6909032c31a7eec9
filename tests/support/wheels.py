"""Builds wheels as a user's pip does, without a network."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def build_wheel(project: Path, folder: Path) -> Path:
    """Write the wheel of a project into `folder`; from a copy, because setuptools leaves folders in its source."""
    with tempfile.TemporaryDirectory() as copies:
        others = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "runs", "__pycache__")
        copy = shutil.copytree(project, Path(copies) / "checkout", symlinks=True, ignore=others)
        pip("wheel", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(folder), str(copy))
    (file,) = folder.iterdir()
    return file


def pip(command: str, *arguments: str) -> None:
    """Run `pip COMMAND` on what is here: no dependencies, and no package index."""
    whole = [sys.executable, "-m", "pip", command, "--no-deps", "--no-index", "--disable-pip-version-check", *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
