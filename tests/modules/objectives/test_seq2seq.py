"""Seq2Seq: its loss against a slow loop, and the texts that it writes, on one and two processes."""

import json
import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from recorded_run import CONTEXT
from sacrebleu import corpus_bleu, corpus_chrf
from tiny import mean_loss, trainer
from tiny_seq2seq import END, LENGTH, START, Batch, Reversing, config, drawn, evaluation, model, worker
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import IGNORE, DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.networks import EncoderDecoder, EncoderDecoderConfig, ViT, ViTConfig
from trunkline.modules.objectives.seq2seq import Seq2Seq, Written
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.optim import OptimizerConfig

# --- the loss


def slow_losses(net: EncoderDecoder, batch: Batch, smoothing: float = 0.0, z_loss: float = 0.0) -> list[Tensor]:
    """Of each counted token, one row at a time and without its padding."""
    losses = []
    for tokens, mask, before, targets in zip(
        batch["tokens"], batch["mask"], batch["target_tokens"], batch["targets"], strict=True
    ):
        length = int((targets != IGNORE).sum())
        if not length:
            continue
        logits = net(tokens[mask][None], before[None, :length])[0]
        for position in range(length):
            log_p = logits[position].log_softmax(0)
            right = log_p[targets[position]]
            partition = logits[position].logsumexp(0)
            losses.append(-(1 - smoothing) * right - smoothing * log_p.mean() + z_loss * partition**2)
    return losses


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
@pytest.mark.parametrize("options", [{}, {"output_bias": True, "tie_embeddings": False}, {"scale_output": True}])
def test_loss_and_gradients(smoothing: float, z_loss: float, options: dict[str, Any]) -> None:
    """The last batch has rows that only fill it up: they count nothing."""
    made = model(config(**options), label_smoothing=smoothing, z_loss=z_loss).double()
    data = Reversing(10, 4).batches()
    for batch in data:
        made.zero_grad()
        want = torch.stack(slow_losses(made.network, batch, smoothing, z_loss))
        want.sum().backward()
        gradients = {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}
        made.zero_grad()
        got = made.loss(batch)  # type: ignore[arg-type]
        got.total.backward()
        assert got.count == len(want)
        assert got.total.item() == pytest.approx(want.sum().item(), rel=1e-12)
        for name, p in made.network.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-8, atol=1e-12)
    assert not data[-1]["valid"].all()


def test_hyperparameters_are_plain_and_rebuild_it() -> None:
    generation = GenerationConfig(7, num_beams=3, length_penalty=0.6, no_repeat_ngram=3)
    made = model(label_smoothing=0.1, generation=generation, scores=("chrf", "rouge"), generated_rows=5)
    again = Seq2Seq(**json.loads(json.dumps(made.hparams)))
    assert again.network.config == made.network.config
    assert (again.generation, again.scores, again.generated_rows) == (generation, ["chrf", "rouge"], 5)
    assert again.label_smoothing == 0.1


def test_tokens_and_operations_of_a_step() -> None:
    """Per token 6 for each weight of a matrix, and attention's own products; the decoder reads S keys and T keys."""
    made, (batch,) = model(), Reversing(3, 4).batches()
    batch["target_tokens"], batch["targets"] = batch["target_tokens"][:, :-1], batch["targets"][:, :-1]
    rows, source, target = 4, batch["tokens"].shape[1], batch["tokens"].shape[1] - 1

    def matrices(trunk: Any, end: str = "weight") -> int:
        return sum(p.numel() for name, p in trunk.named_parameters() if p.ndim == 2 and name.endswith(end))

    keys = matrices(made.network.decoder, "cross_attn.kv.weight")
    over_source, over_target = matrices(made.network.encoder) + keys, matrices(made.network.decoder) - keys
    attention = 2 * 2 * 16 * (source * source + target * target + target * source)
    head = 2 * 9 * 16 * target
    want = 3 * rows * (2 * (source * over_source + target * over_target) + attention + head)
    assert made.flops_per_batch(batch) == want  # type: ignore[arg-type]
    count = made.batch_size(batch)  # type: ignore[arg-type]
    assert isinstance(count, Tensor)
    lengths = [len(row) + 1 for row in Reversing(3).sources]
    assert count == sum(lengths) + sum(min(length, target) for length in lengths)


# --- evaluation


@torch.no_grad()
def written_by_hand(net: EncoderDecoder, data: Reversing, limit: int = LENGTH) -> list[str]:
    """Greedy, one row at a time, without a cache."""
    texts = []
    for source in data.sources:
        ids = [START]
        while len(ids) <= limit and ids[-1] != END:
            ids.append(int(net(torch.tensor([[*source, END]]), torch.tensor([ids]))[0, -1].argmax()))
        texts.append(data.words.decode(ids[1:]))
    return texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Seq2Seq:
    """Has learnt to reverse letters."""
    optimizer = OptimizerConfig("muon", lr=0.02, warmup=0.1)
    made, run = model(config(32), noise=0.0, optimizer=optimizer), trainer(tmp_path_factory.mktemp("run"), max_epochs=1)
    run.fit(made, DataLoader(drawn(200, 32), batch_size=None))  # type: ignore[arg-type]
    return made.eval()


def test_learns_to_reverse(trained: Seq2Seq, tmp_path: Path) -> None:
    (got,) = trainer(tmp_path).validate(trained, datamodule=Reversing(60), verbose=False)
    assert got["val/exact"] > 0.8
    assert got["val/acc"] > 0.9
    assert got["val/bleu"] > 80
    assert got["val/chrf"] > 80


@pytest.mark.parametrize("stage", ["val", "test"])
def test_all_figures_against_slow_ones(stage: str, trained: Seq2Seq, tmp_path: Path) -> None:
    """Generated rows are limited in validation alone; a test has references of its own."""
    data, run = Reversing(10), trainer(tmp_path)
    made = model(config(32), scores=["exact", "bleu", "chrf", "rouge"], generated_rows=6)
    made.network.load_state_dict(trained.network.state_dict())
    (got,) = (run.validate if stage == "val" else run.test)(made, datamodule=data, verbose=False)
    rows = list(range(6 if stage == "val" else 10))
    predictions = [written_by_hand(made.network.eval(), data)[row] for row in rows]
    references = [data.pair(stage, row)[1] for row in rows]
    assert made.written == [
        Written(row, data.pair(stage, row)[0], *texts)
        for row, *texts in zip(rows, predictions, references, strict=True)
    ]
    losses = [loss.item() for batch in data.batches() for loss in slow_losses(made.network, batch)]
    mean = sum(losses) / len(losses)
    assert got[f"{stage}/loss"] == pytest.approx(mean, rel=1e-4)
    assert got[f"{stage}/ppl"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert got[f"{stage}/bleu"] == pytest.approx(corpus_bleu(predictions, [references]).score, rel=1e-6)
    assert got[f"{stage}/chrf"] == pytest.approx(corpus_chrf(predictions, [references]).score, rel=1e-6)
    exact = sum(ours == right for ours, right in zip(predictions, references, strict=True)) / len(rows)
    assert got[f"{stage}/exact"] == pytest.approx(exact)
    assert (exact > 0.5) == (stage == "val")  # in the test, references are capitals
    assert {f"{stage}/{name}" for name in ("rouge1", "rouge2", "rougeL", "acc")} < got.keys()
    assert made.signatures().keys() == {"bleu", "chrf"}
    assert "tok:13a" in made.signatures()["bleu"]


def test_options_of_generation(trained: Seq2Seq, tmp_path: Path) -> None:
    data = Reversing(6)
    for generation in (GenerationConfig(2, temperature=0), GenerationConfig(2, num_beams=3)):
        made = model(config(32), generation=generation)
        made.network.load_state_dict(trained.network.state_dict())
        trainer(tmp_path).validate(made, datamodule=data, verbose=False)
        assert all(len(text.prediction.split()) <= 2 for text in made.written)
        assert sum(text.reference.startswith(text.prediction) for text in made.written) >= 3
    made = model(config(32))
    trainer(tmp_path).validate(made, datamodule=Reversing(6, max_target_length=3), verbose=False)
    assert max(len(text.prediction.split()) for text in made.written) <= 3


def test_nothing_is_written_where_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scores, no texts in the data, no rows, or the check before training."""
    monkeypatch.setattr(EncoderDecoder, "decoder_of", lambda *_: pytest.fail("a text was written"))
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"scores": []}, {}),
        ({}, {"pair": None, "start_token": None, "tokenizer": None}),
        ({"generated_rows": 0}, {}),
    ]
    for options, facts in cases:
        (got,) = trainer(tmp_path).validate(model(**options), datamodule=Reversing(5, **facts), verbose=False)
        assert got.keys() == {"val/loss", "val/acc", "val/ppl", "val/truncated_pairs"}
    trainer(tmp_path, max_steps=1, num_sanity_val_steps=1).fit(model(), datamodule=Reversing(5))


def test_an_evaluation_forgets_the_one_before(trained: Seq2Seq, tmp_path: Path) -> None:
    for rows in (6, 3):
        trainer(tmp_path).validate(trained, datamodule=Reversing(rows), verbose=False)
        assert [text.row for text in trained.written] == list(range(rows))


@pytest.mark.parametrize("counts", [[4, 3], [7, 0], [1, 6]], ids=str)
def test_processes_write_together(counts: list[int], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [CONTEXT.Process(target=worker, args=(rank, counts, port, tmp_path)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    alone = evaluation([7])
    assert [text[0] for text in alone["written"]] == list(range(7))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["written"] == alone["written"]
        same = {name for name in alone["logged"] if name != "val/truncated_pairs"}
        assert {name: found["logged"][name] for name in same} == pytest.approx(
            {name: alone["logged"][name] for name in same}, rel=1e-5
        )
        assert found["lists"] == [0, 1, 2, 1, 2]
        assert found["sums"] == [10, 21]


# --- bad input


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"scores": ["exact", "meteor"]}, "there is no score meteor; choose among exact, bleu", "scores"),
        ({"tokenize": "words"}, "tokenize=words: sacreBLEU has no such tokenizer", "tokenize"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 up to below 1", "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss must be 0 or more", "z_loss"),
        ({"generated_rows": -1}, "generated_rows must be 0 or more, not -1; leave it out", "generated_rows"),
        (
            {"generation": GenerationConfig(9)},
            r"max_new_tokens is 9, but a target has at most 8 tokens \(max_target_length\); set it to at most 8",
            "generation.max_new_tokens",
        ),
        (
            {"generation": GenerationConfig(8, first_token=9)},
            "first_token is 9, but the target's vocabulary has 9 tokens; take the id from its tokenizer",
            "generation.first_token",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, field: str) -> None:
    with pytest.raises(TrunklineError, match=message) as caught:
        Seq2Seq(config(), **options)
    assert caught.value.field == f"model.{field}"


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        ({"start_token": None}, "start_token"),
        ({"end_token": None}, "end_token"),
        ({"start_token": None, "end_token": None, "tokenizer": None}, "start_token and end_token and tokenizer"),
    ],
)
def test_facts_that_are_missing(facts: dict[str, Any], missing: str, tmp_path: Path) -> None:
    message = f"^scores of generated texts need the data's {missing}, which it does not tell; use TranslationData, or"
    with pytest.raises(TrunklineError, match=message) as caught:
        trainer(tmp_path).validate(model(), datamodule=Reversing(5, **facts), verbose=False)
    assert caught.value.field == "model.scores"


def test_sharded_weights_write_no_texts() -> None:
    made = model()
    made.trainer = SimpleNamespace(datamodule=Reversing(5), strategy=FSDPStrategy())  # type: ignore[assignment]
    with pytest.raises(TrunklineError, match=r"FSDPStrategy shards them; set scores to \[\]"):
        made.setup("fit")
    made.scores = []
    made.setup("fit")


@pytest.mark.parametrize(
    ("name", "needed", "own"), [("max_target_length", 9, 8), ("max_length", 9, 8), ("target_vocab_size", 12, 10)]
)
def test_data_that_does_not_fit(name: str, needed: int, own: int) -> None:
    made = model(config(target_vocab_size=10))
    made.trainer = SimpleNamespace(datamodule=SimpleNamespace(facts=DataFacts(**{name: needed})))  # type: ignore[arg-type, assignment]
    message = f"the network has {name}={own}, but the data needs at least {needed}; leave {name} out of the network"
    with pytest.raises(TrunklineError, match=message) as caught:
        made.setup("fit")
    assert caught.value.field == f"model.network.{name}"


# --- sizes and weights from elsewhere


def test_sizes_come_from_the_data() -> None:
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2)
    facts = DataFacts(vocab_size=20, target_vocab_size=30, max_length=12, max_target_length=14)
    found = Seq2Seq(EncoderDecoderConfig(encoder=trunk, decoder=trunk), facts=facts).network.config
    assert (found.vocab_size, found.target_vocab_size, found.max_length, found.max_target_length) == (20, 30, 12, 14)


def saved(objective: str, module: Any, path: Path) -> str:
    content: dict[str, Any] = {"objective": objective, "hyper_parameters": {"network": module.hparams["network"]}}
    network = type(module.network)
    content |= {"state_dict": module.state_dict(), "classes": {"network": f"{network.__module__}.{network.__name__}"}}
    SafeCheckpointIO().save_checkpoint(content, path)
    return str(path)


def test_starts_from_trained_weights(tmp_path: Path) -> None:
    source = model()
    given = saved("Seq2Seq", source, tmp_path / "a.ckpt")
    made = Seq2Seq(config(), init_from=given)
    batch = drawn(1, 4)[0]
    assert mean_loss(made.eval(), batch) == mean_loss(source.eval(), batch)
    source.network.save_pretrained(tmp_path / "folder")
    made = Seq2Seq(config(), init_from=str(tmp_path / "folder"))
    assert mean_loss(made.eval(), batch) == mean_loss(source, batch)


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"positions": "none"}, "was trained with positions=learned, but the network has none", "network.positions"),
        ({"scale_embeddings": True}, "with scale_embeddings=False, .* set network.scale_embeddings to False", None),
        ({"share_embeddings": False}, "was trained with share_embeddings=True", "network.share_embeddings"),
        (
            {"decoder": TransformerConfig(dim=16, depth=1, num_heads=4)},
            "was trained with num_heads=2, but the network has 4; set network.decoder.num_heads to 2",
            "network.decoder.num_heads",
        ),
        ({"vocab_size": 12}, "token_embed.weight is (9, 16) there and (12, 16) here", "init_from"),
    ],
)
def test_weights_that_do_not_fit(options: dict[str, Any], message: str, field: str | None, tmp_path: Path) -> None:
    given = saved("Seq2Seq", model(), tmp_path / "a.ckpt")
    message = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(TrunklineError, match=message) as caught:
        Seq2Seq(config(**options), init_from=given)
    assert field is None or caught.value.field == f"model.{field}"


def test_weights_of_another_network(tmp_path: Path) -> None:
    ViT(ViTConfig(8, 4, backbone=TransformerConfig(dim=16, depth=1, num_heads=2))).save_pretrained(tmp_path)
    with pytest.raises(TrunklineError, match="holds a ViT; give a checkpoint or a folder of EncoderDecoder or BERT"):
        Seq2Seq(config(), init_from=str(tmp_path))
