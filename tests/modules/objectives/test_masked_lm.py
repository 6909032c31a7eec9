"""MaskedLM: loss and metrics against slow ones; the heads compute no more than the hidden tokens."""

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
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.filling import fill_masks
from trunkline.modules.networks import BERT, BERTConfig
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.training.optim import OptimizerConfig

CONSTANT = OptimizerConfig(schedule="constant", warmup=0, lr=0.01)


def model(pairs: bool = False, noise: float = 0.3, optimizer: OptimizerConfig = CONSTANT) -> MaskedLM:
    torch.manual_seed(0)
    backbone = TransformerConfig(dim=16, depth=2, num_heads=2, norm_first=False, final_norm=False)
    config = BERTConfig(vocab_size=11, max_length=8, next_sentence=pairs, backbone=backbone)
    made = MaskedLM(config, optimizer=optimizer)
    with torch.no_grad():
        for p in made.network.parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    return made


def batches(count: int, pairs: bool = False) -> list[dict[str, Tensor]]:
    """Rows of unequal length, with a different number of hidden tokens in each, none in some."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        tokens = torch.randint(0, 11, (4, 8), generator=draw)
        positions = torch.rand(4, 8, generator=draw).argsort(dim=1)[:, :3]
        targets = torch.randint(0, 11, (4, 3), generator=draw)
        targets[torch.arange(3) >= torch.tensor([[0], [1], [3], [2]])] = -100
        batch = {"tokens": tokens, "positions": positions, "targets": targets}
        if pairs:
            batch["segment"] = (torch.arange(8) > 4).long().expand(4, 8)
            batch["mask"] = torch.arange(8) < torch.tensor([[8], [7], [8], [6]])
            batch["follows"] = torch.tensor([0, 1, -100, 1])
        made.append(batch)
    return made


def slow(net: BERT, data: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """Of every hidden token, and every pair, one row at a time over all positions."""
    found: dict[str, list[float]] = {"loss": [], "acc": [], "next_loss": [], "next_acc": []}
    for batch in data:
        for n in range(4):
            row = {name: batch[name][n : n + 1] for name in ("tokens", "segment", "mask") if name in batch}
            logits = net(**row)[0].double()
            for position, target in zip(batch["positions"][n].tolist(), batch["targets"][n].tolist(), strict=True):
                if target != -100:
                    found["loss"].append(-logits[position].log_softmax(-1)[target].item())
                    found["acc"].append(float(logits[position].argmax() == target))
            if "follows" in batch and (follows := int(batch["follows"][n])) != -100:
                pair = net.next_head(net.pooler(net.forward_features(**row).x[:, 0]))[0].double()
                found["next_loss"].append(-pair.log_softmax(-1)[follows].item())
                found["next_acc"].append(float(pair.argmax() == follows))
    return found


class Data(L.LightningDataModule):
    facts = DataFacts(unigram_entropy=2.25)

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs

    def val_dataloader(self) -> Any:
        return DataLoader(batches(3, self.pairs), batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_against_a_slow_loop(stage: str, pairs: bool, tmp_path: Path) -> None:
    made, run = model(pairs), trainer(tmp_path)
    (got,) = (run.validate if stage == "val" else run.test)(made, datamodule=Data(pairs), verbose=False)
    want = {name: sum(v) / len(v) for name, v in slow(made.network, batches(3, pairs)).items() if v}
    want |= {"ppl": math.exp(want["loss"]), "unigram_entropy": 2.25}
    assert got == pytest.approx({f"{stage}/{name}": value for name, value in want.items()}, rel=1e-5)


@pytest.mark.parametrize("pairs", [False, True])
def test_training_loss_and_gradient(pairs: bool) -> None:
    made, (batch,) = model(pairs), batches(1, pairs)
    made.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    loss = mean_loss(made, batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}
    made.zero_grad()
    labels = torch.full_like(batch["tokens"], -100).scatter(1, batch["positions"], batch["targets"])
    inputs = {name: batch[name] for name in ("tokens", "segment", "mask") if name in batch}
    want = F.cross_entropy(made.network(**inputs).flatten(0, 1), labels.flatten())
    if pairs:
        first = made.network.pooler(made.network.forward_features(**inputs).x[:, 0])
        want = want + F.cross_entropy(made.network.next_head(first), batch["follows"])
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for name, p in made.network.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


def test_the_output_layer_sees_hidden_tokens_only() -> None:
    made, (batch,) = model(), batches(1)
    seen: list[torch.Size] = []
    made.network.masked_head.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape))
    made.states(batch)
    assert seen == [(4, 3, 16)]


def test_operations_count_hidden_tokens_only() -> None:
    made, (batch,) = model(), batches(1)
    few = made.flops_per_batch(batch)
    batch["positions"] = torch.arange(8).expand(4, 8)
    more = made.flops_per_batch(batch)
    extra = 4 * 5 * 16 * (11 + 16 + 2 * 16 + 2 * 4 * 16) + 4 * 5 * 2 * 8 * 16  # heads, query, output, MLP; attention
    assert more - few == 3 * 2 * extra
    assert made.batch_size(batch) == 32


def test_learns_and_fills(tmp_path: Path) -> None:
    """All tokens of a row are the same: what is hidden follows from what is not."""
    draw = torch.Generator().manual_seed(0)
    data = []
    for _ in range(250):
        rows = torch.randint(0, 10, (64, 1), generator=draw).expand(64, 8)
        positions = torch.randint(0, 8, (64, 1), generator=draw)
        data.append(
            {"tokens": rows.scatter(1, positions, 10), "positions": positions, "targets": rows.gather(1, positions)}
        )
    made = model(noise=0.0, optimizer=OptimizerConfig(lr=0.01, warmup=0.1))  # ends at rate 0, so does not bounce
    trainer(tmp_path, max_epochs=1).fit(made, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    (first,) = fill_masks(made.network, torch.tensor([6, 6, 10, 6, 6, 6, 6, 6]), mask_id=10, count=3)
    (other,) = fill_masks(made.network, torch.tensor([0, 0, 0, 0, 0, 0, 10, 0]), mask_id=10, count=3)
    assert (first.position, other.position) == (2, 6)
    assert (first.tokens[0], other.tokens[0]) == (6, 0)
    assert first.probabilities == sorted(first.probabilities, reverse=True)
    assert first.probabilities[0] > 0.5
    logits = made.network.eval()(torch.tensor([[6, 6, 10, 6, 6, 6, 6, 6]]))[0, 2]
    assert first.probabilities[0] == pytest.approx(logits.softmax(-1)[6].item(), rel=1e-4)


@pytest.mark.parametrize(("name", "needed", "own"), [("vocab_size", 12, 11), ("max_length", 9, 8)])
def test_data_that_does_not_fit(name: str, needed: int, own: int) -> None:
    made, facts = model(), DataFacts(**{name: needed})  # type: ignore[arg-type]
    made.trainer = SimpleNamespace(datamodule=SimpleNamespace(facts=facts))  # type: ignore[assignment]
    message = f"^the network has {name}={own}, but the data needs at least {needed}; .*, or set it to {needed}$"
    with pytest.raises(TrunklineError, match=message) as caught:
        made.setup("fit")
    assert caught.value.field == f"model.network.{name}"


def test_a_causal_trunk_is_refused() -> None:
    with pytest.raises(TrunklineError, match="the trunk of a BERT cannot be causal"):
        BERTConfig(backbone=TransformerConfig(causal=True))


def test_hyperparameters_are_plain_and_rebuild_it() -> None:
    made = model(pairs=True)
    again = MaskedLM(**json.loads(json.dumps(made.hparams)))
    assert again.network.config == made.network.config
