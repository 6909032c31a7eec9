"""Cases of `trunkline benchmark` with sound."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import AST, ASTConfig
from trunkline.pipelines.benchmarks.text_cases import transformers
from trunkline.pipelines.benchmarks.timing import Side, bare_loop, compare

SPEECH_RATE = 16_000
CLIP_SECONDS, CLIPS = 10, 6
"""One minute of sound is measured at a time, in clips of a usual length."""
MEL_BANDS = 80
AST_MELS, AST_FRAMES = 128, 256
AST_TRUNK = TransformerConfig(dim=192, depth=12, num_heads=3)


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


def _ast_loops(batch_size: int, fast: bool = False) -> tuple[Side, Side]:
    """Training steps of our AST and of transformers'; with `fast` both are compiled and compute in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = ASTConfig(num_mels=AST_MELS, max_frames=AST_FRAMES, backbone=AST_TRUNK)
    library = transformers()
    peer = library.ASTConfig(
        hidden_size=AST_TRUNK.dim,
        num_hidden_layers=AST_TRUNK.depth,
        num_attention_heads=AST_TRUNK.num_heads,
        intermediate_size=AST_TRUNK.hidden_dim,
        max_length=AST_FRAMES,
        num_mel_bins=AST_MELS,
        num_labels=config.num_classes,
    )
    features = torch.randn(batch_size, AST_FRAMES, AST_MELS, device=device)
    label = torch.randint(0, config.num_classes, (batch_size,), device=device)
    loops = []
    for network in (AST(config), library.ASTForAudioClassification(peer)):
        network.to(device)
        if fast:
            network.compile()
        loops.append(bare_loop(network, partial(_name_sounds, network, features, label), fast))
    return loops[0], loops[1]


def _name_sounds(network: nn.Module, features: Tensor, label: Tensor) -> Tensor:
    logits = network(features)
    return F.cross_entropy(logits if isinstance(logits, Tensor) else logits.logits, label)


def audio(rounds: int, batch_size: int | None) -> list[dict[str, Any]]:
    """Training steps of an AST against transformers': float32 on both sides, and bfloat16 compiled; then features."""
    clips, peer = batch_size or 16, "transformers fp32 eager"
    eager, fast = _ast_loops(clips), _ast_loops(clips, fast=True)
    return [
        compare("AST fp32 eager", peer, *eager, rounds),
        compare("AST bf16 compiled", peer, fast[0], eager[1], rounds),
        compare("transformers' own, bf16 compiled", peer, fast[1], eager[1], rounds),
        *features_speed(rounds),
    ]
