"""SpeechRecognizer: its loss against a slow loop, and the texts that it hears, on one and two processes."""

import json
import math
import socket
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded_run import CONTEXT
from tiny import mean_loss, trainer
from tiny_speech import (
    FRAMES,
    MELS,
    Batch,
    Tones,
    V,
    drawn,
    encoder,
    evaluation,
    gpt,
    recognizer,
    worker,
)
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import IGNORE, DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.ctc_beams import CTCDecoding, LanguageModel, ctc_beams
from trunkline.modules.networks import SpeechEncoder, SpeechEncoderConfig
from trunkline.modules.objectives.speech_recognizer import Heard, SpeechRecognizer
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.optim import OptimizerConfig

# --- the loss


def slow_loss(log_probs: Tensor, text: list[int]) -> Tensor:
    """-log of the sum over all paths through the states (T, V + 1) that read as the text, state by state."""
    blank, nothing = log_probs.shape[1] - 1, torch.full((), -math.inf, dtype=log_probs.dtype)
    chain = [blank, *(entry for token in text for entry in (token, blank))]
    ways = [torch.zeros((), dtype=log_probs.dtype)] + [nothing] * (len(chain) - 1)
    for row in log_probs:
        grown = []
        for place, entry in enumerate(chain):
            before = ways[max(0, place - 1) : place + 1]
            if place > 1 and entry not in (blank, chain[place - 2]):
                before = [ways[place - 2], *before]
            before = [way for way in before if way > -math.inf]
            grown.append(torch.stack(before).logsumexp(0) + row[entry] if before else nothing)
        ways = grown
    return -torch.stack([way for way in ways[-2:] if way > -math.inf]).logsumexp(0)


def slow_losses(net: SpeechEncoder, batch: Batch) -> list[tuple[Tensor, int]]:
    """Loss and number of tokens of each clip that counts, alone and without its padding."""
    found = []
    for features, mask, targets, valid in zip(
        *(batch[name] for name in ("features", "mask", "targets", "valid")), strict=True
    ):
        text = targets[targets != IGNORE].tolist()
        log_probs = net(features[mask][None].to(net.head.weight.dtype))[0].log_softmax(1)
        repeats = sum(one == other for one, other in pairwise(text))
        if valid and len(text) + repeats <= len(log_probs):
            found.append((slow_loss(log_probs, text), max(1, len(text))))
    return found


def hard_batch() -> Batch:
    """Of five clips one has no text, one too long a text, one a repetition too much, and one only fills up."""
    batch = Tones(6, size=5).collate(range(5))
    batch["targets"] = torch.nn.functional.pad(batch["targets"], (0, 1), value=IGNORE)
    batch["targets"][1] = IGNORE
    batch["mask"][2, 9:] = False  # 5 states
    batch["targets"][2] = torch.tensor([3, 4, 5, 3, 4, 5, IGNORE])
    batch["mask"][3, 10:] = False  # 5 states
    batch["targets"][3] = torch.tensor([3, 3, 3, 4, IGNORE, IGNORE, IGNORE])
    batch["valid"][4] = False
    return batch


def test_loss_and_gradients() -> None:
    made, batch = recognizer().double(), hard_batch()
    want = slow_losses(made.network, batch)
    assert len(want) == 2
    sum(loss for loss, _ in want).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}
    made.zero_grad()
    batch["features"] = batch["features"].double()
    got = made.loss(batch)  # type: ignore[arg-type]
    got.total.backward()
    assert got.count == sum(tokens for _, tokens in want)
    assert got.total.item() == pytest.approx(sum(loss.item() for loss, _ in want), rel=1e-10)
    for name, p in made.network.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-7, atol=1e-9)


def test_a_batch_in_which_no_text_fits() -> None:
    made, batch = recognizer(), hard_batch()
    batch["targets"] = torch.full((5, 40), 3)
    loss = made.loss(batch)  # type: ignore[arg-type]
    loss.total.backward()
    assert (loss.total, loss.count) == (0, 0)
    assert all((p.grad == 0).all() for p in made.network.parameters())


def test_clips_that_do_not_fit_are_counted_and_named_once(tmp_path: Path) -> None:
    class Hard(Tones):
        def train_dataloader(self) -> Any:
            return DataLoader([hard_batch()] * 2, batch_size=None)  # type: ignore[arg-type]

        val_dataloader = train_dataloader

    made, run = recognizer(), trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(made, datamodule=Hard())
    found = sorted(str(warning.message) for warning in caught if "too long" in str(warning.message))
    assert [text.partition(", and maybe")[0] for text in found] == [
        f"transcripts too long for their clips in {split}: {split}2 (needs 6 states, has 5), {split}3 (needs 6 states, "
        "has 5)"
        for split in ("train", "val")
    ]
    assert "counted as train/unfit_clips" in found[0]
    assert "one state for 2 frames" in found[0]
    assert run.callback_metrics["train/unfit_clips"] == run.callback_metrics["val/unfit_clips"] == 4
    assert math.isfinite(run.callback_metrics["train/loss"])
    made = recognizer()
    made.trainer = SimpleNamespace(datamodule=Tones(row_name=None))  # type: ignore[assignment]
    unfit = torch.tensor([False, False, True, False, False])
    assert "clips in val: row 2 (needs 6" in made.what_is_unfit(hard_batch(), unfit, "val")  # type: ignore[arg-type]


def test_hyperparameters_are_plain_and_rebuild_it() -> None:
    made = recognizer(decoding=CTCDecoding(7, lm_weight=0.3, length_bonus=1.0), scores=("wer",))
    again = SpeechRecognizer(**json.loads(json.dumps(made.hparams)))
    assert again.network.config == made.network.config
    assert (again.decoding, again.scores) == (CTCDecoding(7, lm_weight=0.3, length_bonus=1.0), ["wer"])


def test_seconds_and_operations_of_a_step() -> None:
    """Frames are counted, without padding and fillers, and shown as seconds."""
    made, batch = recognizer(), hard_batch()
    made.trainer = SimpleNamespace(datamodule=Tones())  # type: ignore[assignment]
    assert made.batch_size(batch) == batch["mask"][:4].sum()
    assert (made.unit, made.unit_size) == ("audio_seconds", 0.25)
    del batch["mask"]
    assert made.batch_size(batch) == 4 * batch["features"].shape[1]
    made.trainer = SimpleNamespace(datamodule=None)  # type: ignore[assignment]
    assert made.unit_size == 0.01
    one, two = (made.flops_per_batch(drawn(1, size)[0]) for size in (2, 4))  # type: ignore[arg-type]
    assert two > one > 0


# --- evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SpeechRecognizer:
    """Has learnt to hear letters."""
    optimizer = OptimizerConfig("muon", lr=0.02, warmup=0.1)
    made = recognizer(encoder(32), noise=0.0, optimizer=optimizer)
    run = trainer(tmp_path_factory.mktemp("run"), max_epochs=1)
    run.fit(made, DataLoader(drawn(100, 32), batch_size=None))  # type: ignore[arg-type]
    return made.eval()


def test_learns_to_hear(trained: SpeechRecognizer, tmp_path: Path) -> None:
    (got,) = trainer(tmp_path).validate(trained, datamodule=Tones(60), verbose=False)
    assert got["val/cer"] < 0.1
    assert got["val/wer"] < 0.2
    assert got["val/exact"] > 0.8


@torch.no_grad()
def heard_by_hand(net: SpeechEncoder, batch: Batch) -> list[str]:
    """Greedy, one clip at a time, without its padding; texts of the valid clips."""
    texts = []
    for features, mask in zip(batch["features"][batch["valid"]], batch["mask"][batch["valid"]], strict=True):
        path = net(features[mask][None])[0].argmax(1).tolist()
        kept = [token for place, token in enumerate(path) if token != V and path[place - 1 : place] != [token]]
        texts.append("".join({2: " ", 3: "a", 4: "b", 5: "c"}.get(token, "") for token in kept))
    return texts


def slow_rate(predictions: list[list[str]], references: list[list[str]]) -> float:
    edits = 0
    for ours, right in zip(predictions, references, strict=True):
        table = [[m + n if not m or not n else 0 for n in range(len(right) + 1)] for m in range(len(ours) + 1)]
        for m in range(1, len(ours) + 1):
            for n in range(1, len(right) + 1):
                replaced = table[m - 1][n - 1] + (ours[m - 1] != right[n - 1])
                table[m][n] = min(table[m - 1][n] + 1, table[m][n - 1] + 1, replaced)
        edits += table[-1][-1]
    return edits / sum(map(len, references))


@pytest.mark.parametrize("stage", ["val", "test"])
def test_all_figures_against_slow_ones(stage: str, tmp_path: Path) -> None:
    """Of a network that is often wrong; a test has transcripts of its own."""
    data, run, made = Tones(10), trainer(tmp_path), recognizer()
    (got,) = (run.validate if stage == "val" else run.test)(made, datamodule=data, verbose=False)
    predictions = [text for batch in data.batches() for text in heard_by_hand(made.network.eval(), batch)]
    references = [data.transcript(stage, row) for row in range(10)]
    assert made.written == [Heard(row, *texts) for row, texts in enumerate(zip(predictions, references, strict=True))]
    losses = [entry for batch in data.batches() for entry in slow_losses(made.network, batch)]
    want = {
        "loss": sum(loss.item() for loss, _ in losses) / sum(tokens for _, tokens in losses),
        "cer": slow_rate([list(" ".join(text.split())) for text in predictions], [list(text) for text in references]),
        "wer": slow_rate([text.split() for text in predictions], [text.split() for text in references]),
        "exact": sum(ours.strip() == right for ours, right in zip(predictions, references, strict=True)) / 10,
    }
    want |= {"skipped_clips": 0.0, "truncated_clips": 0.0, "unfit_clips": 0.0}
    assert got == pytest.approx({f"{stage}/{name}": value for name, value in want.items()}, rel=1e-5)
    assert want["cer"] > 0


def test_beams_and_a_language_model(tmp_path: Path) -> None:
    """The language model changes texts, and is no part of the checkpoint."""
    data, network = Tones(6, size=6), gpt()
    made = recognizer(decoding=CTCDecoding(4, lm_weight=2.0))
    before, (batch,) = set(made.state_dict()), data.batches()
    texts = {}
    for model in (None, LanguageModel(network, start=0, end=1)):
        made.language_model = model
        trainer(tmp_path).validate(made, datamodule=data, verbose=False)
        with torch.no_grad():
            found = ctc_beams(*made.eval().log_probs(batch), made.decoding, model)  # type: ignore[arg-type]
        want = data.words.decode_batch([beams[0].tokens for beams in found], skip_special_tokens=True)
        texts[model is None] = [text.prediction for text in made.written]
        assert texts[model is None] == want
    assert texts[True] != texts[False]
    assert set(made.state_dict()) == before


def test_predictions(tmp_path: Path, trained: SpeechRecognizer) -> None:
    data = Tones(6)
    found: Any = trainer(tmp_path).predict(trained, data.val_dataloader())
    assert torch.cat([part["index"] for part in found]).tolist() == list(range(6))
    texts = [text for part in found for text in data.words.decode_batch(part["tokens"])]
    trainer(tmp_path).validate(trained, datamodule=data, verbose=False)
    assert texts == [text.prediction for text in trained.written]
    assert trained(torch.zeros(1, 8, MELS)).shape == (1, 4, V + 1)


def test_nothing_is_written_where_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scores, no transcripts in the data, or the check before training."""
    monkeypatch.setattr(SpeechRecognizer, "tokens", lambda *_: pytest.fail("a text was written"))
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [({"scores": []}, {}), ({}, {"transcript": None})]
    for options, facts in cases:
        (got,) = trainer(tmp_path).validate(recognizer(**options), datamodule=Tones(5, **facts), verbose=False)
        assert got.keys() == {"val/loss", "val/skipped_clips", "val/truncated_clips", "val/unfit_clips"}
    trainer(tmp_path, max_steps=1, num_sanity_val_steps=1).fit(recognizer(), datamodule=Tones(5))


def test_an_evaluation_forgets_the_one_before(trained: SpeechRecognizer, tmp_path: Path) -> None:
    for rows in (6, 3):
        trainer(tmp_path).validate(trained, datamodule=Tones(rows), verbose=False)
        assert [text.row for text in trained.written] == list(range(rows))


@pytest.mark.parametrize("counts", [[4, 3], [7, 0]], ids=str)
def test_processes_hear_together(counts: list[int], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = {"recognizer": (recognizer, Tones)}
    processes = [CONTEXT.Process(target=worker, args=(rank, jobs, counts, port, tmp_path)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    alone = evaluation(recognizer, Tones(7), [7])
    assert [text[0] for text in alone["written"]] == list(range(7))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")["recognizer"]
        assert found["written"] == alone["written"]
        assert found["logged"] == pytest.approx(alone["logged"], rel=1e-5)


# --- bad input, sizes and weights from elsewhere


def test_bad_options() -> None:
    with pytest.raises(TrunklineError, match=r"there is no score ser; choose among exact, .* wer, cer") as caught:
        recognizer(scores=["ser"])
    assert caught.value.field == "model.scores"


def test_transcripts_without_a_tokenizer(tmp_path: Path) -> None:
    message = "^scores of transcripts need the data's tokenizer, which it does not tell; use SpeechData, or set scores"
    with pytest.raises(TrunklineError, match=message) as caught:
        trainer(tmp_path).validate(recognizer(), datamodule=Tones(5, tokenizer=None), verbose=False)
    assert caught.value.field == "model.scores"


def test_sizes_come_from_the_data() -> None:
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2)
    found = SpeechRecognizer(SpeechEncoderConfig(backbone=trunk), facts=Tones().facts).network
    assert (found.config.vocab_size, found.config.num_mels, found.config.max_frames) == (V, MELS, FRAMES)
    assert (found.blank, found.head.out_features) == (V, V + 1)
    made = recognizer()
    made.trainer = SimpleNamespace(datamodule=SimpleNamespace(facts=DataFacts(num_mels=80)))  # type: ignore[arg-type, assignment]
    with pytest.raises(TrunklineError, match=f"the network has num_mels={MELS}, but the data needs 80"):
        made.setup("fit")


def test_starts_from_trained_weights(tmp_path: Path) -> None:
    source = recognizer()
    content: dict[str, Any] = {"objective": "SpeechRecognizer", "hyper_parameters": dict(source.hparams)}
    content |= {"state_dict": source.state_dict()}
    content["classes"] = {"network": "trunkline.modules.networks.speech_encoder.SpeechEncoder"}
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    source.network.save_pretrained(tmp_path / "folder")
    batch = drawn(1, 4)[0]
    for given in ("a.ckpt", "folder"):
        made = SpeechRecognizer(encoder(), init_from=str(tmp_path / given))
        assert mean_loss(made.eval(), batch) == mean_loss(source.eval(), batch)
