"""Training with LoRA: what learns and what does not, small checkpoints that everything reads, exact resume."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

import trunkline
from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import CLIP, GPT, CLIPConfig, GPTConfig, ViT, ViTConfig
from trunkline.modules.networks.lora import LoRAConfig, is_adapted
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training.background_saves import BackgroundCheckpointIO
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.lora_runs import check_same_lora
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.modules.training.sharding import ShardedStrategy
from trunkline.pipelines.trained import Trained

IMAGES = [{**batch, "valid": torch.ones(4, dtype=torch.bool)} for batch in tiny.batches(6)]


@pytest.fixture
def start(tmp_path: Path) -> str:
    """A trained network, in files."""
    torch.manual_seed(7)
    network = ViT(tiny.vit(dropout=0.2))
    torch.nn.init.normal_(network.head.weight)
    network.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def classifier(start: str | None, rank: int | None = 2, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    lora = LoRAConfig(rank, dropout=0.2) if rank else None
    optimizer = OptimizerConfig(lr=0.01, schedule="constant", warmup=0)
    return ImageClassifier(tiny.vit(dropout=0.2), init_from=start, lora=lora, optimizer=optimizer, **options)


def fit(model: Any, folder: Path, steps: int = 4, resume: Path | None = None, **options: Any) -> L.Trainer:
    options = {"plugins": [SafeCheckpointIO()], **options}
    trainer = tiny.trainer(folder, max_steps=steps, max_epochs=None, **options)
    trainer.fit(model, DataLoader(IMAGES, batch_size=None), ckpt_path=resume, weights_only=True)  # type: ignore[arg-type]
    return trainer


def run(start: str, folder: Path, rank: int | None = 2, **options: Any) -> tuple[ImageClassifier, Path]:
    """An objective that has trained for 4 steps, and its checkpoint."""
    model = classifier(start, rank)
    fit(model, folder, **options).save_checkpoint(folder / "checkpoints/last.ckpt")
    return model.eval(), folder / "checkpoints/last.ckpt"  # type: ignore[return-value]


def bases(file: Path) -> list[Path]:
    return sorted(file.parent.glob("*.safetensors"))


def test_only_adapters_and_heads_change_and_are_kept(start: str, tmp_path: Path) -> None:
    before = ViT.from_pretrained(start).state_dict()
    model, file = run(start, tmp_path / "lora")
    after = model.network.state_dict()
    changed = {name for name, value in after.items() if name not in before or not torch.equal(before[name], value)}
    assert changed == {name for name in after if ".adapters." in name} | {"head.weight", "head.bias"}
    content = torch.load(file, weights_only=True)
    assert content["state_dict"].keys() == {f"network.{name}" for name in changed}
    held = sum(value.numel() for state in content["optimizer_states"][0]["state"].values() for value in state.values())
    learning = [p for p in model.network.parameters() if p.requires_grad]
    assert held == sum(2 * p.numel() + 1 for p in learning)  # two moments, and the step
    assert sum(p.numel() for p in learning) < sum(p.numel() for p in model.network.parameters()) / 4
    _, whole = run(start, tmp_path / "full", rank=None)
    assert file.stat().st_size < whole.stat().st_size
    assert bases(whole) == []


def test_the_base_is_stored_once(start: str, tmp_path: Path) -> None:
    model, file = run(start, tmp_path)
    (base,) = bases(file)
    trainer, before = tiny.trainer(tmp_path, max_steps=6, plugins=[BackgroundCheckpointIO()]), base.stat()
    trainer.fit(model, DataLoader(IMAGES, batch_size=None), ckpt_path=file, weights_only=True)  # type: ignore[arg-type]
    for name in ("a", "b"):
        trainer.save_checkpoint(file.with_name(f"{name}.ckpt"))
    trainer.strategy.checkpoint_io.teardown()
    assert bases(file) == [base]
    assert base.stat().st_mode == before.st_mode == file.stat().st_mode
    assert {file.name for file in file.parent.iterdir()} == {"last.ckpt", "a.ckpt", "b.ckpt", base.name}


def test_every_reader_gives_a_whole_network(start: str, tmp_path: Path) -> None:
    model, file = run(start, tmp_path)
    image, network = IMAGES[0]["image"], model.network
    with torch.no_grad():
        want = network(image)
        readers = {
            "trunkline.load": trunkline.load(tmp_path),
            "from_checkpoint": ViT.from_checkpoint(file).eval(),
            "Trained": Trained.read(str(file)).network,
            "init_from": classifier(str(file), rank=None).eval().network,
        }
        for name, read in readers.items():
            assert not is_adapted(read), name
            assert read.state_dict().keys() == ViT.from_pretrained(start).state_dict().keys()
            torch.testing.assert_close(read(image), want, rtol=1e-5, atol=1e-5)
        kept = ViT.from_checkpoint(file, merge=False).eval()
        assert is_adapted(kept)
        assert torch.equal(kept(image), want)
        module = Trained.read(str(file)).module().eval()
        assert torch.equal(module.network(image), want)
        again = classifier(str(file))  # adapters on what has been merged
        assert is_adapted(again.network)
        torch.testing.assert_close(again.eval().network(image), want, rtol=1e-5, atol=1e-5)
        trunkline.load(file).save_pretrained(tmp_path / "saved")
        torch.testing.assert_close(trunkline.load(tmp_path / "saved")(image), want, rtol=1e-5, atol=1e-5)


def test_evaluation_reads_it(start: str, tmp_path: Path) -> None:
    model, file = run(start, tmp_path)
    loader: Any = DataLoader(IMAGES, batch_size=None)
    want = tiny.trainer(tmp_path).validate(model, loader, verbose=False)
    evaluator = tiny.trainer(tmp_path, plugins=[SafeCheckpointIO()])
    got = evaluator.validate(classifier(start), loader, ckpt_path=file, verbose=False, weights_only=True)
    assert got == want


@pytest.mark.parametrize("averaged", [False, True])
def test_resume_is_exact(averaged: bool, start: str, tmp_path: Path) -> None:
    """With dropout in trunk and adapters, and with averaged weights."""

    def state(folder: Path, *parts: int) -> dict[str, Any]:
        resume = None
        for steps in parts:
            saves = ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
            callbacks = [saves, EMAWeightAveraging(decay=0.9)] if averaged else [saves]
            fit(classifier(start), folder, steps, resume, callbacks=callbacks, enable_checkpointing=True)
            resume = folder / f"step={steps}.ckpt"
        return load_checkpoint(resume)  # type: ignore[arg-type]

    whole, parts = state(tmp_path / "whole", 12), state(tmp_path / "parts", 6, 12)
    for part in ("state_dict", "current_model_state", "optimizer_states") if averaged else ("state_dict",):
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0)
    if averaged:
        one, other = whole["state_dict"], whole["current_model_state"]
        assert {n for n in one if not torch.equal(one[n], other[n])} == {
            n for n in one if ".adapters." in n or ".head." in n
        }
        torch.testing.assert_close(
            trunkline.load(tmp_path / "whole/step=12.ckpt").head.weight, one["network.head.weight"]
        )


def test_a_missing_or_changed_base_is_reported(start: str, tmp_path: Path) -> None:
    _, file = run(start, tmp_path)
    (base,) = bases(file)
    alone = shutil.copy(file, tmp_path / "alone.ckpt")
    with pytest.raises(TrunklineError, match=f"alone.ckpt holds only what LoRA has trained, and needs {base.name}"):
        trunkline.load(alone)
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    base.write_bytes(content)
    with pytest.raises(TrunklineError, match=f"{base.name} is not as it was written"):
        fit(classifier(start), tmp_path, 5, file)


def test_another_base_in_the_same_folder(start: str, tmp_path: Path) -> None:
    first, file = run(start, tmp_path)
    shutil.move(file, file.with_name("first.ckpt"))
    torch.manual_seed(8)
    ViT(tiny.vit(dropout=0.2)).save_pretrained(tmp_path / "other")
    second, _ = run(str(tmp_path / "other"), tmp_path)
    assert len(bases(file)) == 2
    image = IMAGES[0]["image"]
    for name, model in {"first": first, "last": second}.items():
        read = trunkline.load(file.with_name(f"{name}.ckpt"))
        torch.testing.assert_close(read(image), model.network(image), rtol=1e-5, atol=1e-5)


def test_other_writers_keep_whole_checkpoints(start: str, tmp_path: Path) -> None:
    model, file = run(start, tmp_path, plugins=[TorchCheckpointIO()])
    assert bases(file) == []
    content = torch.load(file, weights_only=True)
    assert content["state_dict"].keys() == model.state_dict().keys()
    assert torch.equal(
        ViT.from_checkpoint(file, merge=False).eval()(IMAGES[0]["image"]), model.network(IMAGES[0]["image"])
    )


def test_tied_weights(tmp_path: Path) -> None:
    """The output layer of a GPT is its embedding: stored once, frozen."""
    config = GPTConfig(11, 8, backbone=TransformerConfig(16, 1, 2, causal=True))
    GPT(config).save_pretrained(tmp_path / "start")
    model = CausalLM(config, init_from=str(tmp_path / "start"), lora=LoRAConfig(2))
    tokens = torch.randint(0, 11, (2, 8))
    batch = {"tokens": tokens, "targets": tokens, "document": torch.ones_like(tokens)}
    trainer = tiny.trainer(tmp_path, max_steps=1, plugins=[SafeCheckpointIO()])
    trainer.fit(model, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "c/a.ckpt")
    assert torch.load(tmp_path / "c/a.ckpt")["base"]["same"] == {"network.head.weight": "network.token_embed.weight"}
    network = GPT.from_checkpoint(tmp_path / "c/a.ckpt").eval()
    assert network.head.weight is network.token_embed.weight
    torch.testing.assert_close(network(tokens), model.network.eval()(tokens), rtol=1e-5, atol=1e-5)


def test_towers_from_two_places(start: str, tmp_path: Path) -> None:
    image = ViTConfig(8, 4, 1, pool="mean", backbone=tiny.vit().backbone)
    text = GPTConfig(11, 8, backbone=TransformerConfig(16, 1, 2, causal=True))
    GPT(text).save_pretrained(tmp_path / "text")
    config = CLIPConfig(dim=8, image=image, gpt=text)
    towers = {"init_image_from": start, "init_text_from": str(tmp_path / "text")}
    model = ContrastiveImageText(config, lora=LoRAConfig(2), **towers)
    own, given = model.network.state_dict(), ViT.from_pretrained(start).state_dict()
    same = [n for n in given if f"image.{n}" in own and given[n].shape == own[f"image.{n}"].shape]
    assert len(same) > 20
    assert all(torch.equal(given[n], own[f"image.{n}"]) for n in same if not n.startswith("head"))
    assert isinstance(model.network, CLIP)
    with pytest.raises(TrunklineError, match="leave out freeze_text_blocks"):
        ContrastiveImageText(config, lora=LoRAConfig(2), freeze_text_blocks=1, **towers)


def test_what_does_not_go_together(start: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="leave out freeze_blocks") as found:
        classifier(start, freeze_blocks=1)
    assert found.value.field == "model.freeze_blocks"
    with pytest.raises(TrunklineError, match="starts from none; set init_from"):
        fit(classifier(None), tmp_path)
    with pytest.raises(TrunklineError, match="does not train under ShardedStrategy") as found:
        fit(classifier(start), tmp_path, strategy=ShardedStrategy("gloo"))
    assert found.value.field == "trainer.strategy"


@pytest.mark.parametrize(
    ("there", "here", "mend", "field"),
    [
        ({"rank": 2}, {}, "trained with lora.rank=2; set lora.rank to 2", "rank"),
        ({}, {"rank": 2}, "trained with lora.rank=null; set lora.rank to null", "rank"),
        ({"rank": 2, "alpha": 8.0}, {"rank": 2}, "trained with lora.alpha=8.0; set lora.alpha to 8.0", "alpha"),
        ({"rank": 2, "targets": "mlp"}, {"rank": 4}, "lora.rank to 2 and lora.targets to mlp", "rank"),
    ],
)
def test_a_checkpoint_needs_the_same_adapters(
    there: dict[str, Any], here: dict[str, Any], mend: str, field: str
) -> None:
    with pytest.raises(TrunklineError, match=mend) as found:
        check_same_lora(LoRAConfig(**here), {"lora": there})
    assert found.value.field == f"model.lora.{field}"


def test_another_rank_is_said_on_resume(start: str, tmp_path: Path) -> None:
    _, checkpoint = run(start, tmp_path / "a")
    with pytest.raises(TrunklineError, match=r"set lora\.rank to 2"):
        fit(classifier(start, rank=4), tmp_path / "b", resume=checkpoint)
    check_same_lora(LoRAConfig(), {})  # older checkpoints do not know LoRA
    check_same_lora(LoRAConfig(2, dropout=0.1), {"lora": {"rank": 2}})
