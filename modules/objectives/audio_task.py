"""Base class of the objectives that hear: they count seconds of audio."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from trunkline.contract import AudioBatch
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.checks import facts_of

USUAL_FRAME_SECONDS = 0.01
"""From one frame to the next, if the data does not tell."""


class AudioTask(TrunklineModule):
    """Base class of the objectives on an `AudioBatch`; their throughput is in seconds of audio."""

    unit = "audio_seconds"
    counted: ClassVar[dict[str, str]] = {"skipped": "skipped_clips", "truncated": "truncated_clips"}

    @property
    def unit_size(self) -> float:
        """Seconds of a frame: `batch_size` counts frames."""
        return facts_of(self.trainer).frame_seconds or USUAL_FRAME_SECONDS

    def batch_size(self, batch: Any) -> Tensor:
        """Number of frames in this process's batch, without padding that is masked; stays on the device."""
        frames = frames_of(batch)
        return (frames * batch["valid"]).sum() if "valid" in batch else frames.sum()


def frames_of(batch: AudioBatch) -> Tensor:
    """Number of frames of each clip (B,), with padding that the network sees."""
    features = batch["features"]
    if "mask" in batch:
        return batch["mask"].sum(dim=1)
    return torch.full((len(features),), features.shape[1], device=features.device)
