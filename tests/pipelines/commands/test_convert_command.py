"""`trunkline convert`: folders that our loader, transformers, timm and the hub take."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import tiny
import torch
import transformers
from handed_out import CLASSES, TEXTS, checkpoint_of
from parity import assert_near
from PIL import Image

import trunkline
from trunkline import TrunklineError
from trunkline.datamodules.audio.log_mel import LogMel
from trunkline.files import write_json
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import GPT, GPTConfig, hub
from trunkline.modules.networks.convert.families import save_foreign
from trunkline.modules.networks.lora import LoRAConfig
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.cli import main
from trunkline.pipelines.commands import convert as command

RUN = "runs/small/2026-01-01_00-00-00"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def run(kind: str) -> Any:
    """Write a run's checkpoint and record; returns its network."""
    network = checkpoint_of(kind, Path(RUN, "checkpoints/last.ckpt"))
    versions = {"trunkline": trunkline.__version__}
    write_json(Path(RUN, "record.json"), {"command": "trunkline fit --config small", "versions": versions}, "run_dir")
    return network


def convert(*arguments: str) -> None:
    main(["convert", "--checkpoint", f"{RUN}/checkpoints/last.ckpt", *arguments])


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 31, 3), dtype=np.uint8))


def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def test_a_folder_of_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    network = run("vit")
    convert()
    folder = Path(RUN, "checkpoints/last")
    assert "ViT.from_pretrained loads it" in capsys.readouterr().out
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "model.safetensors", "preprocessing.json", "README.md")
    }
    again = trunkline.load(folder)
    want, image = trunkline.load(f"{RUN}/checkpoints/last.ckpt"), photo()
    assert torch.equal(again.transform(image), want.transform(image))
    with torch.no_grad():
        assert_near(again(again.transform(image)[None]), network(want.transform(image)[None]))
    assert again.companions.class_names == CLASSES
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: trunkline\ntags:\n- trunkline\n- vit\npipeline_tag: image-class")
    for line in ("| data | ImageData pets |", "| steps | 7 |", "| best val/loss | 0.25 |", "| classes | 3: cat, dog,"):
        assert line in card
    assert "| command | `trunkline fit --config small` |" in card
    assert "| val/loss | 0.25 |" in card
    assert "skipped_images" not in card  # a count, no score
    assert f"{sum(p.numel() for p in network.parameters()):,}" in card


def test_vit_for_transformers() -> None:
    network = run("vit")
    convert("--to", "hf")
    folder = f"{RUN}/checkpoints/last-hf"
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    ours = trunkline.load(f"{RUN}/checkpoints/last.ckpt").transform(photo())
    pixels = processor(photo(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], ours, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_near(theirs(pixel_values=pixels).logits, network(pixels))
        found = transformers.pipeline("image-classification", folder)(photo())
    assert {entry["label"] for entry in found} == set(CLASSES)
    again = trunkline.load(folder)
    assert again.companions.class_names == CLASSES
    assert torch.equal(again.transform(photo()), ours)


def test_positions_that_are_computed_become_learned_ones() -> None:
    """Weights that only the other library has are no fault of the files."""
    network = run("vit-sincos")
    convert("--to", "hf", "--output", "out")
    theirs = transformers.AutoModelForImageClassification.from_pretrained("out").eval()
    with torch.no_grad():
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        assert_near(theirs(pixel_values=pixels).logits, network(pixels))


def test_vit_for_timm() -> None:
    network = run("vit")
    convert("--to", "timm", "--output", "out")
    theirs = timm.create_model("local-dir:out", pretrained=True).eval()
    with torch.no_grad():
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        assert_near(theirs(pixels), network(pixels))
    assert theirs.pretrained_cfg["label_names"] == CLASSES
    transform = timm.data.create_transform(**timm.data.resolve_data_config(theirs.pretrained_cfg))
    ours = trunkline.load(f"{RUN}/checkpoints/last.ckpt").transform(photo())
    torch.testing.assert_close(transform(photo()), ours, rtol=1e-5, atol=1e-5)
    again = trunkline.load("out")
    assert torch.equal(again.transform(photo()), ours)
    assert again.companions.class_names == CLASSES


def test_gpt_for_transformers() -> None:
    network = run("gpt")
    convert("--to", "hf", "--output", "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    with torch.no_grad():
        assert_near(theirs(input_ids=tokens()).logits, network(tokens()))
    check_tokenizer("out")
    end = transformers.AutoTokenizer.from_pretrained("out").convert_tokens_to_ids("<|endoftext|>")
    assert theirs.config.eos_token_id == end
    assert 'model = transformers.GPT2LMHeadModel.from_pretrained("' in Path("out/README.md").read_text()


def check_tokenizer(folder: str) -> Any:
    """Theirs, which it returns, and ours make the same tokens of a text, and the same text of them."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), trunkline.load(folder).tokenizer
    numbers = theirs(TEXTS[0])["input_ids"]
    assert numbers == ours.encode(TEXTS[0]).ids
    assert theirs.decode(numbers, skip_special_tokens=True) == ours.decode(numbers)
    return theirs


def test_bert_for_transformers() -> None:
    network = run("bert")
    convert("--to", "hf", "--output", "out")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained("out").eval()
    with torch.no_grad():
        assert_near(theirs(input_ids=tokens()).logits, network(tokens()))
    check_tokenizer("out")
    loaded = transformers.AutoTokenizer.from_pretrained("out")
    tokens_of = loaded.convert_ids_to_tokens
    assert tokens_of(loaded("the lamb")["input_ids"]) == ["[CLS]", "the", "lamb", "[SEP]"]
    pair = loaded("the lamb", "lion")
    assert tokens_of(pair["input_ids"]) == ["[CLS]", "the", "lamb", "[SEP]", "lion", "[SEP]"]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert (loaded.mask_token, loaded.pad_token, loaded.model_max_length) == ("[MASK]", "[PAD]", 24)


def test_t5_for_transformers() -> None:
    network = run("t5")
    convert("--to", "hf", "--output", "out")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained("out").eval()
    with torch.no_grad():
        assert_near(theirs(input_ids=tokens(), decoder_input_ids=tokens()).logits, network(tokens(), tokens()))
    check_tokenizer("out")
    start = transformers.AutoTokenizer.from_pretrained("out").convert_tokens_to_ids("<|endoftext|>")
    assert theirs.config.decoder_start_token_id == start


def waveform() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)


def test_whisper_for_transformers() -> None:
    """Its positions are computed, as in training from scratch; theirs are a table."""
    network = run("whisper")
    convert("--to", "hf", "--output", "out")
    theirs = transformers.AutoModelForSpeechSeq2Seq.from_pretrained("out").eval()
    extractor, words = transformers.AutoFeatureExtractor.from_pretrained("out"), check_tokenizer("out")
    features = extractor(waveform(), sampling_rate=16_000, return_tensors="pt")["input_features"]
    sounds = trunkline.load(f"{RUN}/checkpoints/last.ckpt").companions.sounds
    assert_near(features[0].mT, LogMel(**sounds).features(torch.from_numpy(waveform())), 1e-3)
    with torch.no_grad():
        given = tokens()[:1]
        assert_near(theirs(input_features=features, decoder_input_ids=given).logits, network(features.mT, given))
        assert theirs.config.decoder_start_token_id == words.convert_tokens_to_ids("<|endoftext|>")
        written = transformers.GenerationMixin.generate(theirs, features, max_new_tokens=3, do_sample=False)
    assert written.shape[0] == 1
    again = trunkline.load("out")
    assert again.companions.sounds == sounds
    assert again.companions.start_token == "<|endoftext|>"


def test_ast_for_transformers() -> None:
    """The positions of its tokens are part of them, as in training from scratch; theirs are zero."""
    network = run("ast")
    convert("--to", "hf", "--output", "out")
    theirs = transformers.AutoModelForAudioClassification.from_pretrained("out").eval()
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    extractor = transformers.AutoFeatureExtractor.from_pretrained("out")
    features = extractor(waveform(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    with torch.no_grad():
        assert_near(theirs(features).logits, network(features))
        found = transformers.pipeline("audio-classification", "out")(waveform())
    assert {entry["label"] for entry in found} == set(CLASSES)
    again = trunkline.load("out")
    assert again.companions.sounds == trunkline.load(f"{RUN}/checkpoints/last.ckpt").companions.sounds
    assert again.companions.class_names == CLASSES


@pytest.mark.parametrize("library", ["hf", "open_clip"])
def test_clip(library: str) -> None:
    network = run("clip")
    convert("--to", library, "--output", "out")
    words = transformers.AutoTokenizer.from_pretrained("out")
    texts = words(TEXTS[:2], padding=True, return_tensors="pt")
    numbers = texts["input_ids"]
    assert words.convert_ids_to_tokens(numbers[0])[0] == "<|startoftext|>"
    mask = texts["attention_mask"].bool()
    assert words.convert_ids_to_tokens(numbers[0][mask[0]])[-1] == "<|endoftext|>"
    ours = trunkline.load(f"{RUN}/checkpoints/last.ckpt").transform
    pixels = ours(photo())[None]
    with torch.no_grad():
        want = network(pixels, numbers, mask)
        if library == "hf":
            theirs = transformers.AutoModel.from_pretrained("out").eval()
            found = theirs(input_ids=numbers, attention_mask=mask.long(), pixel_values=pixels)
            assert_near(found.image_embeds, want.image)
            assert_near(found.text_embeds, want.text)
            made = transformers.AutoImageProcessor.from_pretrained("out", backend="pil")
            images = made(photo(), return_tensors="pt")["pixel_values"]
        else:
            theirs, transform = open_clip.create_model_from_pretrained("local-dir:out")
            images = transform(photo())[None]
            made = open_clip.get_tokenizer("local-dir:out")(TEXTS[:2])  # filled up to the full length
            assert torch.equal(made[:, : numbers.shape[1]][mask], numbers[mask])
            assert made.shape == (2, network.config.text.body.max_length)
            assert_near(theirs.encode_text(made, normalize=True), want.text)
            assert_near(theirs.eval().encode_image(pixels, normalize=True), want.image)
    torch.testing.assert_close(images, pixels, rtol=1e-5, atol=1e-5)
    assert torch.equal(trunkline.load("out").transform(photo()), pixels[0])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        convert(*arguments)
    assert error.value.code
    return capsys.readouterr().err


def test_what_the_other_library_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt")
    assert "timm has no model that a GPT could become" in refusal(capsys, "--to", "timm")
    assert not Path(RUN, "checkpoints/last-timm").exists()
    assert "keras" in refusal(capsys, "--to", "keras")


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt")
    Path("out").mkdir()
    Path("out/README.md").write_text("mine")
    convert("--output", "out")
    assert Path("out/README.md").read_text() == "mine"
    assert "out holds config.json and model.safetensors already" in refusal(capsys, "--output", "out")


def test_files_that_hold_something_else_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = run("gpt")
    save = command.save_foreign

    def faulty(given: Any, *arguments: Any, **named: Any) -> Any:
        result = save(given, *arguments, **named)
        next(given.parameters()).data[0] += 1
        return result

    monkeypatch.setattr(command, "save_foreign", faulty)
    with pytest.raises(TrunklineError, match=r"out does not hold the weights of the checkpoint: \S+ differs"):
        command.convert(f"{RUN}/checkpoints/last.ckpt", "out", "hf")
    assert network.config.vocab_size == 320


# --- the hub


class FakeHub:
    """What `HfApi` does, without a network."""

    def __init__(self) -> None:
        self.token, self.created, self.uploaded, self.error = "", {}, {}, None  # type: ignore[var-annotated]

    def __call__(self, token: str) -> "FakeHub":
        self.token = token
        return self

    def create_repo(self, name: str, private: bool | None, exist_ok: bool) -> Any:
        if self.error:
            raise OSError(self.error)
        self.created = {"name": name, "private": private, "exist_ok": exist_ok}

        class Address(str):
            repo_id = f"me/{name}" if "/" not in name else name

        return Address(f"https://hub/{Address.repo_id}")

    def upload_folder(self, repo_id: str, folder_path: Any, commit_message: str) -> None:
        self.uploaded = {repo_id: sorted(file.name for file in Path(folder_path).iterdir())}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    return fake


def test_a_tokenizer_for_open_clip_on_the_hub(fake_hub: FakeHub) -> None:
    """There it is looked for in the repository that the configuration names."""
    run("clip")
    convert("--to", "open_clip", "--output", "out", "--push_to_hub", "me/small")
    content = json.loads(Path("out/open_clip_config.json").read_text())
    assert content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/small"


def test_push_to_hub(fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt")
    convert("--to", "hf", "--output", "out", "--push_to_hub", "me/small")
    assert "https://hub/me/small" in capsys.readouterr().out
    files = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert fake_hub.uploaded == {"me/small": files}
    assert fake_hub.token == "secret"
    network = trunkline.load(f"{RUN}/checkpoints/last.ckpt")
    assert network.push_to_hub("small", private=True, token="other") == "https://hub/me/small"
    assert fake_hub.created == {"name": "small", "private": True, "exist_ok": True}
    assert fake_hub.token == "other"
    assert fake_hub.uploaded == {"me/small": [name for name in files if name != "tokenizer_config.json"]}


@pytest.mark.parametrize("name", ["a/b/c", "", "me/", "a b", "../up", "me/x--y", "me/x.git"])
def test_bad_names_of_repositories(name: str, fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    run("gpt")
    assert f"'{name}' is no name of a repository on the hub" in refusal(
        capsys, "--output", "out", "--push_to_hub", name
    )
    assert not Path("out").exists()  # nothing is written before the name is known to be bad


def test_a_hub_that_cannot_be_used(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    network = run("gpt")
    fake_hub.error = "403 Forbidden"
    with pytest.raises(TrunklineError, match="the hub did not take the upload to me/x: 403 Forbidden"):
        network.push_to_hub("me/x")
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(TrunklineError, match="cannot upload to me/x: the Hugging Face hub cannot be reached"):
        network.push_to_hub("me/x")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(TrunklineError, match="there is no token of the Hugging Face hub; set HF_TOKEN"):
        network.push_to_hub("me/x")
    assert fake_hub.uploaded == {}


def test_the_configuration_names_their_class() -> None:
    names = {"t5": "T5ForConditionalGeneration", "bert": "BertForMaskedLM", "ast": "ASTForAudioClassification"}
    for kind, name in names.items():
        run(kind)
        convert("--to", "hf", "--output", kind)
        assert json.loads(Path(kind, "config.json").read_text())["architectures"] == [name]


def test_adapters_for_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run with LoRA; all other commands see a network without adapters."""
    import peft

    config = GPTConfig(11, 8, backbone=TransformerConfig(16, 1, 2, causal=True, mlp="gelu_tanh"))
    GPT(config).save_pretrained("start")
    save_foreign(GPT.from_pretrained("start"), "theirs", "transformers", {"eos_token_id": 1})
    model = CausalLM(config, init_from="start", lora=LoRAConfig(2))
    ids = torch.randint(0, 11, (2, 8))
    batch = {"tokens": ids, "targets": ids, "document": torch.ones_like(ids)}
    trainer = tiny.trainer(tmp_path, max_steps=3, plugins=[SafeCheckpointIO()])
    trainer.fit(model, torch.utils.data.DataLoader([batch] * 3, batch_size=None))  # type: ignore[arg-type]
    trainer.save_checkpoint(Path(RUN, "checkpoints/last.ckpt"))
    convert("--to", "peft")
    learning = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    assert f"peft loads it for a GPT-2; {learning:,} weights of step 3" in capsys.readouterr().out
    with torch.no_grad():
        base = transformers.GPT2LMHeadModel.from_pretrained("theirs")
        before, want = base(ids).logits, model.network.eval()(ids)
        tuned = peft.PeftModel.from_pretrained(base, f"{RUN}/checkpoints/last-peft").eval()
        torch.testing.assert_close(tuned(ids).logits, want, rtol=1e-5, atol=1e-5)
        assert (want - before).abs().max() > 1e-3
        convert()
        merged = GPT.from_pretrained(f"{RUN}/checkpoints/last").eval()
        torch.testing.assert_close(merged(ids), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        convert("--to", "peft")
    assert "holds adapter_config.json and adapter_model.safetensors" in capsys.readouterr().err
