"""What TensorBoard shows of an encoder-decoder, read back from its event files."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_run import logged_texts, logged_trainer
from tiny_translator import END, LONGEST_TARGET, REV, UP, by_hand, letters, network_config, random_network, written_ids
from torch import nn

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules.translation.translation_data import TranslationData
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.callbacks import Translations
from trunkline.modules.callbacks import translation as room
from trunkline.modules.callbacks.translation import (
    TargetSide,
    Translated,
    alignment,
    draw_alignment,
    labels,
    table_cell,
)
from trunkline.modules.metrics.translation import signatures
from trunkline.modules.networks import EncoderDecoder
from trunkline.modules.objectives.seq2seq import Seq2Seq
from trunkline.modules.training.optim import OptimizerConfig

TEXTS = ["abc", "fed cab", "a", "bb", "cafe bad", "dead", "f", "beef cab", "ace", "deaf", "add", "be"]


@dataclass
class Done:
    """A short training."""

    model: Seq2Seq
    data: TranslationData
    found: EventAccumulator

    def texts(self, tag: str) -> dict[int, str]:
        return logged_texts(self.found, tag)


def pairs_data(folder: Path, languages: list[str] | None = None) -> TranslationData:
    rows = [{"source": t, "target": t[::-1] + "-", "lang": ["up", "rev"][n % 2]} for n, t in enumerate(TEXTS * 3)]
    val = [{"source": t, "target": t * 2, "lang": ["up", "rev"][n % 2]} for n, t in enumerate(TEXTS)]
    for name, table in (("train", rows), ("val", val)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    letters().save(str(folder / "t.json"))
    return TranslationData(
        str(folder / "train.jsonl"),
        val_source=str(folder / "val.jsonl"),
        language_column=None if languages is None else "lang",
        languages=languages,
        tokenizer=str(folder / "t.json"),
        max_length=12,
        max_target_length=LONGEST_TARGET,
        batch_size=4,
        cache_dir=str(folder / "cache"),
    )


def run(folder: Path, *callbacks: Any, languages: list[str] | None = None, **options: Any) -> Done:
    """Train for 4 steps, with a validation after every second one."""
    data = pairs_data(folder, languages)
    trunk = TransformerConfig(dim=32, depth=2, num_heads=2, dropout=0.2)
    model = Seq2Seq(network_config(encoder=trunk, decoder=trunk), optimizer=OptimizerConfig(lr=0.01), **options)
    model.network.load_state_dict(random_network(encoder=trunk, decoder=trunk).state_dict())
    logged_trainer(folder, *callbacks, max_steps=4, val_check_interval=2, log_every_n_steps=2).fit(
        model, datamodule=data
    )
    model.eval()
    return Done(
        model, data, EventAccumulator(str(folder), dict.fromkeys(("images", "tensors", "histograms"), 0)).Reload()
    )


def test_the_first_rows_of_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights have not changed since the last validation, which came after the last step."""
    done = run(tmp_path, Translations(rows=3))
    table = done.texts("val/translations")
    assert list(table) == [2, 4]  # not at the sanity check
    predictions = [by_hand(done.model.network, text) for text in TEXTS]
    assert table[4].splitlines() == [
        "| source | prediction | target |",
        "| --- | --- | --- |",
        *(f"| {t} | {' '.join(p.split())} | {t * 2} |" for t, p in zip(TEXTS[:3], predictions, strict=False)),
    ]
    printed = capsys.readouterr().out
    assert f"\nfed cab\n  → {predictions[1]}\n  right: fed cabfed cab\n" in printed
    assert [e.step for e in done.found.Images("val/alignment")] == [2, 4]
    ratios = {e.step: e.value for e in done.found.Scalars("val/length_ratio")}
    assert list(ratios) == [2, 4]
    assert ratios[4] == pytest.approx(sum(map(len, predictions)) / sum(2 * len(text) for text in TEXTS))
    lengths = done.found.Histograms("val/lengths/predicted")[-1].histogram_value
    assert (lengths.num, lengths.sum) == (len(TEXTS), sum(map(len, predictions)))
    assert done.found.Histograms("val/lengths/reference")[-1].histogram_value.sum == sum(2 * len(t) for t in TEXTS)
    signed = signatures(("bleu", "chrf"))
    assert done.texts("val/signatures") == {2: f"bleu: `{signed['bleu']}`\n\nchrf: `{signed['chrf']}`"}  # once


def test_own_sentences_and_languages(tmp_path: Path) -> None:
    """Without scores nothing is written but these sentences."""
    callback = Translations(["cab", "bead"], languages=["rev", "up"], aligned=1, block=-1)
    done = run(tmp_path, callback, languages=["up", "rev"], scores=())
    predictions = [by_hand(done.model.network, *given) for given in (("cab", (REV,)), ("bead", (UP,)))]
    assert done.texts("val/translations")[4].splitlines() == [
        "| source | prediction |",
        "| --- | --- |",
        *(f"| {t} | {' '.join(p.split())} |" for t, p in zip(("cab", "bead"), predictions, strict=True)),
    ]
    assert "val/length_ratio" not in done.found.Tags()["scalars"]
    assert "val/signatures/text_summary" not in done.found.Tags()["tensors"]


def test_rows_have_their_own_languages(tmp_path: Path) -> None:
    callback = Translations(rows=99)  # there are not so many
    done = run(tmp_path, callback, languages=["up", "rev"])
    assert [text.source for text in callback.shown] == TEXTS
    want = [by_hand(done.model.network, text, ((UP, REV)[n % 2],)) for n, text in enumerate(TEXTS)]
    assert [text.prediction for text in callback.shown] == want


def test_averaged_weights_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the validation uses, wherever the callback stands in the list."""
    seen, used = [], []

    class Witness(Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if not trainer.sanity_checking:
                used.append(pl_module.network.head.weight.clone())

    def looked_at(network: EncoderDecoder, *rest: Any) -> Any:
        assert not network.training
        seen.append(network.head.weight.clone())
        return translated(network, *rest)

    translated = room.translated
    monkeypatch.setattr(room, "translated", looked_at)
    done = run(tmp_path, EMAWeightAveraging(decay=0.5), Translations(), Witness())
    assert len(seen) == 2
    assert all(any(torch.equal(own, other) for other in used) for own in seen)
    assert not torch.equal(seen[0], seen[1])
    assert done.model.network.head.weight.isfinite().all()


def test_processes_without_tensorboard_translate_too(tmp_path: Path) -> None:
    """Sharded weights need all of them."""
    data = pairs_data(tmp_path)
    data.setup("fit")
    callback, module = Translations(rows=2), Seq2Seq(network_config()).eval()
    other: Any = SimpleNamespace(
        datamodule=data, sanity_checking=False, loggers=[], is_global_zero=False, global_step=3
    )
    callback.setup(other, module, "fit")
    callback.on_validation_batch_start(other, module, None, 0)
    assert [text.source for text in callback.shown] == TEXTS[:2]
    assert all(text.prediction == by_hand(module.network, text.source) for text in callback.shown)
    callback.on_fit_end(other, module)


# --- the alignment


def test_weights_are_those_of_the_steps_that_wrote_the_tokens() -> None:
    """Against a softmax by hand, over the queries and keys of each step alone."""
    trunk = TransformerConfig(dim=32, depth=2, num_heads=2)
    network = random_network(encoder=trunk, decoder=trunk)
    source = [*letters().encode("fed cab").ids, END]
    written = written_ids(network, source)
    targets = TargetSide(letters(), END, END, LONGEST_TARGET)
    maps = alignment(network, Translated("", source, None, tuple(written)), targets, torch.device("cpu"))
    steps = min(len(written) + 1, LONGEST_TARGET)
    assert [tuple(weights.shape) for weights in maps] == [(steps, len(source))] * 2
    inputs: list[dict[str, Any]] = [{}, {}]
    for block, kept in zip(network.decoder.blocks, inputs, strict=True):
        cross: Any = block.get_submodule("cross_attn")
        cross.register_forward_pre_hook(
            lambda module, args, kwargs, kept=kept: kept.update(x=args[0], context=kwargs["context"]), with_kwargs=True
        )
    for step in range(steps):
        with torch.no_grad():
            network(torch.tensor([source]), torch.tensor([[END, *written[:step]]]))
        for block, kept, weights in zip(network.decoder.blocks, inputs, maps, strict=True):
            cross = block.get_submodule("cross_attn")
            query = cross.q(kept["x"])[0, -1].view(2, 16)
            keys = cross.kv(kept["context"])[0, :, :32].reshape(len(source), 2, 16)
            scores = torch.einsum("he,she->hs", query, keys) / 4
            torch.testing.assert_close(weights[step], scores.softmax(dim=1).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_a_text_without_an_end_fits_the_positions() -> None:
    network = random_network()
    text = Translated("", [4, END], None, tuple([5] * 11))
    targets = TargetSide(letters(), END, END, 11)  # all positions of the network
    assert [len(weights) for weights in alignment(network, text, targets, torch.device("cpu"))] == [11]


def test_targets_go_down_and_sources_across() -> None:
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
    figure = draw_alignment({0: weights, 3: weights / 2}, ["a", "b", "c"], ["x", "y"])
    assert isinstance(figure, Figure)
    assert [place.get_title() for place in figure.axes] == ["block 0", "block 3"]
    for place, factor in zip(figure.axes, (1, 2), strict=True):
        shown = place.images[0].get_array()
        assert shown is not None
        np.testing.assert_allclose(shown, weights / factor)
        assert [t.get_text() for t in place.get_xticklabels()] == ["a", "b", "c"]
        assert [t.get_text() for t in place.get_yticklabels()] == ["x", "y"]
    assert figure.axes[0].yaxis_inverted()  # the first token is at the top


def test_long_sentences_are_cut() -> None:
    figure = draw_alignment({0: torch.rand(90, 200)}, ["s"] * 200, ["t"] * 90)
    shown = figure.axes[0].images[0].get_array()
    assert shown is not None
    assert shown.shape == (64, 64)
    assert len(figure.axes[0].get_yticklabels()) == 64
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    assert max(Image.open(file).size) < 800


def test_labels_and_cells() -> None:
    assert labels(letters(), [UP, 4, 10, END]) == ["<2up>", "a", "␣", "</s>"]
    assert table_cell("a |b\n c") == "a \\|b c"
    assert len(table_cell("ab " * 300)) == 400


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "there is nothing to translate; give sentences, or rows above 0"),
        ({"sentences": []}, "there is nothing to translate"),
        ({"rows": 2, "aligned": 2}, "aligned=2 must be from 0 to 1, the number of a sentence"),
        ({"languages": "up"}, "languages are of sentences; give sentences too"),
        ({"sentences": ["a", "b"], "languages": ["up"]}, "1 languages for 2 sentences; give one for each, or one for"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=f"Translations: .*{message}"):
        Translations(**options)


@pytest.mark.parametrize(
    ("options", "languages", "message"),
    [
        ({"sentences": ["abc", " "]}, None, "the sentence ' ': text 1 is empty"),
        (
            {"sentences": ["abc"], "languages": "de"},
            ["up", "rev"],
            "the sentence 'abc': language=de: the model was not",
        ),
        ({"sentences": ["abc"]}, ["up", "rev"], "the model has several target languages"),
        ({"block": 1}, None, "block=1, but the decoder has 1 blocks; choose from 0 to 0"),
    ],
)
def test_bad_sentences_are_found_before_the_first_step(
    options: Any, languages: Any, message: str, tmp_path: Path
) -> None:
    data = pairs_data(tmp_path, languages)
    module: Any = SimpleNamespace(network=random_network())
    with pytest.raises(TrunklineError, match=f"^Translations: .*{message}"):
        Translations(**options).setup(SimpleNamespace(datamodule=data), module, "fit")  # type: ignore[arg-type]


def test_other_data_and_networks(tmp_path: Path) -> None:
    module: Any = SimpleNamespace(network=random_network())
    for facts in (DataFacts(), DataFacts(tokenizer=letters(), start_token=0, end_token=0, pair=lambda *_: ("", ""))):
        trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(facts=facts))
        with pytest.raises(TrunklineError, match="Translations needs data with sources and targets, such as Translati"):
            Translations().setup(trainer, module, "fit")
    module.network = nn.Linear(1, 1)
    with pytest.raises(TrunklineError, match="Translations needs an EncoderDecoder, but the network is a Linear"):
        Translations().setup(trainer, module, "fit")
