import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from contrastive_processes import large_step, model, pairs
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.metrics.retrieval import retrieval_metrics
from trunkline.modules.networks import BERT, GPT, BERTConfig, CLIPConfig, GPTConfig, ViT, ViTConfig
from trunkline.modules.networks.clip import Embeddings
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.training.distributed import Gather
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.pipelines.benchmarks.memory import peak_memory

STEADY = {"schedule": "constant", "warmup": 0}
TRUNK = TransformerConfig(dim=16, depth=2, num_heads=2)


def cut(sizes: list[int]) -> list[dict[str, Tensor]]:
    """The 11 pairs in batches."""
    parts = {name: value.split(sizes) for name, value in pairs().items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(sizes))]


def contrast(module: ContrastiveImageText, embeddings: Embeddings, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of pairs whose embeddings are there."""
    keys = batch["caption_key"]
    return module.contrast(embeddings, keys, Gather(keys)) / len(keys)


def fit(module: ContrastiveImageText, folder: Path, data: Any, **options: Any) -> L.Trainer:
    trainer = tiny.trainer(folder, **{"max_epochs": 1, "num_sanity_val_steps": 0, **options})
    loaders = [DataLoader(batches, batch_size=None) for batches in (data if isinstance(data, tuple) else (data,))]
    trainer.fit(module, *loaders)
    return trainer


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_accumulation_has_the_negatives_of_all_its_batches(loss: str, chunk: int | None, tmp_path: Path) -> None:
    optimizer = OptimizerConfig("sgd", lr=0.1, momentum=0.0, **STEADY)  # type: ignore[arg-type]
    whole = model(loss=loss, optimizer=optimizer)
    start = tiny.weights(whole)
    trainer = fit(whole, tmp_path, cut([11]))
    parts = model(loss=loss, optimizer=optimizer, chunk_size=chunk)
    fitted = fit(parts, tmp_path, cut([4, 4, 3]), accumulate_grad_batches=3)
    assert trainer.global_step == fitted.global_step == 1
    assert max((start[n] - w).abs().max() for n, w in tiny.weights(whole).items()) > 0.1
    torch.testing.assert_close(tiny.weights(parts), tiny.weights(whole), rtol=0, atol=1e-5)
    torch.testing.assert_close(fitted.logged_metrics["train/loss"], trainer.logged_metrics["train/loss"])
    assert fitted.logged_metrics["train/chance_loss"].item() == pytest.approx(parts.chance(11))


def test_an_accumulation_that_the_epoch_cuts_short_takes_what_there_is(tmp_path: Path) -> None:
    fitted = fit(model(loss="infonce"), tmp_path, cut([3, 3, 3, 2]), accumulate_grad_batches=3)
    assert fitted.global_step == 2
    assert fitted.logged_metrics["train/chance_loss"].item() == pytest.approx(math.log(2))


def test_chunks_drop_the_same_twice() -> None:
    """The second pass through a chunk must drop what the first one did, or its gradient is of another network."""
    torch.manual_seed(0)
    trunk = TransformerConfig(dim=16, depth=2, num_heads=2, dropout=0.5)
    config = CLIPConfig(ViTConfig(16, 8, pool="mean", backbone=trunk), gpt=GPTConfig(50, 6, backbone=trunk), dim=8)
    module, batch, gradients = ContrastiveImageText(config), pairs(), []
    for chunk in (11, 10):  # 11 is the whole batch; of 10 the second chunk is one pair
        torch.manual_seed(1)
        found = module.embed(batch, chunk=chunk)
        module.zero_grad()
        contrast(module, found, batch).backward()
        gradients.append((found, module.network.image.patch_embed.proj.weight.grad))
    torch.manual_seed(1)
    first = {name: value[:10] for name, value in batch.items()}
    plain = module.network(first["image"], first["tokens"], first["mask"])
    torch.testing.assert_close(gradients[1][0].image[:10], plain.image)
    # By hand: the gradient of the chunks' network, with the generator where it stood.
    torch.manual_seed(1)
    parts = [
        module.network(*(batch[n][part] for n in ("image", "tokens", "mask"))) for part in (slice(10), slice(10, 11))
    ]
    joined = type(plain)(torch.cat([p.image for p in parts]), torch.cat([p.text for p in parts]))
    module.zero_grad()
    contrast(module, joined, batch).backward()
    torch.testing.assert_close(module.network.image.patch_embed.proj.weight.grad, gradients[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_chunks_of_a_compiled_network() -> None:
    batch, gradients = pairs(), []
    for compiled in (False, True):
        module = model(loss="infonce")
        if compiled:
            module.network.compile()
        contrast(module, module.embed(batch, chunk=4), batch).backward()
        gradients.append([p.grad for p in module.network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_memory_is_that_of_a_chunk() -> None:
    """Sixteen times the pairs, in chunks; at once they take far more."""
    small, chunks, whole = (
        peak_memory(partial(large_step, *sizes)) for sizes in ((64, None), (1024, 64), (1024, None))
    )
    assert chunks < 1.3 * small
    assert whole > 5 * small


def test_evaluation_over_the_whole_split(tmp_path: Path) -> None:
    """Batches of 6 and 5, one of whose pairs is a filler."""
    module, batches = model(loss="infonce"), cut([6, 5])
    for batch in batches:
        batch |= {
            "index": torch.arange(len(batch["image"])),
            "valid": torch.ones(len(batch["image"]), dtype=torch.bool),
        }
    batches[1]["valid"][4] = False
    batches[0] |= {"skipped": torch.tensor([1, 0, 0, 0, 1, 0]), "truncated": torch.tensor([0, 1, 0, 0, 0, 0])}
    trainer = fit(module, tmp_path, (cut([11]), batches), limit_train_batches=0, max_epochs=-1, max_steps=0)
    (metrics,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    every = {
        name: torch.cat([batch[name] for batch in batches])[:10] for name in ("image", "tokens", "mask", "caption_key")
    }
    with torch.no_grad():
        found = module.network(every["image"], every["tokens"], every["mask"])
        losses = [
            contrast(module, type(found)(found.image[part], found.text[part]), {"caption_key": key}) * len(key)
            for part, key in ((part, every["caption_key"][part]) for part in (slice(6), slice(6, 10)))
        ]
    want = retrieval_metrics(*found, every["caption_key"], every["caption_key"])
    assert {f"val/{name}" for name in want} <= metrics.keys()
    for name, value in want.items():
        assert metrics[f"val/{name}"] == pytest.approx(value.item()), name
    assert metrics["val/loss"] == pytest.approx((sum(losses) / 10).item(), abs=1e-5)
    assert metrics["val/chance_loss"] == pytest.approx((6 * math.log(6) + 4 * math.log(4)) / 10)
    assert (metrics["val/skipped_images"], metrics["val/truncated_captions"]) == (2, 1)


def test_scale_stays_within_its_limits(tmp_path: Path) -> None:
    module = model(loss="infonce", optimizer=OptimizerConfig("sgd", lr=1e4, momentum=0.0, **STEADY))  # type: ignore[arg-type]
    for p in module.network.parameters():
        p.requires_grad_(p is module.network.scale.logit_scale)
    fitted = fit(module, tmp_path, cut([11]))
    assert module.network.scale.factor.item() in (pytest.approx(1.0), pytest.approx(100.0))
    assert fitted.logged_metrics["train/logit_scale"].item() == pytest.approx(math.exp(2.3))  # before the step


def test_locked_image_tower(tmp_path: Path) -> None:
    module = model(loss="infonce", freeze_image_blocks=2)
    before = tiny.weights(module)  # type: ignore[arg-type]
    fit(module, tmp_path, cut([6, 5]))
    changed = {name for name, value in tiny.weights(module).items() if not torch.equal(value, before[name])}  # type: ignore[arg-type]
    image = {name for name in changed if name.startswith("image.")}
    assert image == {"image.head.weight", "image.head.bias"}
    assert {"scale.logit_scale", "text.head.weight", "text.body.backbone.blocks.0.attn.qkv.weight"} <= changed


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_towers_start_from_trained_ones(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = ViT(ViTConfig(8, 8, num_classes=3, pool="mean", backbone=TRUNK))
    text = GPT(GPTConfig(50, 6, backbone=TRUNK)) if kind == "gpt" else BERT(BERTConfig(50, 6, backbone=TRUNK))
    image.save_pretrained(tmp_path / "image")
    text.save_pretrained(tmp_path / "text")
    config = CLIPConfig(ViTConfig(16, 8, pool="mean", backbone=TRUNK), dim=8, **{kind: text.config})
    names = {"init_image_from": str(tmp_path / "image"), "init_text_from": str(tmp_path / "text")}
    network = ContrastiveImageText(config, **names).network
    torch.testing.assert_close(network.image.backbone.state_dict(), image.backbone.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(network.text.body.backbone.state_dict(), text.backbone.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(network.text.body.token_embed.weight, text.token_embed.weight, rtol=0, atol=0)
    assert network.image.head.weight.shape == (8, 16)
    config.image.backbone = TransformerConfig(dim=32, depth=2, num_heads=2)
    with pytest.raises(
        TrunklineError,
        match=r"^init_image_from .*image does not fit: pos_embed is .* give network\.image the sizes",
    ) as caught:
        ContrastiveImageText(config, **names)
    assert caught.value.field == "model.init_image_from"


def test_trained_towers_may_be_gone_when_a_checkpoint_replaces_them(tmp_path: Path) -> None:
    """What the recipe leaves out then comes from that checkpoint's network."""
    ViT(ViTConfig(16, 8, pool="mean", backbone=TRUNK)).save_pretrained(tmp_path / "image")
    BERT(BERTConfig(50, 6, backbone=TRUNK)).save_pretrained(tmp_path / "text")
    names = {"init_image_from": str(tmp_path / "image"), "init_text_from": str(tmp_path / "text")}
    left_out = CLIPConfig(ViTConfig(16, 8, pool="mean"), dim=8, bert=BERTConfig(50, 6))
    first = ContrastiveImageText(left_out, **names)
    assert first.network.config.image.backbone == TRUNK
    assert first.network.config.bert.backbone.dim == TRUNK.dim
    (tmp_path / "image").rename(tmp_path / "gone")
    (tmp_path / "text").rename(tmp_path / "gone too")
    with pytest.raises(TrunklineError, match="init_image_from"):
        ContrastiveImageText(left_out, **names)
    again = ContrastiveImageText(left_out, facts=DataFacts(network_instead=first.hparams["network"]), **names)
    assert again.network.config == first.network.config
    assert dict(again.hparams) == dict(first.hparams)


def test_towers_that_only_look_alike(tmp_path: Path) -> None:
    """Weights do not tell the number of heads."""
    ViT(ViTConfig(16, 8, pool="mean", backbone=TRUNK)).save_pretrained(tmp_path / "image")
    other = TransformerConfig(dim=16, depth=2, num_heads=4)
    config = CLIPConfig(ViTConfig(16, 8, pool="mean", backbone=other), gpt=GPTConfig(50, 6, backbone=TRUNK))
    message = r"^init_image_from .* num_heads=2.*; set network\.image\.backbone\.num_heads to 2$"
    with pytest.raises(TrunklineError, match=message) as caught:
        ContrastiveImageText(config, init_image_from=str(tmp_path / "image"))
    assert caught.value.field == "model.network.image.backbone.num_heads"
    with pytest.raises(
        TrunklineError, match=r"^init_text_from .*image holds a ViT; .* TextHead or BERT or CLIP or GPT$"
    ) as caught:
        ContrastiveImageText(config, init_text_from=str(tmp_path / "image"))
    assert caught.value.field == "model.init_text_from"
    GPT(GPTConfig(50, 6, backbone=TRUNK)).save_pretrained(tmp_path / "text")
    message = r"^init_image_from .*text holds a GPT; give a checkpoint or a folder of ViT or CLIP$"
    with pytest.raises(TrunklineError, match=message) as caught:
        ContrastiveImageText(config, init_image_from=str(tmp_path / "text"))
    assert caught.value.field == "model.init_image_from"


def test_no_valid_pair_at_all(tmp_path: Path) -> None:
    module, (batch,) = model(loss="infonce"), cut([11])
    batch |= {"index": torch.arange(11), "valid": torch.zeros(11, dtype=torch.bool)}
    with pytest.raises(TrunklineError, match="not one pair of the val split could be read"):
        tiny.trainer(tmp_path).validate(module, DataLoader([batch], batch_size=None), verbose=False)  # type: ignore[arg-type]


def test_bad_arguments(tmp_path: Path) -> None:
    config = CLIPConfig(ViTConfig(16, 8, backbone=TRUNK), gpt=GPTConfig(50, 6, backbone=TRUNK))
    with pytest.raises(TrunklineError, match=r"needs a bias; set network\.init_logit_bias to -10") as caught:
        ContrastiveImageText(config, loss="sigmoid")
    assert caught.value.field == "model.network.init_logit_bias"
    with pytest.raises(TrunklineError, match=r"^chunk_size 0 must be 1 or more") as caught:
        ContrastiveImageText(config, chunk_size=0)
    assert caught.value.field == "model.chunk_size"
    shared = CLIPConfig(ViTConfig(16, 8, backbone=TRUNK), bert=BERTConfig(50, 6, backbone=TRUNK), share_trunk=True)
    for tower in ("image", "text"):
        message = r"with share_trunk both towers have the same blocks; set freeze_image_blocks and freeze_text_blocks"
        with pytest.raises(TrunklineError, match=message) as caught:
            ContrastiveImageText(shared, **{f"freeze_{tower}_blocks": 1})  # type: ignore[arg-type]
        assert caught.value.field == f"model.freeze_{tower}_blocks"
    with pytest.raises(TrunklineError, match=r"give init_image_from or init_text_from, not both") as caught:
        ContrastiveImageText(shared, init_image_from="a", init_text_from="b")
    assert caught.value.field == "model.init_image_from"
    message = r"a batch of one pair has no other pair to compare it with; set batch_size to 2 or more"
    with pytest.raises(TrunklineError, match=message) as caught:
        fit(model(loss="infonce"), tmp_path, cut([1, 10]))
    assert caught.value.field == "data.batch_size"


def test_chance() -> None:
    assert model(loss="infonce").chance(64) == pytest.approx(math.log(64))
    assert model(loss="sigmoid").chance(64) == pytest.approx(math.log(64) + 63 * math.log(64 / 63))


def test_flops_do_not_count_chunks_twice() -> None:
    batch = pairs()
    assert model(loss="infonce", chunk_size=2).flops_per_batch(batch) == model(loss="infonce").flops_per_batch(batch)
