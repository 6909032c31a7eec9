"""How waveforms become log-mel features, in the files of transformers: the feature extractors of Whisper and AST.

What goes with a network says it by the fields of `trunkline.datamodules.audio.log_mel.LogMel`.
"""

from collections.abc import Mapping
from typing import Any

USUAL_SOUNDS: dict[str, Any] = {"mean": 0.0, "std": 1.0, "per_clip": False, "range_db": None, "padding": "fixed"}
RATE, WINDOW, HOP = 16_000, 400, 160
"""Samples a second, in a window, and in a hop. Their mel bands end at 8 kHz, ours at half the rate."""


def sounds_of_extractor(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a preprocessor_config.json: fields of a `LogMel`; None if it is of something else, or hears otherwise."""
    kind = settings.get("feature_extractor_type")
    if settings.get("sampling_rate", RATE) != RATE or settings.get("padding_value", 0.0) != 0:
        return None
    if kind == "WhisperFeatureExtractor" and settings.get("dither", 0.0) == 0:
        return USUAL_SOUNDS | {
            "sample_rate": RATE,
            "num_mels": settings.get("feature_size", 80),
            "convention": "whisper",
            "window": "povey",  # of no effect
            "window_ms": milliseconds(settings.get("n_fft", WINDOW)),
            "hop_ms": milliseconds(settings.get("hop_length", HOP)),
            "max_seconds": float(settings.get("chunk_length", 30)),
        }
    if kind == "ASTFeatureExtractor":
        normalised = settings.get("do_normalize", True)
        scale = {"mean": settings.get("mean", -4.2677393), "std": 2 * settings.get("std", 4.5689974)}
        return USUAL_SOUNDS | {
            "sample_rate": RATE,
            "num_mels": settings.get("num_mel_bins", 128),
            "convention": "kaldi",
            "window": "hanning",
            "window_ms": milliseconds(WINDOW),
            "hop_ms": milliseconds(HOP),
            "max_seconds": settings.get("max_length", 1024) * HOP / RATE,
            **(scale if normalised else {}),
        }
    return None


def milliseconds(samples: int) -> float:
    """Duration of samples."""
    return samples * 1000 / RATE


def extractor_settings(sounds: Mapping[str, Any] | None, model_type: str | None) -> dict[str, Any]:
    """Content of preprocessor_config.json, if the model's feature extractor hears exactly the same; else empty."""
    if sounds is None or not {"num_mels", "max_seconds", "window_ms", "hop_ms", "mean", "std"} <= sounds.keys():
        return {}
    common = {"sampling_rate": RATE, "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False}
    settings = common
    if model_type == "whisper":
        settings = common | {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": sounds["num_mels"],
            "n_fft": round(sounds["window_ms"] * RATE / 1000),
            "hop_length": round(sounds["hop_ms"] * RATE / 1000),
            "chunk_length": int(sounds["max_seconds"]),
            "dither": 0.0,
        }
    elif model_type == "audio-spectrogram-transformer":
        settings = common | {
            "feature_extractor_type": "ASTFeatureExtractor",
            "feature_size": 1,
            "num_mel_bins": sounds["num_mels"],
            "max_length": round(sounds["max_seconds"] * RATE) // HOP,
            "do_normalize": True,
            "mean": sounds["mean"],
            "std": sounds["std"] / 2,
        }
    heard = sounds_of_extractor(settings) or {}
    ignored = {"window"} if heard.get("convention") == "whisper" else set()
    same = heard and all(sounds.get(name) == value for name, value in heard.items() if name not in ignored)
    return settings if same else {}
