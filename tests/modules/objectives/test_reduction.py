"""Gradients that are accumulated, on any number of processes, are those of one batch that holds all of it."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import machine_settings
import pytest
import tiny
import torch
from recorded_run import CONTEXT
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric

from trunkline import TrunklineError
from trunkline.contract import IGNORE, Loss
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import (
    ASTConfig,
    BERTConfig,
    EncoderDecoderConfig,
    GPTConfig,
    SpeechEncoderConfig,
    TextHeadConfig,
    WhisperConfig,
)
from trunkline.modules.objectives.audio_classifier import AudioClassifier
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.objectives.reduction import Accumulation, as_terms, mean_count
from trunkline.modules.objectives.seq2seq import Seq2Seq
from trunkline.modules.objectives.speech_recognizer import SpeechRecognizer
from trunkline.modules.objectives.speech_to_text import SpeechToText
from trunkline.modules.objectives.token_classifier import TokenClassifier
from trunkline.modules.training.optim import OptimizerConfig

Batch = dict[str, Tensor]
V, T, TAGS = 11, 8, 4
MELS, FRAMES = 4, 24
SIZES = (4, 2, 3, 1, 2)
"""Rows of the batches."""
OTHER_SIZES = (1, 3, 2, 2, 4)
"""Those of a second process."""
SGD = OptimizerConfig("sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0)


# --- an objective of each kind, and rows of very different content


def trunk(causal: bool = False) -> TransformerConfig:
    return TransformerConfig(dim=16, depth=2, num_heads=2, causal=causal)


def targets(draw: torch.Generator, classes: int, shape: tuple[int, int]) -> Tensor:
    """As many in each row as chance will have it, none in some."""
    counted = torch.arange(shape[1]) < torch.randint(0, shape[1] + 1, (shape[0], 1), generator=draw)
    return torch.randint(0, classes, shape, generator=draw).masked_fill(~counted, IGNORE)


def packed(rows: int, draw: torch.Generator) -> Batch:
    """Several documents in a row, and padding after them."""
    document = 1 + (torch.rand(rows, T, generator=draw) < 0.3).long().cumsum(dim=1)
    length = torch.randint(1, T + 1, (rows, 1), generator=draw)
    document = document.masked_fill(torch.arange(T) >= length, 0)
    ends = torch.cat([document[:, 1:] != document[:, :-1], torch.ones(rows, 1, dtype=torch.bool)], dim=1)
    row = torch.randint(0, V, (rows, T + 1), generator=draw)
    following = row[:, 1:].masked_fill(ends | (document == 0), IGNORE)
    return {"tokens": row[:, :-1], "targets": following, "document": document}


def masked(rows: int, draw: torch.Generator) -> Batch:
    positions = torch.rand(rows, T, generator=draw).argsort(dim=1)[:, :3]
    tokens = torch.randint(0, V, (rows, T), generator=draw)
    return {"tokens": tokens, "positions": positions, "targets": targets(draw, V, (rows, 3))}


def masked_pairs(rows: int, draw: torch.Generator) -> Batch:
    """One in three is no pair."""
    follows = torch.tensor([0, 1, IGNORE])[torch.randint(0, 3, (rows,), generator=draw)]
    segment = (torch.arange(T) > 4).long().expand(rows, T)
    mask = torch.arange(T) < torch.randint(5, T + 1, (rows, 1), generator=draw)
    return {**masked(rows, draw), "segment": segment, "mask": mask, "follows": follows}


def tagged(rows: int, draw: torch.Generator) -> Batch:
    tokens, mask = torch.randint(0, V, (rows, T), generator=draw), torch.ones(rows, T, dtype=torch.bool)
    return {"tokens": tokens, "mask": mask, "targets": targets(draw, TAGS, (rows, T))}


def text_pairs(rows: int, draw: torch.Generator) -> Batch:
    tokens, before = (torch.randint(0, V, (rows, T), generator=draw) for _ in range(2))
    mask = torch.arange(T) < torch.randint(1, T + 1, (rows, 1), generator=draw)
    return {"tokens": tokens, "mask": mask, "target_tokens": before, "targets": targets(draw, V, (rows, T))}


def images(rows: int, draw: torch.Generator) -> Batch:
    label = torch.randint(0, 10, (rows,), generator=draw)
    return {"image": torch.randn(rows, 1, 8, 8, generator=draw), "label": label}


def clips(rows: int, draw: torch.Generator) -> Batch:
    """Of different lengths; the last one only fills up the batch, if there are others."""
    mask = torch.arange(FRAMES) < torch.randint(8, FRAMES + 1, (rows, 1), generator=draw)
    valid = (torch.arange(rows) < rows - 1) | (rows == 1)
    return {"features": torch.randn(rows, FRAMES, MELS, generator=draw), "mask": mask, "valid": valid}


def spoken(rows: int, draw: torch.Generator) -> Batch:
    """Some have more tokens than states, some have none."""
    return {**clips(rows, draw), "targets": targets(draw, V, (rows, 5)), "index": torch.arange(rows)}


def dictated(rows: int, draw: torch.Generator) -> Batch:
    following, before = targets(draw, V, (rows, T)), torch.randint(0, V, (rows, T), generator=draw)
    return {**clips(rows, draw), "target_tokens": before, "targets": following}


def labelled(rows: int, draw: torch.Generator) -> Batch:
    return {**clips(rows, draw), "target": torch.rand(rows, TAGS, generator=draw)}


def masked_lm(next_sentence: bool) -> MaskedLM:
    return MaskedLM(BERTConfig(V, T, next_sentence=next_sentence, backbone=trunk()), optimizer=SGD)


def tagger() -> TokenClassifier:
    network = TextHeadConfig(bert=BERTConfig(V, T, backbone=trunk()), num_outputs=TAGS, pool="none", dropout=0.0)
    return TokenClassifier(network, optimizer=SGD)


def seq2seq() -> Seq2Seq:
    return Seq2Seq(EncoderDecoderConfig(V, None, T, T, encoder=trunk(), decoder=trunk()), optimizer=SGD)


def recognizer() -> SpeechRecognizer:
    return SpeechRecognizer(SpeechEncoderConfig(V, MELS, FRAMES, backbone=trunk()), optimizer=SGD)


def writer() -> SpeechToText:
    return SpeechToText(WhisperConfig(V, MELS, FRAMES, T, encoder=trunk(), decoder=trunk()), optimizer=SGD)


def sounds() -> AudioClassifier:
    network = ASTConfig(MELS, FRAMES, patch_size=4, stride=2, num_classes=TAGS, backbone=trunk())
    return AudioClassifier(network, multi_label=True, optimizer=SGD)


KINDS: dict[str, tuple[Callable[[], TrunklineModule], Callable[[int, torch.Generator], Batch]]] = {
    "CausalLM": (lambda: CausalLM(GPTConfig(V, T, backbone=trunk(causal=True)), optimizer=SGD), packed),
    "MaskedLM": (lambda: masked_lm(next_sentence=False), masked),
    "MaskedLM of pairs": (lambda: masked_lm(next_sentence=True), masked_pairs),
    "TokenClassifier": (tagger, tagged),
    "Seq2Seq": (seq2seq, text_pairs),
    "SpeechRecognizer": (recognizer, spoken),
    "SpeechToText": (writer, dictated),
    "AudioClassifier": (sounds, labelled),
    "ImageClassifier": (lambda: ImageClassifier(tiny.vit(), optimizer=SGD), images),
}


def objective(kind: str) -> TrunklineModule:
    """With weights that tell one row from another."""
    torch.manual_seed(0)
    made = KINDS[kind][0]()
    with torch.no_grad():
        for p in made.network.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return made


def batches(kind: str, sizes: Sequence[int] = SIZES, seed: int = 1) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [KINDS[kind][1](size, draw) for size in sizes]


def together(parts: Sequence[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fit(made: TrunklineModule, folder: Path, data: list[Batch], **options: Any) -> L.Trainer:
    fitted = tiny.trainer(folder, **{"max_epochs": 1, **options})
    fitted.fit(made, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return fitted


def weights(made: TrunklineModule) -> Batch:
    return {name: value.clone() for name, value in made.network.state_dict().items()}


def logged(fitted: L.Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in fitted.logged_metrics.items() if name.endswith("loss")}


# --- one process


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_over_all_that_is_counted(kind: str, tmp_path: Path) -> None:
    """To the last bit, where nothing is accumulated."""
    made, batch = objective(kind), together(batches(kind))
    terms = as_terms(made.loss(batch))
    assert [term.name for term in terms] == (["loss", "next_loss"] if kind == "MaskedLM of pairs" else ["loss"])
    want = {f"train/{term.name}": (term.total / term.count).item() for term in terms}
    assert logged(fit(made, tmp_path, [batch])) == want


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_one_batch(kind: str, tmp_path: Path) -> None:
    parts, whole, start = objective(kind), objective(kind), weights(objective(kind))
    data = batches(kind)[:3]
    means = torch.stack([tiny.mean_loss(whole, batch) for batch in data])
    assert (means.nanmean() - tiny.mean_loss(whole, together(data))).abs() > 1e-2  # the mean of means is another
    want = fit(whole, tmp_path, [together(data)])
    got = fit(parts, tmp_path, data, accumulate_grad_batches=3)
    assert got.global_step == want.global_step == 1
    assert max((start[name] - value).abs().max() for name, value in weights(whole).items()) > 1e-2
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-6)
    assert logged(got) == pytest.approx(logged(want), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_that_ends_amid_an_accumulation_divides_by_what_was_counted(kind: str, tmp_path: Path) -> None:
    """Two epochs, so that what one leaves would be in the other."""
    parts, whole, data = objective(kind), objective(kind), batches(kind)
    want = fit(whole, tmp_path, [together(data[:3]), together(data[3:])], max_epochs=2)
    got = fit(parts, tmp_path, data, max_epochs=2, accumulate_grad_batches=3)
    assert got.global_step == want.global_step == 4
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)
    assert logged(got) == pytest.approx(logged(want), abs=1e-5)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_batch_in_which_nothing_is_counted(empty: int, tmp_path: Path) -> None:
    parts, whole, data = objective("CausalLM"), objective("CausalLM"), batches("CausalLM")[:3]
    data[empty]["targets"] = torch.full_like(data[empty]["targets"], IGNORE)
    fit(whole, tmp_path, [together(data)])
    fit(parts, tmp_path, data, accumulate_grad_batches=3)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-6)


def test_what_goes_backward_is_never_scaled_up() -> None:
    """Or a half-precision gradient would overflow where a first batch counts nothing."""
    alone: Any = SimpleNamespace(world_size=1)
    accumulation, nothing, three = Accumulation(), torch.tensor(0), torch.tensor(3)
    assert accumulation.add(alone, Loss(torch.tensor(0.0), nothing), first=True) == 0
    assert accumulation.add(alone, Loss(torch.tensor(6.0), three), first=False) <= 6
    assert accumulation.mean(alone) == 2
    assert accumulation.correction(alone, 2) == pytest.approx(2 / 3)  # the trainer has divided by 2 steps


@pytest.mark.parametrize(("count", "want"), [(3, 3), (0, 1), (torch.tensor(3), 3), (torch.tensor(0), 1e-8)])
def test_count_of_one_process(count: Any, want: float) -> None:
    alone: Any = SimpleNamespace(world_size=1)
    assert float(mean_count(alone, count)) == pytest.approx(want)


# --- two processes


def sizes_of(kind: str, rank: int) -> tuple[int, ...]:
    """Of images each process has as many; of all else the second process has other numbers of rows, and of targets."""
    return OTHER_SIZES if rank and kind != "ImageClassifier" else SIZES


def fit_rank(rank: int, port: int, folder: Path) -> None:
    """One of two processes that train together, as a cluster starts them, on batches of its own."""
    machine_settings.apply()
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in names.items()})
    results: dict[str, Any] = {}
    for kind in KINDS:
        made = objective(kind)
        data = batches(kind, sizes_of(kind, rank), seed=1 + rank)
        fitted = fit(made, folder, data, devices=2, strategy="ddp", accumulate_grad_batches=3)
        results[kind] = {"weights": weights(made), "logged": logged(fitted), "steps": fitted.global_step}
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes have trained, by kind of objective."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [CONTEXT.Process(target=fit_rank, args=(rank, port, folder)) for rank in range(2)]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(90)
        assert [process.exitcode for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind: str, processes: list[dict[str, Any]], tmp_path: Path) -> None:
    """Their two steps are those of one process on the rows of both."""
    data = [batches(kind, sizes_of(kind, rank), seed=1 + rank) for rank in range(2)]
    counts = [[int(as_terms(objective(kind).loss(batch))[0].count) for batch in own] for own in data]
    assert (counts[0] == counts[1]) == (kind == "ImageClassifier")
    whole = objective(kind)
    want = fit(whole, tmp_path, [together([*data[0][part], *data[1][part]]) for part in (slice(3), slice(3, None))])
    for results in processes:
        assert results[kind]["steps"] == want.global_step == 2
        torch.testing.assert_close(results[kind]["weights"], weights(whole), rtol=0, atol=2e-6)
    parts = [results[kind]["logged"] for results in processes]  # of the processes' own rows, divided by the mean count
    assert {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]} == pytest.approx(logged(want), abs=1e-5)


# --- objectives of one's own, with several terms


class TwoTerms(ImageClassifier):
    """With a second term that counts the images of even classes, and something to log."""

    def loss(self, batch: Batch) -> Any:
        first, even = super().loss(batch), batch["label"] % 2 == 0  # type: ignore[arg-type]
        second = self.network(batch["image"])[even].square().mean(dim=1).sum()
        logs = {"scale": self.network.head.weight.norm()}
        return [first, Loss(second, even.sum(), logs=logs, name="size")]


class JointTerms(TwoTerms):
    joint = True

    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric(), "size": MeanMetric()}

    def evaluate(self, batch: Batch, metrics: Any) -> None:  # type: ignore[override]
        TrunklineModule.evaluate(self, batch, metrics)


def own(kind: type[TwoTerms]) -> TwoTerms:
    torch.manual_seed(0)
    made = kind(tiny.vit(), optimizer=SGD)
    torch.nn.init.normal_(made.network.head.weight)
    return made


def test_several_terms_accumulate_if_the_class_says_joint(tmp_path: Path) -> None:
    data = batches("ImageClassifier", SIZES[:3])
    parts, whole = own(JointTerms), own(JointTerms)
    fitted = fit(parts, tmp_path, data, accumulate_grad_batches=3)
    expected = fit(whole, tmp_path, [together(data)])
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-6, atol=1e-6)
    names = ("train/loss", "train/size", "train/scale")
    found, want = ({name: run.logged_metrics[name].item() for name in names} for run in (fitted, expected))
    assert found == pytest.approx(want, rel=1e-5)
    with pytest.raises(TrunklineError, match="set `joint = True` in TwoTerms: 2 terms"):
        fit(own(TwoTerms), tmp_path, data, accumulate_grad_batches=3)


def test_default_evaluation_of_several_terms(tmp_path: Path) -> None:
    (batch,) = batches("ImageClassifier", (5,))
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    made = own(JointTerms)
    (found,) = tiny.trainer(tmp_path).validate(made, loader, verbose=False)
    first, second = made.loss(batch)
    del found["val/skipped_images"]
    assert found == pytest.approx(
        {"val/loss": (first.total / 5).item(), "val/size": (second.total / second.count).item()}, rel=1e-5
    )
    bare = own(JointTerms)
    bare.metrics["val"] = torch.nn.ModuleDict({"loss": MeanMetric()})
    with pytest.raises(TrunklineError, match=r"JointTerms\.make_metrics has no metric for 'size'; add one"):
        tiny.trainer(tmp_path).validate(bare, loader, verbose=False)
