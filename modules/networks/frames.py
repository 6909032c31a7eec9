"""From log-mel frames to embeddings for the trunk: what networks that hear have in common.

Shape legend: B batch, T frames, M mel bins, D width, T' states, one for every `subsampling` frames.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.contract import FRAME_MULTIPLE
from trunkline.modules.backbone.transformer import init_linear
from trunkline.modules.networks.graphs import Axis


class FrameConvolutions(nn.Module):
    """Convolutions over time, each followed by GELU: (B, T, M) -> (B, T', D).

    Before each convolution, padding is set to zero, which is also what a convolution sees beyond the last frame. So a
    clip has the same states alone and in a batch with longer clips.

    Args:
        num_mels: mel bins M of a frame.
        dims: channels after each convolution; the last is D.
        kernel_size: frames that a convolution sees; an odd number, so that every state stands at a frame.
        strides: of each convolution.
    """

    def __init__(self, num_mels: int, dims: Sequence[int], kernel_size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, dim, kernel_size, stride, padding=kernel_size // 2)
            for channels, dim, stride in zip((num_mels, *dims), dims, strides, strict=False)
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, M) and a mask (B, T), False for padding -> (B, T', D); states of padding are arbitrary."""
        x = features
        for conv, stride in zip(self.convs, self.strides, strict=True):
            x = F.gelu(conv(zero_padding(x, mask).mT)).mT
            mask = subsampled_mask(mask, stride)
        return x


class FramePatches(nn.Module):
    """Groups of consecutive frames, each projected to an embedding: (B, T, M) -> (B, T', D).

    Args:
        num_mels: mel bins M of a frame.
        dim: width D.
        patch_frames: frames in a group; the last group is filled with zeros.
    """

    def __init__(self, num_mels: int, dim: int, patch_frames: int) -> None:
        super().__init__()
        self.patch_frames = patch_frames
        self.proj = nn.Linear(patch_frames * num_mels, dim)
        init_linear(self.proj)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, M) and a mask (B, T), False for padding -> (B, T', D); states of padding are arbitrary."""
        (length, bins), size = features.shape[1:], self.patch_frames
        states = (length + size - 1) // size
        x = F.pad(zero_padding(features, mask), (0, 0, 0, states * size - length))
        return self.proj(x.reshape(-1, states, size * bins))  # (B, T', frames * M) -> (B, T', D)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set the padding of (B, T, ...) to zero, whatever stands there; `mask` is (B, T), False for padding."""
    return x if mask is None else x.masked_fill(~mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), 0.0)


def subsampled_mask(mask: Tensor | None, subsampling: int) -> Tensor | None:
    """Mask of frames (B, T) -> of states (B, T').

    State t stands at frame `t * subsampling`, so it is real if that frame is.
    """
    if mask is None:
        return None
    # The strides of `mask[:, ::subsampling]` would be fixed by an export to odd or to even lengths.
    return mask[:, torch.arange(0, mask.shape[1], subsampling, device=mask.device)]


def subsampled_lengths(lengths: Tensor, subsampling: int) -> Tensor:
    """Number of frames -> number of states; any shape."""
    return (lengths + subsampling - 1) // subsampling


def frame_limit(max_frames: int) -> int:
    """Frames of the longest batch, if its longest clip has `max_frames`."""
    return -(-max_frames // FRAME_MULTIPLE) * FRAME_MULTIPLE


def frame_axis(max_frames: int, frames_of_state: int) -> Axis:
    """Frames that an exported network takes: enough for two states, because a graph of one would be another one."""
    limit = frame_limit(max_frames)
    return Axis("frames", min(frames_of_state + 1, limit), limit)


def check_frames(features: Tensor, num_mels: int, max_frames: int) -> None:
    """Refuse features that a network cannot hear.

    Raises:
        TrunklineError: if they are not (B, T, `num_mels`), or have more frames than a batch of the longest clips.
    """
    if features.ndim != 3 or features.shape[2] != num_mels:
        raise TrunklineError(
            f"the network takes features of shape (B, frames, {num_mels}), but got {tuple(features.shape)}; make "
            "num_mels of the network and of the data the same",
            "model.network.num_mels",
        )
    if not 1 <= features.shape[1] <= frame_limit(max_frames):
        raise TrunklineError(
            f"a clip of {features.shape[1]} frames does not fit into a network that hears 1 to {max_frames}; cut the "
            "recording, or train with a larger max_frames",
            "model.network.max_frames",
        )
