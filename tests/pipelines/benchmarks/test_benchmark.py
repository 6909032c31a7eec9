"""`trunkline benchmark`: its arithmetic under a clock of our own, and each case once, in small."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from tiny import batches, vit
from torch import nn

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import GPTConfig, ViT
from trunkline.pipelines.benchmarks import benchmark as module
from trunkline.pipelines.benchmarks import clip_cases as benchmark_clip
from trunkline.pipelines.benchmarks import export_cases as benchmark_export
from trunkline.pipelines.benchmarks import image_cases as benchmark_image
from trunkline.pipelines.benchmarks import jpeg_cases, saves, timing
from trunkline.pipelines.benchmarks import loss_cases as benchmark_loss
from trunkline.pipelines.benchmarks import seq2seq_cases as benchmark_seq2seq
from trunkline.pipelines.benchmarks import text_cases as benchmark_text
from trunkline.pipelines.benchmarks.benchmark import benchmark
from trunkline.pipelines.benchmarks.timing import bare_loop, compare

KEYS = {"case", "peer", "ms", "peer_ms", "ratio", "range"}


def sides(ours: list[float], theirs: list[float]) -> tuple[Callable[[], float], Callable[[], float], list[str]]:
    """Two sides that take these seconds, and a record of their turns; the first two turns of each are a warm-up."""
    turns: list[str] = []
    seconds = {"ours": iter([1e6, 1e6, *ours]), "theirs": iter([1e-6, 1e-6, *theirs])}

    def side(name: str) -> Callable[[], float]:
        def run() -> float:
            turns.append(name)
            return next(seconds[name])

        return run

    return side("ours"), side("theirs"), turns


def test_compare() -> None:
    ours, theirs, turns = sides([1, 2, 4], [3, 3, 5])
    row = compare("step", "peer", ours, theirs, rounds=3)
    assert row == {"case": "step", "peer": "peer", "ms": 2000, "peer_ms": 3000, "ratio": 1.5, "range": (1.25, 3)}
    pairs = [tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    one, other = ("ours", "theirs"), ("theirs", "ours")  # whoever goes first may find the caches cold
    assert pairs == [one, one, one, other, one]


def test_the_median_of_the_ratios_is_not_the_ratio_of_the_medians() -> None:
    ours, theirs, _ = sides([1, 10, 100, 100], [2, 10, 50, 400])
    row = compare("", "", ours, theirs, rounds=4)
    assert row["ratio"] == 1.5  # of 2, 1, 0.5 and 4
    assert row["peer_ms"] / row["ms"] == pytest.approx(30 / 55)
    assert row["range"] == (0.5, 4)


def test_bare_loop_trains_and_returns_seconds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    (batch,), network = batches(1), ViT(vit())
    want = ViT(vit())
    want.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(want.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(want(batch["image"]), batch["label"]).backward()
        optimizer.step()

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(network(batch["image"]), batch["label"])

    assert bare_loop(network, loss, steps=3)() == 2.0
    torch.testing.assert_close(network.state_dict(), want.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks on both sides, for the images that the cases draw; nothing is compiled."""
    config = vit(image_size=224, patch_size=112, in_chans=3, num_classes=1000)
    overhead = vit(image_size=64, patch_size=32, in_chans=3)
    monkeypatch.setattr(benchmark_image, "ViTConfig", lambda **options: overhead if options else config)
    monkeypatch.setattr(timm, "create_model", lambda name: ViT(config))
    monkeypatch.setattr(benchmark_image, "TransformerConfig", lambda **options: config.backbone)
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(saves, "SIDE", 50)
    monkeypatch.setattr(benchmark_export, "EXPORTED_SHAPE", GPTConfig(50, 8, backbone=TransformerConfig(16, 1, 2)))
    monkeypatch.setattr(benchmark_export, "EXPORTED_LENGTH", 8)
    monkeypatch.setattr(benchmark_export, "peak_memory", lambda prepare: [prepare()()] and 3 << 20)
    monkeypatch.setattr(benchmark_text, "LENGTH", 8)
    monkeypatch.setattr(benchmark_text, "MASKED_LENGTH", 8)
    monkeypatch.setattr(benchmark_text, "NEW_TOKENS", 2)
    masked = transformers.BertConfig
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(transformers, "BertConfig", lambda **_: masked(**tiny))
    monkeypatch.setattr(benchmark_text, "TransformerConfig", lambda **_: TransformerConfig(16, 1, 2))
    configure = transformers.GPT2Config
    shape = {"IMAGE_SIZE": 16, "WIDTH": 64, "IMAGE_LAYERS": 1, "TEXT_LAYERS": 1, "VOCABULARY": 50, "LENGTH": 8}
    for name, value in {**shape, "LARGE": 4, "CHUNK": 2}.items():
        monkeypatch.setattr(benchmark_clip, name, value)
    monkeypatch.setattr(benchmark_clip, "peak_memory", lambda prepare: prepare.args[0] << 20)
    monkeypatch.setattr(benchmark_loss, "VOCABULARY", 50)
    monkeypatch.setattr(jpeg_cases, "JPEG_SIZES", ((40, 30),))
    monkeypatch.setattr(benchmark_loss, "peak_memory", lambda prepare: prepare()() and len(prepare.args[0]) << 20)
    ends = {"bos_token_id": None, "eos_token_id": None}
    monkeypatch.setattr(transformers, "GPT2Config", lambda **_: configure(n_embd=16, n_layer=1, n_head=2, **ends))
    tiny_t5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    for name, value in {"SHAPE": tiny_t5, "PAIR_LENGTH": 5, "WRITTEN": 3}.items():
        monkeypatch.setattr(benchmark_seq2seq, name, value)


CASES = {
    "vit": [("ViT-Ti/16 fp32 eager", "timm fp32 eager")],
    "vit_compiled": [("ViT-Ti/16 bf16 compiled", "timm fp32 eager"), ("timm's own, bf16 compiled", "timm fp32 eager")],
    "gpt": [("GPT fp32 eager", "transformers fp32 eager")],
    "gpt_compiled": [
        ("GPT bf16 compiled", "transformers fp32 eager"),
        ("transformers' own, bf16 compiled", "transformers fp32 eager"),
    ],
    "bert": [("BERT-mini fp32 eager", "transformers fp32 eager")],
    "bert_compiled": [("BERT-mini bf16 compiled", "transformers bf16 compiled")],
    "clip": [("CLIP fp32 eager", "open_clip fp32 eager")],
    "clip_compiled": [
        ("CLIP bf16 compiled", "open_clip fp32 eager"),
        ("open_clip's own, bf16 compiled", "open_clip fp32 eager"),
    ],
    "clip_chunks": [("a pair, in chunks", "a pair, plain")],
    "seq2seq": [
        ("T5 fp32 eager", "transformers fp32 eager"),
        ("T5 bf16 compiled", "transformers fp32 eager"),
        ("transformers' own, bf16 compiled", "transformers fp32 eager"),
        ("T5 token, 4 beams", "transformers fp32 eager"),
    ],
    "generation": [(f"GPT-2 124M token, {name}", "transformers fp32") for name in ("fp32", "bf16", "int8")],
    "tokenization": [("BPE of 4.2 MB", "tokenizers' encode_batch_fast")],
    "loss": [("chunked loss", "plain loss")],
    "muon": [("Muon step", "torch.optim.Muon")],
    "overhead": [("trainer.fit", "bare loop")],
    "jpeg": [(f"JPEG of 40 x 30, {name}", "decoded whole") for name in ("training", "evaluation")],
    "export": [("GPT-2 in onnxruntime, 2 x 8", "our own eager")],
    "saves": [("training held up by a save", "written at once"), ("a step beside a save", "a step alone")],
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("what", CASES)
def test_case(what: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(what, rounds=1, batch_size=2, output=str(tmp_path / "figures.json"))
    rows, shown = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert [(row["case"], row["peer"]) for row in rows] == CASES[what]
    for row in rows:
        assert row.keys() == KEYS
        assert row["ms"] > 0
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ms"])  # of the one round
        assert row["range"] == [row["ratio"], row["ratio"]]
        assert f"{row['ratio']:.3f}" in shown
    if what == "export":
        assert "peak memory of loading and one row: 3 MiB, eager 3 MiB" in shown
    if what == "loss":
        assert "loss of 2 x 50 logits, peak memory: chunked loss 7 MiB, plain loss 5 MiB" in shown
    if what == "clip_chunks":
        assert "2 pairs 2 MiB, 4 in chunks of 2 4 MiB" in shown


def test_both_encoder_decoders_are_one_network(small: None) -> None:
    """Equal losses at first, and equal texts."""
    ours, theirs = benchmark_seq2seq._t5_pair()
    tokens, targets = torch.randint(2, 50, (2, 3, 5))
    given = torch.cat((torch.zeros_like(targets[:, :1]), targets[:, :-1]), dim=1)
    want = theirs(input_ids=tokens, labels=targets)
    torch.testing.assert_close(ours(tokens, given), want.logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_all_is_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {*CASES, "audio", "ddp"}  # these are in test_audio_cases.py and test_ddp.py
    assert set(module.CASES) == cases
    for name in cases:
        row = {"case": name, "peer": "", "ms": 1.0, "peer_ms": 2.0, "ratio": 2.0, "range": (1.5, 2.5)}
        monkeypatch.setitem(module.CASES, name, lambda rounds, size, row=row: [row | {"given": (rounds, size)}])
    monkeypatch.setattr(module, "svm_accuracy", lambda: 0.5)
    monkeypatch.setattr(module, "bert_memory", lambda size: (size + 5.2, 1e3))
    monkeypatch.setattr(module, "ngram_accuracy", lambda data: data.train_rows / 4000)
    monkeypatch.setattr(module, "date_matches", lambda names: {name: len(name) / 100 for name in names})
    monkeypatch.setattr(module, "dtw_errors", lambda: {"spoken_digits:voices": 0.125})
    started = {"command": "fit", "first": 1.0, "whole": 2.0, "end": 0.5, "ratio": 1.5}
    monkeypatch.setattr(module, "start_times", lambda rounds: [started])
    monkeypatch.setattr(module, "loading_times", lambda rounds: [])
    benchmark(rounds=3, batch_size=7, output=str(tmp_path / "figures.json"))
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert {row["case"]: row["given"] for row in rows} == {name: [3, 7] for name in cases}
    shown = capsys.readouterr().out
    assert "test accuracy 0.5000" in shown
    assert "test accuracy 0.2500" in shown
    assert "spoken_digits:voices: digit error 0.1250" in shown
    assert "dates:years: exact match 0.1100" in shown
    assert "dates:languages: exact match 0.1500" in shown
    assert "peak memory of a training step: 12 MiB; transformers: 1000 MiB" in shown


def test_the_memory_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(benchmark_text, "peak_memory", lambda prepare: asked.append(prepare) or len(asked) << 20)
    assert benchmark_text.bert_memory(None) == (1, 2)
    monkeypatch.setattr(benchmark_text, "_bert_loops", lambda size: [f"ours {size}", f"theirs {size}"])
    assert [prepare() for prepare in asked] == ["ours 32", "theirs 32"]


def test_no_folder_for_the_figures_is_found_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"--output .*figures\.json: there is no folder .*nowhere; make it first"):
        benchmark(output=str(tmp_path / "nowhere" / "figures.json"))
