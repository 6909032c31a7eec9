"""Check of the files that commands write."""

from pathlib import Path

from trunkline import TrunklineError


def check_output(path: str, suffixes: tuple[str, ...]) -> str:
    """Check `--output` before any work, and return its suffix in lower case.

    Raises:
        TrunklineError: if the suffix is not among `suffixes`, or the folder does not exist.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes or not Path(path).absolute().parent.is_dir():
        *others, last = suffixes
        endings = f"{', '.join(others)} or {last}" if others else last
        raise TrunklineError(f"--output {path} must be a {endings} file in a folder that exists")
    _check_kind(Path(path))
    return suffix


def check_folder(path: str) -> None:
    """Check, before any work, that `--output` can be a file.

    Raises:
        TrunklineError: if its folder does not exist, or if it is a folder itself.
    """
    file = Path(path)
    _check_kind(file)
    if not file.absolute().parent.is_dir():
        raise TrunklineError(f"--output {path}: there is no folder {file.parent}; make it first, or choose another one")


def _check_kind(file: Path) -> None:
    """A file is replaced as a whole when all of it is written, which a device or a pipe must not be."""
    if file.is_dir():
        raise TrunklineError(f"--output {file} is a folder; give a file in it")
    if file.exists() and not file.is_file():
        raise TrunklineError(f"--output {file} is a device or a pipe; give a regular file")
