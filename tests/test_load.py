"""`trunkline.load`: any network, with what goes with it, and nothing imported that is not needed."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from handed_out import CLASSES, TEXTS, checkpoint_of
from parity import randomise
from PIL import Image

import trunkline
from trunkline import TrunklineError
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.modules.networks.convert.companion_files import companions_from_theirs
from trunkline.modules.networks.convert.feature_extractors import extractor_settings

ROOT = Path(__file__).parents[1]


def photo(width: int = 57) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["vit", "gpt", "bert", "t5"])
def test_checkpoint_run_and_folder(kind: str, tmp_path: Path) -> None:
    """All of them give the same network with the same things."""
    file = tmp_path / "runs/small/2026-01-01_00-00-00/checkpoints/last.ckpt"
    want = checkpoint_of(kind, file).state_dict()
    first = trunkline.load(file)
    first.save_pretrained(tmp_path / "folder")
    for network in (first, trunkline.load(str(tmp_path / "folder"))):
        assert not network.training
        assert network.state_dict().keys() == want.keys()
        assert all(torch.equal(value, want[name]) for name, value in network.state_dict().items())
        if kind == "vit":
            assert network.tokenizer is None
            assert network.companions.class_names == CLASSES
            assert network.transform(photo()).shape == (3, 16, 16)
        else:
            assert network.transform is None
            assert network.tokenizer.encode(TEXTS[0]).tokens == first.tokenizer.encode(TEXTS[0]).tokens
            assert network.companions.target_tokenizer is network.tokenizer
    assert network.companions.start_token == ("<|endoftext|>" if kind == "t5" else None)


OTHERS = (
    *("PIL", "datasets", "huggingface_hub", "lightning", "matplotlib", "open_clip", "pandas", "peft", "pyarrow"),
    *("safetensors", "sklearn", "tensorboard", "timm", "tokenizers", "torchmetrics", "torchvision", "transformers"),
    *("trunkline.datamodules", "trunkline.modules.objectives", "trunkline.pipelines", "yaml"),
)
LIGHT = """
import sys
import torch
import trunkline
assert not any(name.startswith("trunkline.") for name in sys.modules)
network = trunkline.load(sys.argv[1])
print(type(network).__name__, network.transform is None, *(name for name in sys.argv[2:] if name in sys.modules))
print(network.tokenizer is None, "tokenizers" in sys.modules)
"""


def test_nothing_more_is_imported(tmp_path: Path) -> None:
    """Torch, and safetensors for folders; the tokenizers library when the tokenizer is asked for."""
    trunkline.load(checkpoint_file("vit", tmp_path)).save_pretrained(tmp_path / "vit")
    trunkline.load(checkpoint_file("gpt", tmp_path)).save_pretrained(tmp_path / "gpt")
    for source, words in {
        "vit.ckpt": ["ViT False", "True False"],
        "vit": ["ViT False safetensors", "True False"],
        "gpt": ["GPT True safetensors", "False True"],
    }.items():
        command = [sys.executable, "-c", LIGHT, str(tmp_path / source), *OTHERS]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        assert done.stdout.splitlines() == words


def checkpoint_file(kind: str, folder: Path) -> Path:
    checkpoint_of(kind, folder / f"{kind}.ckpt")
    return folder / f"{kind}.ckpt"


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    checkpoint_of("vit", tmp_path / "own.ckpt", network="mine.networks.Tree")
    with pytest.raises(
        TrunklineError, match=r"own\.ckpt holds a mine\.networks\.Tree, which is no .*; import the class"
    ):
        trunkline.load(tmp_path / "own.ckpt")
    checkpoint_of("vit", tmp_path / "os.ckpt", network="trunkline.modules.networks.base.nn")
    with pytest.raises(TrunklineError, match="which is no network of Trunkline's"):
        trunkline.load(tmp_path / "os.ckpt")


def test_a_datamodule_of_ones_own_may_keep_other_things(tmp_path: Path) -> None:
    content = torch.load(checkpoint_file("vit", tmp_path), weights_only=True)
    content["ImageData"] = {"preprocessing": 3, "tokenizer": [1], "class_names": "none", "settings": 1, "log_mel": ""}
    content["callbacks"] = [1]
    torch.save(content, tmp_path / "other.ckpt")
    companions = trunkline.load(tmp_path / "other.ckpt").companions
    assert (companions.transform, companions.tokenizer_json, companions.class_names) == (None, None, None)
    content["ImageData"] = 3
    torch.save(content, tmp_path / "other.ckpt")
    assert trunkline.load(tmp_path / "other.ckpt").transform is None


def test_an_old_checkpoint_says_how_to_load_it() -> None:
    with pytest.raises(TrunklineError, match=r"of an old version .* such as ViT\.from_checkpoint"):
        trunkline.load(ROOT / "tests/fixtures/checkpoints/ImageClassifier.ckpt")


def test_what_holds_no_network(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrunklineError, match="holds no checkpoint of a run"):
        trunkline.load(tmp_path / "empty")
    with pytest.raises(TrunklineError, match=r"'.*missing/folder' is no folder; fix the path"):
        trunkline.load(str(tmp_path / "missing/folder"))
    with pytest.raises(TrunklineError, match=r"missing\.ckpt"):
        trunkline.load(tmp_path / "missing.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(TrunklineError, match=r"bare\.ckpt is not a checkpoint of a Trunkline run"):
        trunkline.load(tmp_path / "bare.ckpt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("preprocessing.json", "{", r"preprocessing\.json does not say how inputs are prepared"),
        (
            "preprocessing.json",
            '{"pictures": {"size": 3}}',
            r"preprocessing\.json does not say how inputs are prepared",
        ),
        ("preprocessing.json", "[]", r"preprocessing\.json does not say"),
    ],
)
def test_damaged_companions(name: str, content: str, message: str, tmp_path: Path) -> None:
    trunkline.load(checkpoint_file("vit", tmp_path)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / name).write_text(content)
    with pytest.raises(TrunklineError, match=message):
        trunkline.load(tmp_path / "vit")


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    trunkline.load(checkpoint_file("gpt", tmp_path)).save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt/tokenizer.json").write_text("{}")
    network = trunkline.load(tmp_path / "gpt")  # which needs no tokenizer
    with pytest.raises(TrunklineError, match=r"tokenizer in .*tokenizer\.json is none of the tokenizers library"):
        _ = network.tokenizer


# --- foreign folders


def vit_folder(folder: Path, processor: Any) -> Any:
    """A classifier of transformers with an image processor."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: n for n, name in enumerate(CLASSES)}}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes, **labels)
    randomise(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return trunkline.load(folder)


@pytest.mark.parametrize(
    ("processor", "options"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 16, "width": 16}}),
        (
            "CLIPImageProcessorPil",
            {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3]},
        ),
    ],
)
def test_image_processors_of_transformers(processor: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = getattr(transformers, processor)(**options)
    network = vit_folder(tmp_path, theirs)
    want = theirs(photo(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(network.transform(photo()), want, rtol=1e-5, atol=1e-5)
    assert network.companions.class_names == CLASSES


SQUARE, CUT = {"height": 16, "width": 16}, {"crop_size": {"height": 16, "width": 16}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": SQUARE},
    "DeiT": {"size": {"height": 20, "width": 20}, **CUT},
    "CLIP": {"size": {"shortest_edge": 20}, **CUT},
    "Bit": {"size": {"shortest_edge": 20}, **CUT},
    "Siglip": {"size": SQUARE},
}
LEFT_OUT = (
    "resample",
    "size",
    "crop_size",
    "do_center_crop",
    "do_resize",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
)


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize(
    ("without", "options"),
    [
        *[((name,), {}) for name in LEFT_OUT],
        ((), {"rescale_factor": 1 / 127.5}),
        (LEFT_OUT, {"size": 20, "crop_size": 16}),  # as in older files
        (("image_processor_type",), {"feature_extractor_type": "{kind}FeatureExtractor"}),
        (("image_processor_type", "resample"), {}),
    ],
    ids=str,
)
def test_settings_that_files_leave_out(
    kind: str, without: tuple[str, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    """They are those of the processor that the file names, or if it names none, of the model's."""
    processor = getattr(transformers, f"{kind}ImageProcessorPil")
    processor(**PROCESSORS[kind]).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name not in without}
    options = {name: value.format(kind=kind) if isinstance(value, str) else value for name, value in options.items()}
    file.write_text(json.dumps(kept | options))
    model = {"Bit": "dinov2"}.get(kind, kind.lower())
    transform = companions_from_theirs(tmp_path, {"model_type": model}, "transformers").transform
    if kind == "Siglip" and isinstance(options.get("size"), int):
        assert transform is None  # the longer side stays as it is
        return
    assert transform is not None
    picture = photo(60)  # cut at whole pixels: the two kinds of processors that they have round halves differently
    want = processor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(picture), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"image_processor_type": "OtherImageProcessor"}, {"size": {"longest_edge": 16}}, {"do_resize": False}]
)
def test_other_preparations_of_transformers_are_left_out(options: dict[str, Any], tmp_path: Path) -> None:
    transformers.CLIPImageProcessorPil(**PROCESSORS["CLIP"]).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    assert companions_from_theirs(tmp_path, {"model_type": "clip"}, "transformers").transform is None


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_preprocessing_of_open_clip(resize_mode: str, tmp_path: Path) -> None:
    settings: Any = {"size": 16, "mean": [0.1, 0.2, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    config = open_clip.transform.PreprocessCfg(**settings, resize_mode=resize_mode)
    theirs = open_clip.transform.image_transform_v2(config, is_train=False)
    content = {"preprocess_cfg": settings | {"resize_mode": resize_mode}}
    transform = companions_from_theirs(tmp_path, content, "open_clip").transform
    assert transform is not None
    torch.testing.assert_close(transform(photo()), theirs(photo()), rtol=1e-5, atol=1e-5)


def test_pictures_with_borders_are_left_out(tmp_path: Path) -> None:
    """Better no transform than a wrong one."""
    content = {"preprocess_cfg": {"size": 16, "mean": [0.1] * 3, "std": [0.2] * 3, "resize_mode": "longest"}}
    assert companions_from_theirs(tmp_path, content, "open_clip").transform is None
    timm_content = {"pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0] * 3, "std": [1] * 3, "crop_mode": "border"}}
    assert companions_from_theirs(tmp_path, timm_content, "timm").transform is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80}))  # of sounds
    assert companions_from_theirs(tmp_path, {}, "transformers").transform is None
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(TrunklineError, match=r"preprocessor_config\.json does not say how inputs are prepared"):
        companions_from_theirs(tmp_path, {}, "transformers")


def test_settings_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"does not say how inputs are prepared: KeyError\('size'\)"):
        companions_from_theirs(tmp_path, {"preprocess_cfg": {"mean": [0.1] * 3}}, "open_clip")


# --- sounds


def sound() -> np.ndarray:
    """1.7 seconds at 16 kHz."""
    noise = np.random.default_rng(0).normal(0, 0.1, 27_200)
    return (noise + 0.3 * np.sin(np.arange(27_200) / 9)).astype(np.float32)


def same_features(extractor: Any, sounds: dict[str, Any]) -> None:
    """A `LogMel` with these fields makes the features of an extractor of transformers."""
    (want,) = extractor(sound(), sampling_rate=16_000, return_tensors="pt").values()
    want = want[0].mT if isinstance(extractor, transformers.WhisperFeatureExtractor) else want[0]
    torch.testing.assert_close(LogMel(**sounds).features(torch.from_numpy(sound())), want, rtol=1e-3, atol=1e-3)


WHISPER_EXTRACTOR = transformers.WhisperFeatureExtractor
AST_EXTRACTOR = transformers.ASTFeatureExtractor


@pytest.mark.parametrize(
    "extractor",
    [
        WHISPER_EXTRACTOR(feature_size=20, chunk_length=2),
        WHISPER_EXTRACTOR(feature_size=24, chunk_length=1, n_fft=321, hop_length=150),
        AST_EXTRACTOR(num_mel_bins=20, max_length=200),
        AST_EXTRACTOR(num_mel_bins=24, max_length=33, mean=1.0, std=0.3),
        AST_EXTRACTOR(num_mel_bins=20, max_length=200, do_normalize=False),
    ],
    ids=["whisper", "whisper-others", "ast", "ast-others", "ast-raw"],
)
@pytest.mark.parametrize("processor", [False, True], ids=["extractor", "processor"])
def test_feature_extractors_of_transformers(extractor: Any, processor: bool, tmp_path: Path) -> None:
    extractor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    if processor:  # the file that version 5 writes for a processor
        content = {"feature_extractor": json.loads(file.read_text()), "processor_class": "WhisperProcessor"}
        file.rename(tmp_path / "processor_config.json").write_text(json.dumps(content))
    found = companions_from_theirs(tmp_path, {}, "transformers")
    assert found.transform is None
    assert found.sounds is not None
    same_features(extractor, found.sounds)
    assert found.sounds.keys() == asdict(LogMel()).keys()
    kind = "whisper" if isinstance(extractor, WHISPER_EXTRACTOR) else "audio-spectrogram-transformer"
    again = type(extractor)(**extractor_settings(found.sounds, kind))
    same_features(again, found.sounds)


@pytest.mark.parametrize(
    "extractor",
    [
        WHISPER_EXTRACTOR(dither=0.1),
        WHISPER_EXTRACTOR(sampling_rate=8000),
        AST_EXTRACTOR(padding_value=1.0),
        transformers.Wav2Vec2FeatureExtractor(),
    ],
)
def test_extractors_that_hear_otherwise_are_left_out(extractor: Any, tmp_path: Path) -> None:
    extractor.save_pretrained(tmp_path)
    assert companions_from_theirs(tmp_path, {}, "transformers").sounds is None


@pytest.mark.parametrize("change", [{"padding": "batch"}, {"per_clip": "mean"}, {"max_seconds": 1.5}, {"mean": 0.1}])
def test_sounds_that_no_extractor_hears_are_left_out(change: dict[str, Any]) -> None:
    sounds = asdict(LogMel(convention="whisper", padding="fixed"))
    assert extractor_settings(sounds, "whisper")["chunk_length"] == 30
    assert extractor_settings(sounds, "audio-spectrogram-transformer") == {}
    assert extractor_settings(sounds, "bert") == {}
    assert extractor_settings(sounds | change, "whisper") == {}
    del sounds["num_mels"]
    assert extractor_settings(sounds, "whisper") == {}


def test_the_start_token_of_a_foreign_decoder(tmp_path: Path) -> None:
    words = {"added_tokens": [{"id": 0, "content": "<pad>"}, {"id": 7, "content": "<begin>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))

    def found(number: int | None) -> str | None:
        return companions_from_theirs(tmp_path, {"decoder_start_token_id": number}, "transformers").start_token

    assert [found(7), found(0), found(3), found(None)] == ["<begin>", "<pad>", None, None]
    (tmp_path / "tokenizer.json").write_text("[")
    assert found(7) is None  # who asks for the tokenizer is told that it is damaged
