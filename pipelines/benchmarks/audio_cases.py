"""Cases of `trunkline benchmark` with sound."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.pipelines.benchmarks.timing import Side, compare

SPEECH_RATE = 16_000
CLIP_SECONDS, CLIPS = 10, 6
"""One minute of sound is measured at a time, in clips of a usual length."""
MEL_BANDS = 80


def _minute(features: Callable[[Tensor], Tensor]) -> Side:
    """Computes the features of a minute of sound; what it holds does not change the time."""
    clips = list(0.1 * torch.randn(CLIPS, CLIP_SECONDS * SPEECH_RATE))

    def side() -> float:
        start = time.perf_counter()
        for clip in clips:
            features(clip)
        return time.perf_counter() - start

    return side


def features_speed(rounds: int) -> list[dict[str, Any]]:
    """Log-mel features of a minute of speech on one core, against torchaudio's of Kaldi; also in times real time."""
    from torchaudio.compliance.kaldi import fbank

    conventions = {
        "Kaldi": LogMel(SPEECH_RATE, MEL_BANDS, convention="kaldi"),
        "Whisper": LogMel(SPEECH_RATE, MEL_BANDS, convention="whisper"),
    }
    theirs = _minute(lambda clip: fbank(clip[None], num_mel_bins=MEL_BANDS, sample_frequency=SPEECH_RATE))
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for name, log_mel in conventions.items():
            row = compare(f"log-mel, {name}", "torchaudio fbank, Kaldi", _minute(log_mel.features), theirs, rounds)
            speed, peer_speed = (1e3 * CLIPS * CLIP_SECONDS / row[ms] for ms in ("ms", "peer_ms"))
            case = f"{row['case']}: {speed:.0f} times real time"
            rows.append(row | {"case": case, "real_time": speed, "peer_real_time": peer_speed})
    finally:
        torch.set_num_threads(threads)
    return rows
