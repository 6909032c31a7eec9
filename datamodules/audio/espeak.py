"""Texts to speech with eSpeak NG, from the package espeakng-loader (extra `speech`; under the GPL-3)."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trunkline import TrunklineError
from trunkline.datamodules.audio import espeak_process

ESPEAK_PACKAGE = "espeakng-loader"
ESPEAK_RATE = 22_050
"""Samples per second."""


class Utterance(NamedTuple):
    """A text, and how it is said."""

    voice: str
    """Language and variant, such as gmw/en-US+Andy."""
    text: str
    rate: int
    """Words per minute."""
    pitch: int
    """0 to 100."""
    range: int
    """How much the pitch changes, 0 to 100."""


def espeak_folder() -> Path:
    """The folder of the package.

    Raises:
        TrunklineError: if it is not installed.
    """
    spec = importlib.util.find_spec("espeakng_loader")
    if spec is None or spec.origin is None:
        raise TrunklineError(
            f"the spoken digits need eSpeak NG in the package {ESPEAK_PACKAGE}: pip install 'trunkline[speech]'"
        )
    return Path(spec.origin).parent


def espeak_version() -> str:
    """Version of the package, which decides the sounds."""
    return version(ESPEAK_PACKAGE)


def espeak_voices() -> list[str]:
    """Names of the variants of voices, sorted.

    Raises:
        TrunklineError: if the package is not installed.
    """
    return sorted(path.name for path in (espeak_folder() / "espeak-ng-data" / "voices" / "!v").iterdir())


def speak(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """Say texts one after the other, in a process of its own.

    The samples depend on the whole list: eSpeak's random state passes from one text to the next. The same list always
    gives the same samples.

    Returns:
        (S,) int16 at `ESPEAK_RATE` for each utterance.

    Raises:
        TrunklineError: if the package is not installed or does not work.
    """
    folder = espeak_folder()
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    name = "espeak-ng" if sys.platform == "win32" else "libespeak-ng"
    job = {
        "library": str(folder / (name + suffix)),
        "data": str(folder / "espeak-ng-data"),
        "utterances": utterances,
    }
    command = [sys.executable, "-I", "-S", espeak_process.__file__]
    done = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, check=False)
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise TrunklineError(
            f"eSpeak NG does not work: {reason}; install it again: pip uninstall {ESPEAK_PACKAGE}, then pip install it"
        )
    clips, place = [], 0
    for _ in utterances:
        end = place + 8 + int.from_bytes(done.stdout[place : place + 8], "little")
        clips.append(np.frombuffer(done.stdout[place + 8 : end], "<i2"))
        place = end
    return clips


def speak_groups(groups: Sequence[Sequence[Utterance]]) -> Iterator[list[np.ndarray]]:
    """`speak` for many groups, in their order; as many processes at a time as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        yield from pool.map(speak, groups)
