"""Checkpoints of tiny networks that hold all that goes with a network, without a training run."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from parity import randomise

from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import (
    AST,
    BERT,
    CLIP,
    GPT,
    ASTConfig,
    BERTConfig,
    CLIPConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    ViT,
    ViTConfig,
    Whisper,
    WhisperConfig,
)

TEXTS = ["the lion and the lamb", "a lamb in the field", "the field of the lion"] * 4
PICTURES = {
    "image_size": 16,
    "channels": 3,
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.25),
    "interpolation": "bicubic",
    "crop_pct": 0.8,
}
CLASSES = ["cat", "dog", "cow"]


def words(kind: str) -> str:
    """A tokenizer.json that was learnt from TEXTS."""
    from trunkline.datamodules import tokenizers

    learn = tokenizers.train_wordpiece if kind == "wordpiece" else tokenizers.train_bpe
    return learn(TEXTS, 300).to_str()


def trunk(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{"dim": 16, "depth": 2, "num_heads": 2, **changes})


def small_vit() -> tuple[ViT, dict[str, Any]]:
    """A classifier of colour pictures, and what its data says."""
    options: dict[str, Any] = {"num_classes": 3, "pool": "cls", "prefix_positions": 1}  # as the ViT of transformers
    network = ViT(ViTConfig(image_size=16, patch_size=8, **options, backbone=trunk()))
    return network, {"preprocessing": PICTURES, "class_names": CLASSES, "source": "pets"}


def small_sincos() -> tuple[ViT, dict[str, Any]]:
    """A classifier whose positions are computed, and of patches alone."""
    network, data = small_vit()
    return ViT(replace(network.config, positions="sincos2d", prefix_positions=0)), data


def small_gpt() -> tuple[GPT, dict[str, Any]]:
    network = GPT(GPTConfig(vocab_size=320, max_length=24, backbone=trunk(mlp="gelu_tanh", norm_eps=1e-5, causal=True)))
    return network, {"tokenizer": words("bpe"), "source": "texts.txt"}


def small_bert() -> tuple[BERT, dict[str, Any]]:
    body = trunk(norm_eps=1e-12, norm_first=False, final_norm=False)
    return BERT(BERTConfig(vocab_size=320, max_length=24, backbone=body)), {"tokenizer": words("wordpiece")}


def small_t5() -> tuple[EncoderDecoder, dict[str, Any]]:
    t5 = trunk(mlp="relu", norm="rmsnorm", norm_eps=1e-6, bias=False, attn_scale=1.0)
    options: dict[str, Any] = {"max_length": 24, "max_target_length": 24, "positions": "relative"}
    scales = {"scale_embeddings": False, "tie_embeddings": True, "scale_output": True}
    config = EncoderDecoderConfig(vocab_size=320, **options, **scales, encoder=t5, decoder=t5)
    return EncoderDecoder(config), {"tokenizer": words("bpe"), "settings": {"start_token": "<|endoftext|>"}}


def small_clip() -> tuple[CLIP, dict[str, Any]]:
    """Pictures and texts with OpenAI's special tokens."""
    from trunkline.datamodules import tokenizers

    ends = ("<|startoftext|>", "<|endoftext|>")
    image, _ = small_vit()
    pictures = replace(image.config, num_classes=0, patch_bias=False, embed_norm=True)
    texts = GPTConfig(vocab_size=320, max_length=24, backbone=trunk(norm_eps=1e-5, causal=True))
    pictures = replace(pictures, backbone=trunk(norm_eps=1e-5))
    words = tokenizers.train_bpe(TEXTS, 300, ends).to_str()
    data = {"tokenizer": words, "preprocessing": {**PICTURES, "crop_pct": 1.0}, "max_length": 24}
    return CLIP(CLIPConfig(image=pictures, bert=None, gpt=texts, dim=8, projection_bias=False)), data


def small_whisper() -> tuple[Whisper, dict[str, Any]]:
    """With positions that are computed, as in training from scratch; clips have three seconds."""
    sounds = {"convention": "whisper", "num_mels": 20, "max_seconds": 3.0, "padding": "fixed"}
    shape = trunk(norm_eps=1e-5)
    config = WhisperConfig(
        vocab_size=320, num_mels=20, max_frames=300, max_target_length=24, encoder=shape, decoder=shape
    )
    data = {
        "tokenizer": words("bpe"),
        "settings": {"start_token": "<|endoftext|>"},
        "log_mel": asdict(LogMel(**sounds)),
    }
    return Whisper(config), data


def small_ast() -> tuple[AST, dict[str, Any]]:
    """With positions inside the tokens, as in training from scratch; clips have half a second."""
    sounds = {"window": "hanning", "num_mels": 20, "max_seconds": 0.5, "padding": "fixed", "mean": -4.0, "std": 9.0}
    config = ASTConfig(num_mels=20, max_frames=50, patch_size=8, stride=5, num_classes=3, backbone=trunk())
    return AST(config), {"class_names": CLASSES, "log_mel": asdict(LogMel(**sounds))}


KINDS = {
    "clip": (
        small_clip,
        "contrastive_image_text.ContrastiveImageText",
        "pairs.image_text_data.ImageTextData",
    ),
    "vit": (small_vit, "image_classifier.ImageClassifier", "images.image_data.ImageData"),
    "vit-sincos": (small_sincos, "image_classifier.ImageClassifier", "images.image_data.ImageData"),
    "bert": (small_bert, "masked_lm.MaskedLM", "text.masked_text.MaskedTextData"),
    "gpt": (small_gpt, "causal_lm.CausalLM", "text.text_data.TextData"),
    "t5": (small_t5, "seq2seq.Seq2Seq", "translation.translation_data.TranslationData"),
    "whisper": (small_whisper, "speech_to_text.SpeechToText", "audio.speech_data.SpeechData"),
    "ast": (small_ast, "audio_classifier.AudioClassifier", "audio.audio_data.AudioData"),
}


def checkpoint_of(kind: str, file: Path, **classes: str) -> Any:
    """Write the checkpoint of a network with random weights, and return the network in evaluation mode.

    Args:
        kind: a key of KINDS.
        file: where to.
        classes: other class paths than those of KINDS.
    """
    make, objective, data = KINDS[kind]
    network, state = make()
    randomise(network, 0.05)
    paths = {
        "objective": f"trunkline.modules.objectives.{objective}",
        "network": f"trunkline.{type(network).__module__.removeprefix('trunkline.')}.{type(network).__name__}",
        "data": f"trunkline.datamodules.{data}",
    }
    content = {
        "global_step": 7,
        "epoch": 2,
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "hyper_parameters": {"network": asdict(network.config)},
        "classes": paths | classes,
        "callbacks": {
            "best": {"monitor": "val/loss", "best_model_score": torch.tensor(0.25)},
            "LastScores": {"step": 7, "val/loss": 0.25, "val/skipped_images": 0.0},
        },
        data.rpartition(".")[2]: state,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return network.eval()
