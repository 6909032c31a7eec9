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
    return suffix
