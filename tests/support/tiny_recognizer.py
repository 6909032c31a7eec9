"""Checkpoints of tiny networks that hear: random ones, and one that spells tones exactly; recordings of tones."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer

from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.audio.transcripts import TranscriptNormalization
from trunkline.datamodules.tokenizers import train_chars
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import SpeechEncoder, SpeechEncoderConfig
from trunkline.modules.training.checkpoints import SafeCheckpointIO

RATE = 8_000
LETTERS = "abcdef "
LOG_MEL = LogMel(sample_rate=RATE, num_mels=12, max_seconds=2.0)
STEP = 4
"""Frames for one state."""
TONE, PAUSE = 0.08, 0.08
"""Seconds of a letter's tone, and of the silence after it."""


def alphabet() -> Tokenizer:
    """A token for each letter: the ids from 2 on, the space first."""
    return train_chars([LETTERS], 0)


def frequencies() -> list[float]:
    """The middle of each mel bin, in Hz."""
    edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(RATE / 2 / 700), LOG_MEL.num_mels + 2)
    return list(700 * np.expm1(edges[1:-1] / 1127))


def tones(text: str, pause: float = PAUSE, lead: float = 0.1) -> np.ndarray:
    """(S,) a recording in which each letter is a tone: that of token n is in the middle of mel bin n + 2."""
    time = np.arange(round(TONE * RATE)) / RATE
    hertz = dict(zip(sorted(LETTERS), frequencies()[4:], strict=False))  # tokens are numbered from 2 on
    parts = [np.zeros(round(lead * RATE))]
    for letter in text:
        parts += [0.5 * np.sin(2 * np.pi * hertz[letter] * time), np.zeros(round(pause * RATE))]
    return np.concatenate(parts).astype(np.float32)


def write_wav(file: Path, waveform: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, waveform, rate, subtype=subtype)
    return str(file)


def config(**options: Any) -> SpeechEncoderConfig:
    trunk = TransformerConfig(dim=32, depth=1, num_heads=2)
    fields: dict[str, Any] = {"vocab_size": 9, "num_mels": 12, "max_frames": LOG_MEL.max_frames, "backbone": trunk}
    return SpeechEncoderConfig(**{**fields, **options})


@torch.no_grad()
def random_recognizer(seed: int = 2, **options: Any) -> SpeechEncoder:
    """A network whose texts depend on the sound."""
    torch.manual_seed(seed)
    network = SpeechEncoder(config(**options))
    for p in network.parameters():
        p.add_(torch.randn_like(p), alpha=0.1)
    return network.eval()


@torch.no_grad()
def speller(**options: Any) -> SpeechEncoder:
    """A network that spells `tones`: a state hears its own frames alone, and names the loudest bin if there is one."""
    network = SpeechEncoder(config(front="patches", patch_frames=STEP, positions="learned", **options))
    for name, p in network.named_parameters():
        if not name.startswith("backbone.norm"):
            p.zero_()
    mels, dim = network.config.num_mels, network.config.backbone.dim
    front: Any = network.front
    weight = front.proj.weight.view(dim, STEP, mels)
    weight[:mels] = torch.eye(mels)[:, None] / STEP
    weight[mels:] = 1 / STEP / mels
    network.head.weight[:9, 2:11] = 10 * torch.eye(9)
    network.head.bias[network.blank] = 20.0
    return network.eval()


def save_recognizer(
    folder: Path,
    network: SpeechEncoder | None = None,
    log_mel: LogMel = LOG_MEL,
    change: Callable[[dict[str, Any]], Any] = lambda content: None,
) -> str:
    """A checkpoint in the format of training; the network is the `speller` if it is left out."""
    network = network or speller()
    content = {
        "objective": "SpeechRecognizer",
        "hyper_parameters": {"network": asdict(network.config), "scores": ["cer", "wer", "exact"]},
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "SpeechData": {
            "tokenizer": alphabet().to_str(),
            "log_mel": asdict(log_mel),
            "normalization": asdict(TranscriptNormalization()),
            "form": "ctc",
            "source": "trained.jsonl",
            "fractions": {"val": 0.25, "test": 0.0},
        },
    }
    change(content)
    SafeCheckpointIO().save_checkpoint(content, folder / "a.ckpt")
    return str(folder / "a.ckpt")
