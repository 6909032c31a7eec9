"""Checkpoints of tiny networks that hear: random ones, and one that spells tones exactly; recordings of tones."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer

from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.datamodules.audio.transcripts import TranscriptNormalization
from trunkline.datamodules.tokenizers import train_chars
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import (
    AST,
    GPT,
    ASTConfig,
    GPTConfig,
    Network,
    SpeechEncoder,
    SpeechEncoderConfig,
    Whisper,
    WhisperConfig,
)
from trunkline.modules.training.checkpoints import SafeCheckpointIO

NetworkT = TypeVar("NetworkT", bound=Network)
RATE = 8_000
LETTERS = "abcdef "
LOG_MEL = LogMel(sample_rate=RATE, num_mels=12, max_seconds=2.0)
FIXED, NORMALISED = replace(LOG_MEL, padding="fixed"), replace(LOG_MEL, mean=-8.0, std=5.0)
CLASSES = ["bell", "cat", "dog", "rain", "train", "wind", "wood"]
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


def random_recognizer(seed: int = 2, **options: Any) -> SpeechEncoder:
    """A network whose texts depend on the sound."""
    torch.manual_seed(seed)
    return shaken(SpeechEncoder(config(**options)), 0.1)


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


@torch.no_grad()
def shaken(network: NetworkT, alpha: float) -> NetworkT:
    """The network with random numbers added to all weights."""
    for p in network.parameters():
        p.add_(torch.randn_like(p), alpha=alpha)
    return network.eval()


def random_writer(seed: int = 4) -> Whisper:
    """A Whisper whose texts depend on the sound."""
    torch.manual_seed(seed)
    trunk = TransformerConfig(dim=32, depth=1, num_heads=2)
    sizes: dict[str, Any] = {"vocab_size": 9, "num_mels": 12, "max_frames": LOG_MEL.max_frames}
    return shaken(Whisper(WhisperConfig(**sizes, max_target_length=14, encoder=trunk, decoder=trunk)), 0.4)


def random_classifier(seed: int = 1) -> AST:
    """An AST for `CLASSES`."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_mels": 12, "max_frames": LOG_MEL.max_frames, "num_classes": len(CLASSES)}
    trunk = TransformerConfig(dim=32, depth=1, num_heads=2)
    return shaken(AST(ASTConfig(**sizes, patch_size=4, stride=3, backbone=trunk)), 0.5)


Change = Callable[[dict[str, Any]], Any]


def save_listener(
    folder: Path,
    network: Network,
    content: dict[str, Any],
    change: Change = lambda content: None,
    name: str = "a.ckpt",
) -> str:
    """A checkpoint in the format of training: `content` without the network."""
    content["hyper_parameters"]["network"] = asdict(network.config)
    content["state_dict"] = {f"network.{key}": value for key, value in network.state_dict().items()}
    change(content)
    SafeCheckpointIO().save_checkpoint(content, folder / name)
    return str(folder / name)


def speech_state(log_mel: LogMel, form: str) -> dict[str, Any]:
    """What SpeechData keeps."""
    return {
        "tokenizer": alphabet().to_str(),
        "log_mel": asdict(log_mel),
        "normalization": asdict(TranscriptNormalization()),
        "form": form,
        "settings": {"max_length": 14, "start_tokens": None},
        "source": "trained.jsonl",
        "fractions": {"val": 0.25, "test": 0.0},
    }


def save_recognizer(
    folder: Path,
    network: SpeechEncoder | None = None,
    log_mel: LogMel = LOG_MEL,
    change: Change = lambda content: None,
) -> str:
    """A checkpoint of `SpeechRecognizer`; the network is the `speller` if it is left out."""
    content = {
        "objective": "SpeechRecognizer",
        "hyper_parameters": {"scores": ["cer", "wer", "exact"]},
        "SpeechData": speech_state(log_mel, "ctc"),
    }
    return save_listener(folder, network or speller(), content, change)


def save_writer(folder: Path, network: Whisper | None = None, change: Change = lambda content: None) -> str:
    """A checkpoint of `SpeechToText`; its clips are of fixed length."""
    content = {
        "objective": "SpeechToText",
        "hyper_parameters": {"scores": ["cer", "wer", "exact"], "generation": None},
        "SpeechData": speech_state(FIXED, "decoder"),
    }
    return save_listener(folder, network or random_writer(), content, change)


def save_classifier(
    folder: Path, network: AST | None = None, several: bool = False, change: Change = lambda content: None
) -> str:
    """A checkpoint of `AudioClassifier`."""
    content = {
        "objective": "AudioClassifier",
        "hyper_parameters": {"multi_label": several, "label_smoothing": 0.0},
        "AudioData": {
            "log_mel": asdict(NORMALISED),
            "class_names": CLASSES,
            "multi_label": several,
            "split_seed": 0,
            "source": "trained.jsonl",
            "fractions": {"val": 0.25, "test": 0.0},
        },
    }
    return save_listener(folder, network or random_classifier(), content, change)


def save_language_model(folder: Path, words: Tokenizer | None = None, extra: int = 0) -> str:
    """A language model with random weights."""
    words = words or alphabet()
    torch.manual_seed(1)
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2, causal=True)
    network = GPT(GPTConfig(words.get_vocab_size() + extra, max_length=64, backbone=trunk))
    content = {"objective": "CausalLM", "hyper_parameters": {}, "TextData": {"tokenizer": words.to_str()}}
    return save_listener(folder, shaken(network, 1.0), content, name="lm.ckpt")
