"""Which path the batches of each recipe would take through attention on a GPU."""

import contextlib
from typing import Any

import pytest
import torch
from pretended_gpu import Decision, pretend_gpu
from torch import Tensor

from trunkline.contract import DataFacts
from trunkline.modules.backbone import Transformer
from trunkline.modules.training.compiling import let_sizes_vary

PLAIN, PADDED, BIASED = ("none", "unmasked"), ("tokens", "masked"), ("scores", "masked")
PATHS = {
    "audio/digits": [PADDED],  # a block
    "audio/librispeech_ctc": [PADDED],  # dropout
    "audio/speech_commands": [PADDED],  # a block
    "bert/classify": [PADDED],  # dropout
    "bert/classify_demo": [PADDED],  # dropout
    "bert/squad": [PADDED],  # dropout
    "bert/tagging": [PADDED],  # dropout
    "clip/emoji": [PLAIN, PADDED],  # dropout
    "clip/shared_trunk": [PLAIN, PADDED],  # a block
    "clip/siglip_b16": [PLAIN, PADDED],  # a block
    "seq2seq/dates": [PADDED, PLAIN],  # a block
    "seq2seq/phrases": [PADDED, PLAIN],  # a block
    "seq2seq/summarise": [BIASED, BIASED],
    "seq2seq/t5_small_c4": [BIASED, BIASED],
    "seq2seq/transformer_base_wmt": [PADDED, PLAIN],  # dropout
}
"""Kind of mask and path of the calls of trunks in a step, and why flex attention does not take padding: dropout, or
rows of no more tokens than a block of scores has. In the other recipes no trunk sees a mask."""
SKIPPED = ("tokens", "flex")
FIELDS = {
    "ImageData": "image label",
    "TextData": "tokens targets",
    "MaskedTextData": "tokens positions targets",
    "LabelledTextData": "tokens mask label",
    "TaggedTextData": "tokens mask targets",
    "SquadData": "tokens segment mask start end",
    "ImageTextData": "image tokens mask caption_key",
    "TranslationData": "tokens mask target_tokens targets",
    "SpanCorruptionData": "tokens target_tokens targets",
    "AudioData": "features mask label",
    "SpeechData": "features mask targets target_tokens",
}
"""What a batch of each kind of data holds for the loss; running text is padded nowhere."""


def batch_of(data: Any, facts: DataFacts) -> dict[str, Tensor]:
    """Two rows on no device, of the recipe's sizes."""
    names = FIELDS[type(data).__name__].split()
    names += ["document"] * (getattr(data, "packing", None) == "documents")
    length, size = facts.max_length or 64, facts.image_size
    if "features" in names:
        length = 128 if (frames := data.log_mel.max_frames) is None else frames
        names = [name for name in names if name != "mask" or data.log_mel.padding == "batch"]
    rows = dict.fromkeys(("label", "start", "end", "caption_key"), (2,))
    few = dict.fromkeys(("positions", "targets", "target_tokens"), (2, 8))
    shapes: dict[str, Any] = {**rows, **few, "image": (2, facts.channels, size, size)}
    if "target_tokens" not in names and "positions" not in names:
        del shapes["targets"]
    shapes["features"] = (2, length, facts.num_mels)
    types = {"mask": torch.bool, "image": torch.float32, "features": torch.float32}
    return {
        name: torch.zeros(shapes.get(name, (2, length)), dtype=types.get(name, torch.int64), device="meta")
        for name in names
    }


def paths_of(model: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """Kinds of masks and paths of a training step in bfloat16, compiled, without computing anything.

    Compiled in earnest where the sizes of batches vary. One block of each trunk is left: all take the same path.
    """
    seen = pretend_gpu(monkeypatch, run=False, traced=True)
    batch = batch_of(data, data.facts)
    model.to("meta").train()
    for trunk in [module for module in model.network.modules() if isinstance(module, Transformer)]:
        del trunk.blocks[1:]
    if data.facts.ragged:
        torch._dynamo.reset()
        model.network.compile(backend="eager", fullgraph=True)
        let_sizes_vary(batch)
    with contextlib.suppress(RuntimeError):  # some losses need a device, but they come after the network
        model.loss(batch)
    return seen
