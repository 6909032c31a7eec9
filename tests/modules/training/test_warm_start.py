"""Freezing, and starting from trained weights."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import batches, classifier, fit, vit, weights

import trunkline
from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import GPT, GPTConfig, ViT
from trunkline.modules.objectives.audio_classifier import AudioClassifier
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.seq2seq import Seq2Seq
from trunkline.modules.objectives.speech_to_text import SpeechToText
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.warm_start import TrainedWeights, network_class_of
from trunkline.seal import seal

BLOCKS_1_2 = ("backbone.blocks.1.", "backbone.blocks.2.", "backbone.norm.")


@pytest.mark.parametrize(
    ("blocks", "pool", "learning"),
    [
        (0, "cls", ("",)),
        (1, "cls", (*BLOCKS_1_2, "head.")),
        (1, "map", (*BLOCKS_1_2, "head.", "attn_pool.")),
        (3, "mean", ("head.",)),
        (7, "map", ("head.", "attn_pool.")),
    ],
)
def test_exactly_what_is_not_frozen_learns(tmp_path: Path, blocks: int, pool: Any, learning: tuple[str, ...]) -> None:
    model = classifier(vit(depth=3, pool=pool, num_registers=2), freeze_blocks=blocks)
    before = weights(model)
    assert fit(model, tmp_path, batches(2)).global_step == 2
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(learning)}


@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_frozen_parts_do_not_drop_and_the_others_do(rate: str) -> None:
    def modes(blocks: int) -> dict[str, bool]:
        model = classifier(vit(depth=3, **{rate: 0.5}), freeze_blocks=blocks).eval().train()
        return {name: module.training for name, module in model.network.named_modules()}

    assert all(modes(0).values())
    frozen = ("patch_embed", "embed_norm", "dropout", "backbone.blocks.0")
    assert {name for name, training in modes(1).items() if not training} == {
        name for name in modes(1) if name.startswith(frozen)
    }
    assert {name for name, training in modes(3).items() if training} == {"", "head"}
    image = torch.randn(64, 1, 8, 8)
    for blocks, same in ((0, False), (1, False), (3, True)):
        model = classifier(vit(depth=3, **{rate: 0.5}), freeze_blocks=blocks)
        assert torch.equal(model(image), model(image)) == same
        assert torch.equal(model.train().network.embed(image), model.network.embed(image)) == (
            blocks > 0 or rate == "drop_path"
        )


# --- starting from trained weights


@pytest.fixture(params=["folder", "checkpoint", "run"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ImageClassifier, str]:
    """A trained classifier and where it is saved."""
    model = classifier()
    fitted = fit(model, tmp_path, batches(2))
    if request.param == "folder":
        model.network.save_pretrained(tmp_path / "vit")
        return model, str(tmp_path / "vit")
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    if request.param == "run":
        SafeCheckpointIO().save_checkpoint(load_checkpoint(tmp_path / "a.ckpt"), tmp_path / "run/checkpoints/last.ckpt")
        return model, str(tmp_path / "run")
    return model, str(tmp_path / "a.ckpt")


def test_init_from(saved: tuple[ImageClassifier, str]) -> None:
    source, name = saved
    model = ImageClassifier(vit(), init_from=name)
    torch.testing.assert_close(weights(model), weights(source), rtol=0, atol=0)
    # Another image size and another number of classes: positions are interpolated, the head stays as it was made.
    model, want = ImageClassifier(vit(image_size=(12, 16), num_classes=3), init_from=name), weights(source)
    positions = want.pop("pos_embed").reshape(1, 2, 2, 16).permute(0, 3, 1, 2)
    resized = F.interpolate(positions, (3, 4), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 12, 16)
    want |= {"pos_embed": resized, "head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}
    torch.testing.assert_close(weights(model), want, rtol=0, atol=1e-6)
    assert model(torch.zeros(2, 1, 12, 16)).shape == (2, 3)
    assert model.network.config.num_classes == 3
    with pytest.raises(
        TrunklineError, match=r"init_from .* does not fit: .* is \(.*16.*\) there and \(.*32.*\) here"
    ) as e:
        ImageClassifier(vit(dim=32), init_from=name)
    assert e.value.field == "model.init_from"
    with pytest.raises(TrunklineError, match=r"backbone\.blocks\.2.* is missing there.*; give network the sizes") as e:
        ImageClassifier(vit(depth=3), init_from=name)
    assert e.value.field == "model.init_from"
    trunk = dataclasses.replace(vit().backbone, num_heads=4)  # no weight tells their number
    with pytest.raises(
        TrunklineError, match=r"num_heads=2, but the network has 4; set network\.backbone\.num_heads to 2"
    ):
        ImageClassifier(dataclasses.replace(vit(), backbone=trunk), init_from=name)


# --- what network a checkpoint holds


class OwnViT(ViT):
    """Of someone else's code."""


OWN, THEIRS = f"{OwnViT.__module__}.OwnViT", "trunkline.modules.networks.vit.ViT"


@pytest.mark.parametrize(
    ("content", "known", "want"),
    [
        ({"classes": {"network": THEIRS}}, (), ViT),
        ({"classes": {"network": THEIRS}, "objective": "OwnClassifier"}, (), ViT),
        ({"objective": "ImageClassifier"}, (), ViT),  # from before checkpoints named their network
        ({"classes": {"network": OWN}}, (OwnViT,), OwnViT),
        ({"classes": {"network": OWN}}, (ViT,), None),  # nothing is imported to find it
        ({"classes": {"network": "trunkline.modules.networks.no.Such"}}, (), None),
        ({"objective": "OwnClassifier"}, (OwnViT,), None),
        ({}, (), None),
    ],
)
def test_network_class_of_a_checkpoint(content: dict[str, Any], known: tuple[Any, ...], want: type | None) -> None:
    assert network_class_of(content, known) is want


def test_a_checkpoint_says_what_it_is_of(tmp_path: Path) -> None:
    model = classifier()
    fit(model, tmp_path, batches(1)).save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["objective"] == "ImageClassifier"
    objective = "trunkline.modules.objectives.image_classifier.ImageClassifier"
    assert content["classes"] == {"objective": objective, "network": THEIRS}  # no datamodule, so none is named


@pytest.mark.parametrize(
    ("content", "found"),
    [({"objective": "CausalLM"}, "a GPT"), ({"objective": "Own"}, "weights of Own"), ({}, "weights of something else")],
)
def test_weights_of_another_network_are_refused(content: dict[str, Any], found: str, tmp_path: Path) -> None:
    SafeCheckpointIO().save_checkpoint({**content, "hyper_parameters": {"network": {}}}, tmp_path / "a.ckpt")
    message = rf"^init_from .*a\.ckpt holds {found}; give a checkpoint or a folder of ViT or CLIP$"
    with pytest.raises(TrunklineError, match=message) as caught:
        ImageClassifier(vit(), init_from=str(tmp_path / "a.ckpt"))
    assert caught.value.field == "model.init_from"


class OwnNet(GPT):
    """A network of one's own."""


def test_a_folder_of_ones_own_network(tmp_path: Path) -> None:
    OwnNet(GPTConfig(11, 8, backbone=TransformerConfig(dim=8, depth=1, num_heads=1))).save_pretrained(tmp_path)
    weights = TrainedWeights.read(str(tmp_path), "init_from", (OwnNet,))
    assert weights.network_class is OwnNet
    assert isinstance(weights.network(), OwnNet)


def test_a_foreign_class_is_not_taken_for_another() -> None:
    content = {"classes": {"network": "mine.Net"}, "objective": "CausalLM"}
    assert network_class_of(content) is None
    assert network_class_of({"objective": "CausalLM"}) is GPT


@pytest.mark.parametrize("name", ["bart", "marian", "whisper", "ast"])
def test_init_from_files_of_transformers(name: str, tmp_path: Path) -> None:
    """A recipe that states what the files have begins with their weights; a network that differs is refused."""
    theirs: dict[str, tuple[Any, Any, type[Any]]] = {
        "bart": (transformers.BartForConditionalGeneration, SMALL_PAIR, Seq2Seq),
        "marian": (transformers.MarianMTModel, SMALL_PAIR, Seq2Seq),
        "whisper": (
            transformers.WhisperForConditionalGeneration,
            SMALL_PAIR | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 9},
            SpeechToText,
        ),
        "ast": (
            transformers.ASTForAudioClassification,
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
            | {"num_mel_bins": 16, "max_length": 24, "patch_size": 8, "time_stride": 5, "frequency_stride": 5},
            AudioClassifier,
        ),
    }
    model, sizes, objective = theirs[name]
    model(model.config_class(**sizes)).save_pretrained(tmp_path)
    want = trunkline.load(tmp_path)
    network = objective(want.config, init_from=str(tmp_path)).network
    torch.testing.assert_close(network.state_dict(), want.state_dict(), rtol=0, atol=0)
    trunk = "backbone" if name == "ast" else "encoder"
    other = {trunk: dataclasses.replace(getattr(want.config, trunk), mlp_dim=40)}
    with pytest.raises(TrunklineError, match="init_from"):
        objective(dataclasses.replace(want.config, **other), init_from=str(tmp_path))


SMALL_PAIR = {
    **{"vocab_size": 30, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 12},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
}


# --- a plain network


def test_a_network_from_a_checkpoint(tmp_path: Path) -> None:
    model = classifier()
    fit(model, tmp_path, batches(2)).save_checkpoint(tmp_path / "a.ckpt")
    network = ViT.from_checkpoint(tmp_path / "a.ckpt")
    assert network.config == model.network.config
    torch.testing.assert_close(network.state_dict(), model.network.state_dict(), rtol=0, atol=0)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes())
    seal(tmp_path / "run/checkpoints/last.ckpt")
    assert ViT.from_checkpoint(tmp_path / "run").config == network.config
    with pytest.raises(TrunklineError, match=r"a\.ckpt holds a ViT, not a GPT; load it with ViT\.from_checkpoint$"):
        GPT.from_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(TrunklineError, match="there is no checkpoint"):
        ViT.from_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(TrunklineError, match=r"a\.ckpt is a file, .* with from_checkpoint, and convert other"):
        ViT.from_pretrained(tmp_path / "a.ckpt")


KINDS = {
    "AudioClassifier": "AST",
    "CausalLM": "GPT",
    "ContrastiveImageText": "CLIP",
    "ImageClassifier": "ViT",
    "MaskedLM": "BERT",
    "Seq2Seq": "EncoderDecoder",
    "SpeechRecognizer": "SpeechEncoder",
    "SpeechToText": "Whisper",
    "TextClassifier": "TextHead",
}
"""Objective -> network, of checkpoints of older versions."""
FIXTURES = Path(__file__).parents[2] / "fixtures/checkpoints"


def test_every_network_loads_without_lightning() -> None:
    """From a checkpoint, in a process in which nothing but torch may be imported."""
    code = f"""
import sys
for name in ("lightning", "pandas", "datasets", "torchvision", "torchmetrics", "tokenizers"):
    sys.modules[name] = None
from trunkline.modules import networks
kinds = {KINDS!r}
for objective, kind in kinds.items():
    network = getattr(networks, kind).from_checkpoint(f"{FIXTURES}/{{objective}}.ckpt")
    print(type(network).__name__, sum(p.numel() for p in network.parameters()) > 0)
"""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{kind} True" for kind in KINDS.values()], done.stderr
