"""CausalLM: its loss and metrics against slow ones, on one and two processes."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from tiny import mean_loss, trainer
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import GPTConfig
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.optim import OptimizerConfig


def config(**options: Any) -> GPTConfig:
    backbone = TransformerConfig(dim=16, depth=2, num_heads=2)
    return GPTConfig(**{"vocab_size": 11, "max_length": 8, "backbone": backbone, **options})


def model(**options: Any) -> CausalLM:
    torch.manual_seed(0)
    made = CausalLM(config(), optimizer=OptimizerConfig(lr=0.01, warmup=0.1), **options)
    with torch.no_grad():
        for p in made.network.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return made


def batches(count: int, rows: int = 4) -> list[dict[str, Tensor]]:
    """With a different number of targets in each row, none in some."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        row = torch.randint(0, 11, (rows, 9), generator=draw)
        targets = row[:, 1:].clone()
        for i, length in enumerate(torch.randint(0, 9, (rows,), generator=draw).tolist()):
            targets[i, length:] = -100
        made.append({"tokens": row[:, :-1], "targets": targets})
    return made


def slow_losses(net: Any, data: list[dict[str, Tensor]]) -> tuple[list[float], list[bool]]:
    """Of every counted token, one row at a time."""
    losses, right = [], []
    for batch in data:
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            logits = net(tokens[None])[0].double()
            for position in (targets != -100).nonzero()[:, 0].tolist():
                losses.append(-logits[position].log_softmax(-1)[targets[position]].item())
                right.append(bool(logits[position].argmax() == targets[position]))
    return losses, right


class Bytes(L.LightningDataModule):
    facts = DataFacts(bytes_per_token={"val": 2.5, "test": 4.0})

    def val_dataloader(self) -> Any:
        return DataLoader(batches(3), batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_against_a_slow_loop(stage: str, tmp_path: Path) -> None:
    made = model()
    run = trainer(tmp_path)
    (got,) = (run.validate if stage == "val" else run.test)(made, datamodule=Bytes(), verbose=False)
    losses, right = slow_losses(made.network, batches(3))
    mean = sum(losses) / len(losses)
    assert got == pytest.approx(
        {
            f"{stage}/loss": mean,
            f"{stage}/acc": sum(right) / len(right),
            f"{stage}/ppl": math.exp(mean),
            f"{stage}/bpb": mean / math.log(2) / Bytes.facts.bytes_per_token[stage],
        },
        rel=1e-5,
    )


def test_no_bits_per_byte_where_bytes_are_not_known(tmp_path: Path) -> None:
    (got,) = trainer(tmp_path).validate(model(), DataLoader(batches(1), batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert got.keys() == {"val/loss", "val/acc", "val/ppl"}


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-3)])
def test_training_loss_and_gradient(smoothing: float, z_loss: float) -> None:
    made, (batch,) = model(label_smoothing=smoothing, z_loss=z_loss), batches(1)
    made.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    loss = mean_loss(made, batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}
    logits = made.network(batch["tokens"]).flatten(0, 1)
    targets = batch["targets"].flatten()
    want = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    want = want + z_loss * logits.logsumexp(-1)[targets != -100].square().mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    made.zero_grad()
    want.backward()
    for name, p in made.network.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


def test_learns_to_count(tmp_path: Path) -> None:
    row = torch.arange(9).expand(4, 9)
    data: Any = DataLoader([{"tokens": row[:, :-1], "targets": row[:, 1:]}] * 150, batch_size=None)  # type: ignore[arg-type]
    made = model()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(made, data)
    assert run.callback_metrics["train/loss"].item() < 0.1
    assert made.network(row[:1, :-1]).argmax(-1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize(("name", "needed", "own"), [("vocab_size", 12, 11), ("max_length", 9, 8)])
def test_data_that_does_not_fit(name: str, needed: int, own: int) -> None:
    made, facts = model(), DataFacts(**{name: needed})  # type: ignore[arg-type]
    made.trainer = SimpleNamespace(datamodule=SimpleNamespace(facts=facts), strategy=None)  # type: ignore[assignment]
    message = (
        f"the network has {name}={own}, but the data needs at least {needed}; leave {name} out of the network, which "
        f"then takes the data's, or set it to {needed}"
    )
    with pytest.raises(TrunklineError, match=f"^{message}$") as caught:
        made.setup("fit")
    assert caught.value.field == f"model.network.{name}"


def test_hyperparameters_are_plain_and_rebuild_it() -> None:
    made = model(z_loss=1e-4)
    plain = json.loads(json.dumps(made.hparams))
    again = CausalLM(**plain)
    assert again.network.config == made.network.config
    assert again.z_loss == 1e-4


def test_operations_of_a_step() -> None:
    """Per token 6 for each weight of a matrix, and attention's own products."""
    made, (batch,) = model(), batches(1)
    matrices = sum(p.numel() for block in made.network.backbone.blocks for p in block.parameters() if p.ndim == 2)
    attention = 2 * 2 * 2 * 8 * 16  # depth, scores and sum, a product and a sum, keys, width
    assert made.flops_per_batch(batch) == 3 * 4 * 8 * (2 * matrices + attention + 2 * 11 * 16)
    assert made.batch_size(batch) == 32


@pytest.mark.parametrize("tokenizer", ["same", "other"])
def test_start_from_weights_with_another_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    source = model()
    content: dict[str, Any] = {"objective": "CausalLM", "state_dict": source.state_dict()}
    words = {name: Tokenizer(models.WordLevel({name: 0}, unk_token=name)) for name in ("same", "other")}
    content |= {"hyper_parameters": dict(source.hparams), "TextData": {"tokenizer": words["same"].to_str()}}
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    made = model(init_from=str(tmp_path / "a.ckpt"))
    facts = DataFacts(tokenizer=words[tokenizer])
    made.trainer = SimpleNamespace(datamodule=SimpleNamespace(facts=facts), strategy=None)  # type: ignore[assignment]
    if tokenizer == "same":
        made.setup("fit")
    else:
        message = (
            r"^init_from .*a\.ckpt was trained with another tokenizer .*; set tokenizer to .*a\.ckpt, or .*matched"
        )
        with pytest.raises(TrunklineError, match=message) as caught:
            made.setup("fit")
        assert caught.value.field == "data.tokenizer"
