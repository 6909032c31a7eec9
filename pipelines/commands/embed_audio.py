"""`trunkline embed --audio`: embeddings of sounds, of any length."""

from functools import partial
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import Tensor

from trunkline import TrunklineError
from trunkline.datamodules.samplers import SampleKey
from trunkline.modules.networks import AST, SpeechEncoder, Whisper
from trunkline.pipelines.recordings import AudioWindows, Windowing, open_recordings
from trunkline.pipelines.sounds import pooled_states, vectors_of
from trunkline.pipelines.trained import Trained

LISTENERS = (AST, SpeechEncoder, Whisper)
"""Classes of the networks that hear."""
SPRITE = 32
"""Pixels of a side of a small picture."""


def embed_audio(
    trained: Trained,
    audio: str,
    batch_size: int,
    num_workers: int,
    skip_corrupt: bool,
    thumbnails: int,
    device: torch.device,
) -> tuple[list[str], Tensor, list[Image.Image]]:
    """Embed recordings.

    Args:
        trained: a checkpoint of a network that hears.
        audio: a file, or a folder with files.
        batch_size: number of windows at a time.
        num_workers: number of processes that read recordings.
        skip_corrupt: leave out recordings that cannot be read, instead of stopping.
        thumbnails: largest number of small pictures.
        device: where the network computes.

    Returns:
        The paths of N recordings, their embeddings (N, D), and small spectrograms of the first ones.

    Raises:
        TrunklineError: if the checkpoint cannot be used, or a recording cannot be read.
    """
    log_mel, network = trained.log_mel, trained.network.to(device)
    config: Any = network.config
    recordings, paths = open_recordings([audio], "audio", skip_corrupt)
    windows = AudioWindows(recordings, log_mel, Windowing.of(log_mel, config.max_frames), skip_corrupt)
    encode = partial(pooled_states, network)
    vectors, heard = vectors_of(encode, windows, batch_size, num_workers, device, "embedding sounds")
    kept = heard.nonzero()[:, 0].tolist()
    if not kept:
        raise TrunklineError(f"none of these {len(paths)} recordings can be read; give others", "audio")
    if len(kept) < len(paths):
        print(f"skipped {len(paths) - len(kept)} of {len(paths)} recordings, which cannot be read")
    firsts = {window.recording: n for n, window in enumerate(windows.windows) if not window.start}
    pictures = [small_spectrogram(windows[SampleKey(0, firsts[n])]) for n in kept[:thumbnails]]
    return [recordings.name(n) for n in kept], vectors[heard], pictures


def small_spectrogram(item: dict[str, Any]) -> Image.Image:
    """A small picture of the first window of a recording: time to the right, frequency upwards."""
    frames = item["features"][: item["frames"]]
    low, high = frames.aminmax()
    shares = (frames - low) / (high - low).clamp(min=1e-6)
    pixels = matplotlib.colormaps["magma"](shares.T.flip(0).numpy(), bytes=True)[:, :, :3]  # (M, T, 3)
    return Image.fromarray(pixels).resize((SPRITE, SPRITE))
