"""Speaks texts with eSpeak NG: a program of its own, which `espeak.py` starts for each group of texts.

eSpeak carries random state from one text to the next, and cannot be brought back to its beginning while it is loaded.
In a new process, and seeded, it says the same texts in the same way each time. Only the standard library is imported,
so that the process starts in a hundredth of a second.

Reads JSON from the standard input: the paths of `library` and `data`, and `utterances`, each a list of voice, text,
rate, pitch and range. Writes for each utterance its number of bytes as a little-endian int64, then int16 samples.
"""

import ctypes
import json
import sys
from typing import Any

SYNCHRONOUS = 2
"""Mode of output: the samples go to a function, and the call returns when all are made."""
BUFFER_MS = 2000
RATE, PITCH, RANGE = 1, 3, 4
"""Numbers of the parameters."""
UTF8 = 1
ESPEAK_SEED = 13


def say(library: Any, utterance: list[Any], spoken: list[bytes]) -> bytes:
    """The samples of one utterance; `spoken` is the list that the library's callback fills."""
    voice, text, rate, pitch, pitch_range = utterance
    spoken.clear()
    faults = [library.espeak_SetVoiceByName(voice.encode())]
    for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, pitch_range)):
        faults.append(library.espeak_SetParameter(parameter, value, 0))
    content = text.encode() + b"\0"
    faults.append(library.espeak_Synth(content, ctypes.c_size_t(len(content)), 0, 1, 0, UTF8, None, None))
    faults.append(library.espeak_Synchronize())
    if any(faults):
        raise SystemExit(f"it cannot say {text!r} with the voice {voice}")
    return b"".join(spoken)


def speak_job() -> None:
    """Speak what the standard input asks for."""
    job = json.load(sys.stdin)
    library = ctypes.CDLL(job["library"])
    if library.espeak_Initialize(SYNCHRONOUS, BUFFER_MS, job["data"].encode(), 0) <= 0:
        raise SystemExit(f"it does not start with its data in {job['data']}")
    library.espeak_ng_SetRandSeed(ctypes.c_long(ESPEAK_SEED))
    spoken: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def receive(samples: int | None, count: int, _: int | None) -> int:
        if samples:
            spoken.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(receive)
    for utterance in job["utterances"]:
        samples = say(library, utterance, spoken)
        sys.stdout.buffer.write(len(samples).to_bytes(8, "little") + samples)


if __name__ == "__main__":
    speak_job()
