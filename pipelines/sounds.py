"""Recordings of any length as one row each: probabilities of classes, and embeddings."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trunkline.modules.networks import AST, SpeechEncoder, Whisper
from trunkline.pipelines.recordings import AudioWindows


def mean_of_windows(windows: AudioWindows, numbers: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the windows of each recording.

    Args:
        windows: the windows of N recordings.
        numbers: (W,) numbers of the windows that could be read.
        values: (W, D) a vector of each.

    Returns:
        (N, D) float32, and (N,) bool, False for a recording of which a window is missing.
    """
    recording = torch.tensor([window.recording for window in windows.windows])
    counts = recording.bincount(minlength=len(windows.recordings))
    found = recording[numbers].bincount(minlength=len(counts))
    total = torch.zeros(len(counts), values.shape[1]).index_add_(0, recording[numbers], values.float())
    return total / counts[:, None], found == counts


@torch.inference_mode()
def vectors_of(
    encode: Callable[[dict[str, Tensor]], Tensor],
    windows: AudioWindows,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    doing: str,
) -> tuple[Tensor, Tensor]:
    """A vector for each recording, as `mean_of_windows` returns them.

    Args:
        encode: the network: a batch of windows on the device -> (B, D).
        windows: the windows of the recordings.
        batch_size: number of windows at a time.
        num_workers: number of processes that read recordings.
        device: device of the network.
        doing: what a terminal shows beside the progress.

    Raises:
        TrunklineError: for a recording that cannot be read.
    """
    numbers, found = [], []
    for batch in windows.batches(batch_size, num_workers, doing):
        valid = batch["valid"]
        found.append(encode({name: value.to(device) for name, value in batch.items()})[valid.to(device)].float().cpu())
        numbers.append(batch["index"][valid])
    return mean_of_windows(windows, torch.cat(numbers), torch.cat(found))


def pooled_states(network: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, D) embeddings of windows: the features of an AST's head, else the mean of the encoder's states.

    States of padding are left out, also where the network hears them.
    """
    features, mask = batch["features"], batch.get("mask")
    if isinstance(network, AST):
        return network.forward_head(network.forward_features(features, mask), pre_logits=True)
    assert isinstance(network, SpeechEncoder | Whisper)
    states = network.encode(features, mask).x
    lengths = network.output_lengths(batch["frames"])
    real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]  # (B, T')
    return states.masked_fill(~real[:, :, None], 0.0).sum(dim=1) / lengths[:, None]
