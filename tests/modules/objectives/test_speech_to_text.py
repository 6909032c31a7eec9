"""SpeechToText: what it adds to Seq2Seq: frames as the source, several start tokens, error rates."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import trainer
from tiny_speech import END, FRAMES, LANGUAGE, LONGEST, MELS, START, Batch, Tones, V, drawn, noisy, padded
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import IGNORE
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.metrics.translation import translation_scores
from trunkline.modules.networks.whisper import Whisper, WhisperConfig
from trunkline.modules.objectives.seq2seq import Written
from trunkline.modules.objectives.speech_to_text import SpeechToText
from trunkline.modules.training.optim import OptimizerConfig


def config(dim: int = 16, **options: Any) -> WhisperConfig:
    trunk = TransformerConfig(dim=dim, depth=1, num_heads=2)
    sizes = {"vocab_size": V, "num_mels": MELS, "max_frames": FRAMES, "max_target_length": LONGEST + 2}
    return WhisperConfig(**{**sizes, "encoder": trunk, "decoder": trunk, **options})  # type: ignore[arg-type]


def model(network: WhisperConfig | None = None, noise: float = 0.3, **options: Any) -> SpeechToText:
    torch.manual_seed(0)
    options = {"optimizer": OptimizerConfig(lr=0.01, warmup=0.1), **options}
    made: SpeechToText = noisy(SpeechToText(network or config(), **options), noise)
    return made


def slow_losses(net: Whisper, batch: Batch) -> list[Tensor]:
    """Of each token of the texts, one clip at a time and without its padding; nothing for the start tokens."""
    losses = []
    for features, mask, before, targets in zip(
        *(batch[name] for name in ("features", "mask", "target_tokens", "targets")), strict=True
    ):
        log_probs = net(features[mask][None], before[None])[0].log_softmax(1)
        losses += [-row[token] for row, token in zip(log_probs, targets, strict=True) if token != IGNORE]
    return losses


def test_loss_and_gradients() -> None:
    """The last batch has rows that only fill it up: they count nothing."""
    made = model().double()
    for batch in Tones(10, kind="decoder").batches():
        batch["features"] = batch["features"].double()
        made.zero_grad()
        want = torch.stack(slow_losses(made.network, batch))  # type: ignore[arg-type]
        want.sum().backward()
        gradients = {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}
        made.zero_grad()
        got = made.loss(batch)
        got.total.backward()
        assert got.count == len(want)
        assert got.total.item() == pytest.approx(want.sum().item(), rel=1e-10)
        for name, p in made.network.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-7, atol=1e-10)


def test_seconds_and_operations_of_a_step() -> None:
    made, (batch, *_) = model(), Tones(4, kind="decoder").batches()
    made.trainer = SimpleNamespace(datamodule=Tones(kind="decoder"))  # type: ignore[assignment]
    assert made.batch_size(batch) == batch["mask"].sum()
    assert (made.unit, made.unit_size) == ("audio_seconds", 0.25)
    assert made.flops_per_batch(batch) > 0
    shape = made(batch["features"], batch["target_tokens"], batch["mask"]).shape
    assert shape == (*batch["target_tokens"].shape, V)


# --- evaluation


@torch.no_grad()
def written_by_hand(net: Whisper, data: Tones, longest: int = LONGEST + 1) -> list[str]:
    """Greedy, one clip at a time, without a cache."""
    texts = []
    for batch in data.batches():
        for features, mask in zip(batch["features"][batch["valid"]], batch["mask"][batch["valid"]], strict=True):
            ids = [START, LANGUAGE]
            while len(ids) < longest + 2 and ids[-1] != END:
                ids.append(int(net(features[mask][None], torch.tensor([ids]))[0, -1].argmax()))
            texts.append(data.words.decode(ids))
    return texts


def trained(folder: Path, steps: int) -> SpeechToText:
    made = model(config(32), noise=0.0, optimizer=OptimizerConfig("muon", lr=0.02, warmup=0.1))
    run = trainer(folder, max_epochs=1)
    run.fit(made, DataLoader(drawn(steps, 32, "decoder"), batch_size=None))  # type: ignore[arg-type]
    return made.eval()


@pytest.fixture(scope="module")
def beginner(tmp_path_factory: pytest.TempPathFactory) -> SpeechToText:
    """Writes texts of different lengths, many of them wrong."""
    return trained(tmp_path_factory.mktemp("run"), 15)


def test_learns_to_hear(tmp_path: Path) -> None:
    made = trained(tmp_path, 100)
    (got,) = trainer(tmp_path).validate(made, datamodule=Tones(40, kind="decoder"), verbose=False)
    assert got["val/cer"] < 0.1
    assert got["val/wer"] < 0.2
    assert got["val/exact"] > 0.8


@pytest.mark.parametrize("stage", ["val", "test"])
def test_all_figures_against_slow_ones(stage: str, beginner: SpeechToText, tmp_path: Path) -> None:
    """Texts begin after both start tokens."""
    data, run, made = Tones(10, kind="decoder"), trainer(tmp_path), beginner
    (got,) = (run.validate if stage == "val" else run.test)(made, datamodule=data, verbose=False)
    net: Any = made.network.eval()
    predictions, references = written_by_hand(net, data), [data.transcript(stage, row) for row in range(10)]
    assert made.written == [
        Written(row, f"{stage}{row}", *texts) for row, texts in enumerate(zip(predictions, references, strict=True))
    ]
    losses = torch.stack([loss for batch in data.batches() for loss in slow_losses(net, batch)])
    scores = translation_scores(predictions, references, ["cer", "wer", "exact"])
    found = {name: got[f"{stage}/{name}"] for name in ("loss", "ppl", *scores)}
    assert found == pytest.approx({"loss": losses.mean().item(), "ppl": losses.mean().exp().item(), **scores}, rel=1e-5)
    assert len(set(predictions)) > 1
    assert scores["cer"] > 0
    assert got[f"{stage}/skipped_clips"] == 0


def test_start_tokens_leave_less_room(beginner: SpeechToText, tmp_path: Path) -> None:
    """Whatever `generation` allows, the decoder never forgets its start tokens."""
    data = Tones(10, kind="decoder")
    for allowed, longest in ((LONGEST + 2, LONGEST + 1), (2, 2)):
        made = model(config(32), generation=GenerationConfig(allowed, temperature=0))
        made.network.load_state_dict(beginner.network.state_dict())
        with torch.no_grad():
            made.network.target_embed.weight[END] = 0.0  # it hardly ends a text
        trainer(tmp_path).validate(made, datamodule=data, verbose=False)
        want = written_by_hand(made.network.eval(), data, longest)  # type: ignore[arg-type]
        assert [text.prediction for text in made.written] == want
        assert max(map(len, want)) == longest


def test_one_start_token_and_clips_without_names(tmp_path: Path) -> None:
    data = Tones(3, kind="decoder", start_tokens=None, start_token=START, row_name=None)
    made = model()
    trainer(tmp_path).validate(made, datamodule=data, verbose=False)
    assert [text.source for text in made.written] == ["row 0", "row 1", "row 2"]
    data.facts.pair = lambda split, row: (f"a clip of {split}", "what was said")
    trainer(tmp_path).validate(made, datamodule=data, verbose=False)
    assert {text[1::2] for text in made.written} == {("a clip of val", "what was said")}


def test_data_without_transcripts(tmp_path: Path) -> None:
    (got,) = trainer(tmp_path).validate(model(), datamodule=Tones(5, kind="decoder", transcript=None), verbose=False)
    assert got.keys() == {f"val/{name}" for name in ("loss", "acc", "ppl", "skipped_clips", "truncated_clips")}
    message = "need the data's start_token and end_token, which it does not tell; use SpeechData, or set scores"
    with pytest.raises(TrunklineError, match=message):
        trainer(tmp_path).validate(model(), datamodule=Tones(5), verbose=False)


# --- sizes and weights from elsewhere


def test_hyperparameters_are_plain_and_rebuild_it() -> None:
    made = model(generation=GenerationConfig(7, num_beams=3), scores=("wer",), label_smoothing=0.1, generated_rows=4)
    again = SpeechToText(**json.loads(json.dumps(made.hparams)))
    assert again.network.config == made.network.config
    assert (again.generation, again.scores, again.generated_rows) == (GenerationConfig(7, num_beams=3), ["wer"], 4)


def test_sizes_come_from_the_data() -> None:
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2)
    found = SpeechToText(WhisperConfig(encoder=trunk, decoder=trunk), facts=Tones(kind="decoder").facts).network.config
    sizes = (found.vocab_size, found.num_mels, found.max_frames, found.max_target_length)
    assert sizes == (V, MELS, FRAMES, LONGEST + 2)


def test_starts_from_trained_weights(tmp_path: Path) -> None:
    source = model()
    source.network.save_pretrained(tmp_path)
    made = SpeechToText(config(), init_from=str(tmp_path))
    (batch,) = drawn(1, 4, "decoder")
    assert torch.equal(made.eval().loss(batch).total, source.eval().loss(batch).total)
    with pytest.raises(TrunklineError, match="was trained with target_positions=learned, but the network has none"):
        SpeechToText(config(target_positions="none"), init_from=str(tmp_path))


def test_tones_for_a_decoder() -> None:
    """What the decoder reads at a place is what it had to predict one place before."""
    batch = Tones(6, size=6, kind="decoder").batches()[0]
    assert (batch["target_tokens"][:, :2] == torch.tensor([START, LANGUAGE])).all()
    for before, targets in zip(batch["target_tokens"].tolist(), batch["targets"].tolist(), strict=True):
        text = [token for token in targets if token != IGNORE]
        assert before[2 : len(text) + 1] == text[:-1]
        assert text[-1] == END
        assert targets[0] == IGNORE
    assert padded([[1], []], 0).tolist() == [[1], [0]]
