"""What TensorBoard shows of a language model and of a task on text, read back from its event files."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_run import logged_texts, logged_trainer
from tokenizers import Tokenizer, models, pre_tokenizers

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.datamodules import LabelledTextData, MaskedTextData, TaggedTextData, TextData
from trunkline.datamodules.samplers import SampleKey
from trunkline.datamodules.tokenizers import train_tokenizer
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.callbacks import AttentionHeads, ClassificationReport, FilledMasks, TextSamples, Throughput
from trunkline.modules.callbacks.text import draw_heads
from trunkline.modules.generation.filling import fill_masks
from trunkline.modules.generation.sampling import generate
from trunkline.modules.networks import GPT, BERTConfig, GPTConfig, TextHeadConfig
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.objectives.text_classifier import TextClassifier
from trunkline.modules.objectives.token_classifier import TokenClassifier
from trunkline.modules.training.optim import OptimizerConfig

TEXT = "the cat sat on the mat and the dog sat on the cat. " * 60


def trainer(folder: Path, steps: int, interval: int, *callbacks: Any) -> L.Trainer:
    return logged_trainer(folder, *callbacks, max_steps=steps, val_check_interval=interval, log_every_n_steps=interval)


def run(folder: Path, masked: bool, *callbacks: Any) -> SimpleNamespace:
    (folder / "text.txt").write_text(TEXT)
    fields: dict[str, Any] = {"source": str(folder / "text.txt"), "max_length": 16, "cache_dir": str(folder / "cache")}
    backbone = TransformerConfig(dim=16, depth=3, num_heads=2)
    optimizer = OptimizerConfig(lr=0.01)
    model: CausalLM | MaskedLM
    data: Any
    if masked:
        data = MaskedTextData(**fields, vocab_size=70, batch_size=4)
        model = MaskedLM(BERTConfig(data.facts.vocab_size, 16, backbone=backbone), optimizer=optimizer)
    else:
        data = TextData(**fields, tokenizer="chars", batch_size=4)
        model = CausalLM(GPTConfig(data.facts.vocab_size, 16, backbone=backbone), optimizer=optimizer)
    trainer(folder, 8, 4, *callbacks, Throughput()).fit(model, datamodule=data)
    found = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    return SimpleNamespace(model=model, data=data, found=found)


def test_gpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = TextSamples(["the c", "dog"], max_new_tokens=20)
    done = run(tmp_path, False, samples, AttentionHeads("the cat sat", blocks=2, heads=1))
    shown = logged_texts(done.found, "val/samples")
    assert list(shown) == [4, 8]
    ids = done.data.vocabulary.encode("the c").ids
    (new,) = generate(done.model.network, torch.tensor([ids]), config=samples.config)  # the weights have not changed
    text = done.data.vocabulary.decode(ids + new)
    assert text.startswith("the c")
    assert f"```\n{text}\n```" in shown[8]
    assert samples.texts[0] == text
    assert text in capsys.readouterr().out
    assert done.model.network.training
    assert [e.step for e in done.found.Images("val/attention")] == [4, 8]
    tokens_seen = {e.step: e.value for e in done.found.Scalars("tokens_seen")}
    assert tokens_seen == {4: 4 * 4 * 16, 8: 8 * 4 * 16}
    by_tokens = {e.step: e.value for e in done.found.Scalars("by_tokens/val/bpb")}
    assert list(by_tokens) == [256, 512]
    assert list(by_tokens.values()) == [e.value for e in done.found.Scalars("val/bpb")]
    assert {"throughput/tokens_per_sec", "throughput/flops_per_sec", "val/ppl"} <= set(done.found.Tags()["scalars"])
    speeds = done.found.Scalars("throughput/tokens_per_sec")
    assert [e.step for e in speeds] == [4, 8]  # not twice: they are the unit


def test_bert(tmp_path: Path) -> None:
    done = run(tmp_path, True, FilledMasks(["the [MASK] sat on"], count=3), AttentionHeads("the cat sat"))
    words = done.data.vocabulary
    ids = words.encode("[CLS] the [MASK] sat on [SEP]", add_special_tokens=False).ids
    (filling,) = fill_masks(done.model.network, torch.tensor(ids), words.token_to_id("[MASK]"), 3)
    row = ", ".join(
        f"{words.decode([t])} ({p:.2f})" for t, p in zip(filling.tokens, filling.probabilities, strict=True)
    )
    assert logged_texts(done.found, "val/filled")[8].splitlines()[2:] == [f"| the [MASK] sat on | {row} |"]
    assert done.model.network.training
    assert [e.step for e in done.found.Images("val/attention")] == [4, 8]


def test_masks_of_another_family_are_filled(tmp_path: Path) -> None:
    """`<s>`, `<mask>` and `</s>`, as RoBERTa has them."""
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3, "?": 4, "the": 5, "cat": 6, "sat": 7, "on": 8}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<mask>"])
    torch.manual_seed(0)
    model = MaskedLM(BERTConfig(9, 5, backbone=TransformerConfig(dim=16, depth=1, num_heads=2)))
    (tmp_path / "t.txt").write_text(TEXT)
    tokenizer.save(str(tmp_path / "t.json"))
    data = MaskedTextData(str(tmp_path / "t.txt"), tokenizer=str(tmp_path / "t.json"), cache_dir=str(tmp_path / "c"))
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fake: Any = SimpleNamespace(
        datamodule=data, sanity_checking=False, loggers=[logger], is_global_zero=True, global_step=3
    )
    callback = FilledMasks(["the <mask> sat"], count=2)
    callback.setup(fake, model, "fit")
    callback.on_validation_epoch_end(fake, model)
    logger.finalize("success")
    with torch.no_grad():
        best = model.eval().network(torch.tensor([[0, 5, 3, 7, 2]]))[0, 2].softmax(0).topk(2)
    names = {number: name for name, number in words.items()}
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    want = ", ".join(f"{names[token] if token > 3 else ''} ({p:.2f})" for token, p in found)
    shown = logged_texts(EventAccumulator(str(tmp_path), {"tensors": 0}).Reload(), "val/filled")
    assert shown[3].splitlines()[2:] == [f"| the <mask> sat | {want} |"]


def test_heads_are_drawn_where_they_look() -> None:
    weights = torch.eye(3).expand(2, 3, 3)
    figure = draw_heads({0: weights, 5: weights.flip(-1)}, ["a", "b", "c"])
    axes = figure.axes
    assert [a.get_title() for a in axes] == [f"block {b}, head {h}" for b in (0, 5) for h in (0, 1)]
    assert axes[0].images[0].get_array().tolist() == torch.eye(3).tolist()
    assert axes[3].images[0].get_array().tolist() == torch.eye(3).flip(-1).tolist()
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in axes[2].get_xticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("masked", "callback", "message"),
    [
        (False, TextSamples([""]), "TextSamples: the prompt '' has no tokens"),
        (True, FilledMasks(["the cat"]), r"^FilledMasks: the sentence 'the cat' has no \[MASK\]; write it where"),
        (
            True,
            FilledMasks(["[MASK]" * 15]),
            r"^FilledMasks: the sentence '.*' has 17 tokens, .* can see 16; shorten it$",
        ),
        (False, FilledMasks(["[MASK]"]), "^FilledMasks needs MaskedTextData; leave the callback out with other data$"),
    ],
)
def test_bad_texts_are_found_before_the_first_step(masked: bool, callback: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        run(tmp_path, masked, callback)


def test_data_without_a_tokenizer() -> None:
    writer: Any = SimpleNamespace(network=GPT(GPTConfig(9, 4, backbone=TransformerConfig(8, 1, 1))))
    with pytest.raises(TrunklineError, match="TextSamples needs a datamodule with a tokenizer"):
        TextSamples(["a"]).setup(SimpleNamespace(datamodule=None), writer, "fit")  # type: ignore[arg-type]


class CountedTokens(L.Callback):
    """Another count of what is no padding."""

    def __init__(self) -> None:
        self.tokens = self.texts = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.texts += len(batch["tokens"])
        self.tokens += sum(int(row.sum()) for row in batch["mask"])


@pytest.mark.parametrize("gpt", [False, True])
def test_text_classifier(gpt: bool, tmp_path: Path) -> None:
    """The matrix and the features are those of an independent pass over the validation rows."""
    words = [f"{animal} {verb}" for animal in ("cat", "dog", "cow") for verb in ("sat", "ran", "saw")]
    rows = [{"text": f"the {w}", "label": w[:3]} for w in words] * 4
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_tokenizer("chars" if gpt else "wordpiece", [r["text"] for r in rows], 80).save(str(tmp_path / "t.json"))
    data = LabelledTextData(
        str(tmp_path / "t.jsonl"), tokenizer=str(tmp_path / "t.json"), max_length=16, val_fraction=0.3, batch_size=4
    )
    sizes: dict[str, Any] = {"vocab_size": data.facts.vocab_size, "max_length": 16}
    backbone = TransformerConfig(dim=16, depth=3, num_heads=2, dropout=0.2)
    body = {"gpt": GPTConfig(**sizes, backbone=backbone)} if gpt else {"bert": BERTConfig(**sizes, backbone=backbone)}
    model = TextClassifier(
        TextHeadConfig(**body, num_outputs=3, pool="last" if gpt else "cls"), optimizer=OptimizerConfig(lr=0.1)
    )
    report = ClassificationReport(images=2, projected=5)
    counted = CountedTokens()
    fitted = trainer(tmp_path, 5, 5, report, AttentionHeads("the cat sat", blocks=2, heads=1), counted, Throughput())
    fitted.fit(model, datamodule=data)
    found = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    tokens, texts_a_second = (found.Scalars(f"throughput/{unit}_per_sec")[0].value for unit in ("tokens", "texts"))
    assert tokens / texts_a_second == pytest.approx(counted.tokens / counted.texts)
    assert 3 < counted.tokens / counted.texts < 16  # padding is not counted
    assert set(found.Tags()["images"]) == {"val/confusion", "val/attention"}
    assert [e.step for e in found.Images("val/confusion")] == [5]
    assert model.network.training
    val = [data.datasets["val"][SampleKey(0, n)] for n in range(len(data.datasets["val"]))]  # type: ignore[arg-type]
    tokens, mask = (torch.stack([row[name] for row in val]) for name in ("tokens", "mask"))
    with torch.no_grad():
        features = model.eval().network.states(tokens, torch.zeros_like(tokens), mask)
        best = model.network.head(features).argmax(dim=1)
    assert report.matrix is not None
    want = confusion_matrix([row["label"] for row in val], best, labels=range(3))
    assert want.sum() == len(val) > 5
    assert report.matrix.compute().tolist() == want.tolist()
    (folder,) = {file.parent for file in tmp_path.rglob("tensors.tsv")}
    shown = [list(map(float, line.split("\t"))) for line in (folder / "tensors.tsv").read_text().splitlines()]
    torch.testing.assert_close(torch.tensor(shown), features[:5], rtol=1e-4, atol=1e-4)
    lines = (folder / "metadata.tsv").read_text().splitlines()
    assert lines[0] == "label\ttext"
    assert all(line.partition("\t")[2].startswith("the ") for line in lines[1:])
    assert [line.partition("\t")[0] for line in lines[1:]] == [data.class_names[row["label"]] for row in val[:5]]


def test_tagger_has_a_matrix_alone(tmp_path: Path) -> None:
    (tmp_path / "t.conll").write_text("anna B\nran O\n\nbo B\nsaw O\nanna B\n\n" * 6)
    (tmp_path / "v.conll").write_text("anna B\nran O\n\n" * 3 + "bo B\n\n" * 2)
    train_tokenizer("wordpiece", ["anna ran bo saw"], 80).save(str(tmp_path / "t.json"))
    paths = {"source": str(tmp_path / "t.conll"), "val_source": str(tmp_path / "v.conll")}
    data = TaggedTextData(**paths, tokenizer=str(tmp_path / "t.json"), max_length=16, batch_size=4)
    body = BERTConfig(data.facts.vocab_size, 16, backbone=TransformerConfig(dim=16, depth=1, num_heads=2))
    model = TokenClassifier(TextHeadConfig(bert=body, pool="none"), optimizer=OptimizerConfig(lr=0.01))
    report = ClassificationReport()
    trainer(tmp_path, 1, 1, report).fit(model, datamodule=data)
    assert report.matrix is not None
    assert report.matrix.compute().sum(dim=1).tolist() == [5, 3]
    assert EventAccumulator(str(tmp_path), {"images": 0}).Reload().Tags()["images"] == ["val/confusion"]
    assert not list(tmp_path.rglob("tensors.tsv"))


@pytest.mark.parametrize(
    ("callback", "needed"),
    [
        (TextSamples(["a"]), "Decoder"),
        (FilledMasks(["[MASK]"]), "BERT"),
        (AttentionHeads("a"), "GPT or BERT or TextHead"),
    ],
)
def test_another_network_is_refused_before_the_first_step(callback: Any, needed: str) -> None:
    facts = DataFacts(encode_masked=lambda *_: ([], 0))
    run: Any = SimpleNamespace(datamodule=SimpleNamespace(facts=facts))
    module: Any = SimpleNamespace(network=torch.nn.Linear(1, 1))
    with pytest.raises(TrunklineError, match=f"needs a {needed}, but the network is a Linear; leave the callback out"):
        callback.setup(run, module, "fit")
