"""What TensorBoard shows of a recogniser of speech, read back from its event files."""

import io
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_run import logged_picture, logged_texts, logged_trainer
from tiny_speech import END, FRAMES, LANGUAGE, MELS, NAMES, SPACE, START, Tones, V, letters, noisy, recognizer
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.contract import IGNORE, DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.callbacks import Transcripts
from trunkline.modules.callbacks.drawing import GREEN, LINE, RED, play
from trunkline.modules.callbacks.spectrograms import COLUMN, Mark, spectrogram
from trunkline.modules.callbacks.speech import (
    DrawnClip,
    ctc_marks,
    draw_attention,
    draw_clip,
    spoken_attention,
    worst_clips,
)
from trunkline.modules.metrics.error_rates import edit_distance
from trunkline.modules.networks import Whisper, WhisperConfig
from trunkline.modules.objectives.speech_recognizer import SpeechRecognizer
from trunkline.modules.objectives.speech_to_text import SpeechToText
from trunkline.modules.training.optim import OptimizerConfig

RATE = 8000


def waveform(split: str, row: int) -> Tensor:
    assert split == "val"
    return torch.sin(torch.arange(1000 + row) / 7) * (1.2 if row == 0 else 0.5)


def tones(**options: Any) -> Tones:
    return Tones(rows=7, **{"size": 4, "waveform": waveform, "sample_rate": RATE, **options})


def whisper(noise: float = 0.4) -> WhisperConfig:
    trunk = TransformerConfig(dim=16, depth=2, num_heads=2)
    return WhisperConfig(V, MELS, FRAMES, max_target_length=9, encoder=trunk, decoder=trunk)


def writer_of_texts(**options: Any) -> SpeechToText:
    torch.manual_seed(0)
    made: SpeechToText = noisy(SpeechToText(whisper(), optimizer=OptimizerConfig(lr=0.01, warmup=0.1), **options), 0.3)
    return made


def untrained(seed: int) -> SpeechRecognizer:
    """Hears letters, and weights that do not change in training."""
    model = recognizer(noise=0.5, optimizer=OptimizerConfig(lr=1e-12, warmup=0.1))
    torch.manual_seed(seed)
    nn.init.normal_(model.network.head.weight, std=1.5)
    with torch.no_grad():
        model.network.head.bias[[START, END, SPACE, LANGUAGE]] = -1e4
    return model.eval()


def marks_of(model: SpeechRecognizer, batch: Any) -> list[tuple[list[Mark], list[Mark]]]:
    return ctc_marks(model.network, batch, letters())


@dataclass
class Done:
    """A short training."""

    model: Any
    callback: Transcripts
    found: EventAccumulator

    def texts(self, tag: str) -> dict[int, str]:
        return logged_texts(self.found, tag)

    def picture(self, tag: str) -> np.ndarray:
        return logged_picture(self.found, tag)


def run(folder: Path, model: Any, data: Tones, callback: Transcripts, *others: Any, epochs: int = 2) -> Done:
    """Train for 3 steps an epoch, with a validation after each."""
    logged_trainer(folder, callback, *others, max_epochs=epochs, log_every_n_steps=1).fit(model, datamodule=data)
    model.eval()
    return Done(
        model, callback, EventAccumulator(str(folder), dict.fromkeys(("images", "tensors", "audio"), 0)).Reload()
    )


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


# --- a run with CTC


class TestCTC:
    @pytest.fixture(scope="class")
    def done(self, tmp_path_factory: pytest.TempPathFactory) -> Done:
        """The transcripts are what they hear, and after it 0, 1 or 2 letters more."""
        model, data = untrained(1), tones()
        with torch.no_grad():
            heard = ["".join(mark.text for mark in marks) for _, marks in marks_of(model, data.collate(range(7)))]
        assert len(set(heard)) == 7
        texts = [text + "c" * (row % 3) for row, text in enumerate(heard)]
        data = tones(transcript=lambda split, row: texts[row])
        return run(tmp_path_factory.mktemp("ctc"), model, data, Transcripts(clips=3, rows=4), epochs=2)

    def test_what_is_there(self, done: Done) -> None:
        tags = done.found.Tags()
        assert tags["images"] == ["val/transcripts"]
        assert tags["audio"] == [f"val/audio/{row}" for row in range(3)]
        assert [e.step for e in done.found.Images("val/transcripts")] == [3, 6]  # not at the sanity check
        assert list(done.texts("val/worst")) == [3, 6]

    def test_frames_tell_right_from_wrong(self, done: Done) -> None:
        shown, top = done.picture("val/transcripts"), 0
        # lane, spectrogram of 6 bins with 15 pixels each, lane, seconds, two texts; frame and caption around them
        height = 4 * LINE + 90 + LINE + 6 + LINE
        assert shown.shape[0] == 3 * height
        for colour in (GREEN, RED, RED):
            assert tuple(shown[top, 0]) == colour
            top += height

    def test_the_worst_come_first(self, done: Done) -> None:
        texts = {row: done.model.written[row] for row in (1, 2, 4, 5)}
        shares = {row: (row % 3) / len(text.reference) for row, text in texts.items()}
        found = rows_of(done.texts("val/worst")[6])
        assert [row for row, *_ in found] == [f"val{row}" for row in sorted(shares, key=lambda row: -shares[row])]
        for name, reference, prediction, words, characters in found:
            row = int(name.removeprefix("val"))
            assert (reference, prediction) == (texts[row].reference, texts[row].prediction)
            assert reference == prediction + "c" * (row % 3)
            assert characters == f"{row % 3} of {len(reference)}"
            assert words == f"1 of {len(reference.split())}"

    def test_sound_is_there_once(self, done: Done) -> None:
        for row in range(3):
            (event,) = done.found.Audio(f"val/audio/{row}")
            assert (event.step, event.sample_rate) == (3, RATE)
            samples, rate = soundfile.read(io.BytesIO(event.encoded_audio_string), dtype="float32")
            assert rate == RATE
            np.testing.assert_allclose(samples, waveform("val", row).clamp(-1, 1), atol=1e-4)

    def test_the_clips_that_are_drawn(self, done: Done) -> None:
        data = tones()
        assert [clip.row for clip in done.callback.shown] == [0, 1, 2]
        batch = data.collate([0, 1, 2, 3])
        for clip, features, mask in zip(done.callback.shown, batch["features"], batch["mask"], strict=False):
            torch.testing.assert_close(clip.features, features[mask])
            assert "".join(mark.text for mark in clip.said).replace("␣", " ") == data.transcript("val", clip.row)
            assert "".join(mark.text for mark in clip.heard) == done.model.written[clip.row].prediction


# --- a run with a decoder


def test_a_decoder(tmp_path: Path) -> None:
    data = tones(kind="decoder")
    done = run(tmp_path, writer_of_texts(), data, Transcripts(clips=2))
    assert done.found.Tags()["images"] == ["val/transcripts", "val/alignment"]
    assert done.found.Tags()["audio"] == ["val/audio/0", "val/audio/1"]
    assert all(not clip.said and not clip.heard for clip in done.callback.shown)
    assert done.callback.attention is not None
    weights, names = done.callback.attention
    text = [NAMES[token] for token in data.texts[0]]
    assert names == [*("␣" if letter == " " else letter for letter in text), "</s>"]
    want, _ = spoken_attention(done.model.network, data.collate([0, 1, 2, 3]), letters(), None)
    torch.testing.assert_close(weights, want)  # the weights of the last validation are those of now
    assert [row[0] for row in rows_of(done.texts("val/worst")[6])]
    # spectrogram and seconds, then a line for each token; to the left, names of 4 letters and a gap
    frames = len(done.callback.shown[0].features)
    assert done.picture("val/alignment").shape == (90 + LINE * (1 + len(names)), 5 * COLUMN + 4 * frames, 3)


def test_averaged_weights_are_shown(tmp_path: Path) -> None:
    """Those that the validation uses, wherever the callback stands in the list."""
    used: list[list[str]] = []

    class Witness(Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
            if not trainer.sanity_checking:
                found = ctc_marks(pl_module.network, batch, letters())
                used.append([mark.text for _, heard in found for mark in heard])

    data = tones(size=7)
    done = run(tmp_path, recognizer(), data, Transcripts(clips=7), Witness(), EMAWeightAveraging(decay=0.7), epochs=4)
    assert [mark.text for clip in done.callback.shown for mark in clip.heard] == used[-1]
    assert len({tuple(texts) for texts in used}) > 1


# --- tokens at their frames


@torch.no_grad()
def test_tokens_that_are_heard_stand_where_the_likeliest_path_has_them() -> None:
    model, batch = untrained(1), tones().collate([0, 1, 2, 3])
    found = marks_of(model, batch)
    assert sum(len(heard) for _, heard in found) > 8
    for row, (_, heard) in enumerate(found):
        clip = batch["features"][row : row + 1, : int(batch["mask"][row].sum())]
        path, want, at = model.network(clip)[0].argmax(dim=1).tolist(), [], 0
        for token, states in groupby(path):
            end = at + len(list(states))
            if token != V:
                want.append((NAMES[token], 2 * at, 2 * end))  # a state stands for 2 frames
            at = end
        assert [mark[:3] for mark in heard] == want


@torch.no_grad()
def test_tokens_that_are_said_stand_where_the_likeliest_of_their_paths_has_them() -> None:
    """Against all ways to say the text of a short clip."""
    model = untrained(2)
    batch = {"features": torch.randn(1, 8, MELS), "mask": torch.ones(1, 8, dtype=torch.bool)}
    batch |= {"targets": torch.tensor([[3, 4]])}
    log_probs = model.network(batch["features"])[0].log_softmax(dim=1)
    assert log_probs.shape == (4, V + 1)
    best: tuple[float, list[int]] = (-np.inf, [])
    for path in torch.cartesian_prod(*[torch.arange(V + 1)] * 4).tolist():
        if [token for token, _ in groupby(path) if token != V] == [3, 4]:
            best = max(best, (float(sum(log_probs[t, token] for t, token in enumerate(path))), path))
    ((said, _),) = marks_of(model, batch)
    assert [mark.text for mark in said] == ["a", "b"]
    for token, mark in zip((3, 4), said, strict=True):
        assert [t for t in range(4) if best[1][t] == token] == list(range(mark.start // 2, mark.end // 2))


@torch.no_grad()
def test_wrong_tokens_are_marked_on_both_sides() -> None:
    data, model = tones(), untrained(1)
    batch = data.collate([0, 1, 2, 3])
    found = marks_of(model, batch)
    for row, (said, heard) in enumerate(found):
        edits = edit_distance([mark.text for mark in heard], [mark.text for mark in said])
        assert max(sum(mark.wrong for mark in said), sum(mark.wrong for mark in heard)) <= edits
        right = [[mark.text for mark in side if not mark.wrong] for side in (said, heard)]
        assert right[0] == right[1]
        batch["targets"][row] = IGNORE  # now the text is what was heard
        tokens = [NAMES.index(mark.text) for mark in heard]
        batch["targets"] = nn.functional.pad(batch["targets"], (0, max(0, len(tokens) - 6)), value=IGNORE)
        batch["targets"][row, : len(tokens)] = torch.tensor(tokens)
    for said, heard in marks_of(model, batch):
        assert said == heard
        assert not any(mark.wrong for mark in said)


@torch.no_grad()
def test_a_text_that_does_not_fit_has_no_frames() -> None:
    model, batch = untrained(1), tones().collate([0, 1])
    batch["targets"] = torch.full((4, 50), 3)
    for said, heard in marks_of(model, batch):
        assert said == []
        assert heard
    nn.init.zeros_(model.network.head.weight)
    nn.init.constant_(model.network.head.bias, 0.0)
    model.network.head.bias[V] = 9.0  # silence everywhere
    batch["targets"] = torch.full((4, 2), IGNORE)
    assert marks_of(model, batch) == [([], [])] * 4


# --- attention


@torch.no_grad()
def test_attention_is_that_of_the_steps_that_write_the_tokens() -> None:
    """Against reading the transcript up to each token alone, without the clip's padding."""
    network = writer_of_texts().eval().network
    assert isinstance(network, Whisper)
    data = tones(kind="decoder")
    batch = data.collate([2, 3, 0])
    frames = int(batch["mask"][0].sum())
    tokens = data.texts[2]
    for block in (None, 0, -1):
        weights, names = spoken_attention(network, batch, letters(), block)
        assert len(names) == len(tokens) + 1
        assert not weights[:, -(-frames // 2) * 2 :].any()  # nothing attends to padding
        context = network.encode(batch["features"][:1, :frames]).x
        for place, row in enumerate(weights):
            read = torch.tensor([[START, LANGUAGE, *tokens[:place]]])
            found = network.decode(read, context, return_attention=True).cross_attention
            assert found is not None
            step = torch.stack(found)[:, 0, :, -1].mean(dim=1)  # (blocks, states)
            want = (step.mean(dim=0) if block is None else step[block]).repeat_interleave(2)
            torch.testing.assert_close(row[: len(want)], want, rtol=1e-4, atol=1e-6)


def test_processes_without_tensorboard_compute_too() -> None:
    """Sharded weights need all of them, also those whose first rows only fill up the batch."""
    data, model = tones(kind="decoder"), writer_of_texts().eval()
    other: Any = SimpleNamespace(
        datamodule=data, sanity_checking=False, loggers=[], is_global_zero=False, global_step=3
    )
    callback = Transcripts()
    callback.setup(other, model, "fit")
    for rows, names in (([2, 3], 3), ([], 0)):
        callback.on_validation_batch_end(other, model, None, data.collate(rows), 0)
        assert [clip.row for clip in callback.shown] == rows
        assert callback.attention is not None
        assert (len(callback.attention[1]) > 0) == (names > 0)
        callback.on_validation_batch_end(other, model, None, {}, 1)  # later batches are not looked at
        callback.on_validation_end(other, model)


# --- pictures and tables


def spoken(row: int, prediction: str, reference: str) -> Any:
    return SimpleNamespace(row=row, prediction=prediction, reference=reference)


FACTS = DataFacts(frame_seconds=0.01)


def test_a_clip_with_its_texts() -> None:
    features = torch.rand(100, 10)
    clip = DrawnClip(3, features, [Mark("a", 10, 20)], [Mark("b", 30, 40, wrong=True)])
    shown = np.asarray(draw_clip(clip, spoken(3, "b", "a"), FACTS, scale=4))
    inside = shown[3:, 3:-3]
    assert inside.shape[1] == 400
    above, picture, below = inside[:LINE], inside[LINE : LINE + 90], inside[LINE + 90 : 2 * LINE + 90]
    assert (above[-1, 40:80] < 255).any(axis=-1).all()
    assert (below[-1, 120:160] < 255).any(axis=-1).all()
    want = np.asarray(spectrogram(features, 4)).copy()
    want[:, 40] = 255  # the start of the token that is said
    np.testing.assert_array_equal(picture, want)
    assert tuple(shown[0, 0]) == RED
    without = np.asarray(draw_clip(DrawnClip(3, features), spoken(3, "a", "a"), FACTS, scale=4))
    assert without.shape[0] == shown.shape[0] - 2 * LINE
    assert tuple(without[0, 0]) == GREEN


def test_long_clips_are_cut_and_short_ones_have_room_for_their_texts() -> None:
    long = draw_clip(DrawnClip(0, torch.rand(3000, 10), [Mark("a", 2500, 2501)]), spoken(0, "a", "a"), FACTS, scale=1)
    assert long.width == 1600 + 6
    short = draw_clip(DrawnClip(0, torch.rand(3, 10)), spoken(0, "b" * 30, "a"), FACTS, scale=1)
    assert short.width == 300 + 6
    weights = torch.rand(2, 3000)
    drawn = draw_attention(torch.rand(2000, 10), weights, ["a", "a long name indeed"], FACTS, scale=1)
    assert drawn.size == (1600 + 13 * COLUMN, 90 + 3 * LINE)


def test_the_table() -> None:
    texts = [spoken(0, "a b", "a b"), spoken(1, "x|y", "xy"), spoken(2, "", "abc d")]
    assert worst_clips(texts, 5, FACTS).splitlines() == [
        "| clip | reference | hypothesis | words wrong | characters wrong |",
        "| --- | --- | --- | --- | --- |",
        "| row 2 | abc d |  | 2 of 2 | 5 of 5 |",
        "| row 1 | xy | x\\|y | 1 of 1 | 1 of 2 |",
    ]
    assert len(rows_of(worst_clips(texts, 1, FACTS))) == 1
    assert worst_clips(texts[:1], 5, FACTS) == "no errors in 1 clips"
    assert rows_of(worst_clips([spoken(0, "a", "")], 5, FACTS))[0][-1] == "1 of 0"


def test_data_without_sounds_plays_none() -> None:
    writer = MagicMock()
    play(writer, [0], DataFacts(sample_rate=8000), 1)
    play(writer, [0], DataFacts(waveform=waveform), 1)
    assert not writer.method_calls
    play(writer, [0], DataFacts(sample_rate=8000, waveform=waveform), 1)
    assert [call[0] for call in writer.method_calls] == ["add_audio"]


# --- errors


@pytest.mark.parametrize("options", [{"clips": 0}, {"rows": -1}])
def test_bad_numbers(options: Any) -> None:
    with pytest.raises(TrunklineError, match=r"Transcripts: clips=.* must be at least 1, and rows=.* at least 0"):
        Transcripts(**options)


def test_bad_blocks_are_found_before_the_first_step() -> None:
    trainer: Any = SimpleNamespace(datamodule=tones())
    with pytest.raises(TrunklineError, match="Transcripts: block is of a decoder, but the network has none; leave blo"):
        Transcripts(block=0).setup(trainer, recognizer(), "fit")
    Transcripts(block=-2).setup(trainer, writer_of_texts(), "fit")
    for block in (2, -3):
        with pytest.raises(
            TrunklineError, match=f"block={block}, but the decoder has 2 blocks; choose from 0 to 1, or"
        ):
            Transcripts(block=block).setup(trainer, writer_of_texts(), "fit")


def test_other_data_objectives_and_networks() -> None:
    trainer: Any = SimpleNamespace(datamodule=tones(transcript=None))
    with pytest.raises(TrunklineError, match="Transcripts needs data with transcripts, such as SpeechData; leave the"):
        Transcripts().setup(trainer, recognizer(), "fit")
    with pytest.raises(
        TrunklineError, match=r"Transcripts shows the texts that .* the objective writes none; set its"
    ) as e:
        Transcripts().setup(trainer, recognizer(scores=[]), "fit")
    assert e.value.field == "model.scores"
    module: Any = SimpleNamespace(network=recognizer().network)
    with pytest.raises(TrunklineError, match="the objective writes none"):
        Transcripts().setup(trainer, module, "fit")
    module.network = nn.Linear(1, 1)
    with pytest.raises(
        TrunklineError, match="Transcripts needs a SpeechEncoder or Whisper, but the network is a Linear"
    ):
        Transcripts().setup(trainer, module, "fit")
