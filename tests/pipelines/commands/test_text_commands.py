"""`trunkline fill-mask` and `trunkline embed`."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import BERTConfig
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.cli import main
from trunkline.pipelines.commands.embed import embed, most_similar
from trunkline.pipelines.commands.fill_mask import fill_mask

NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "the", "capital", "of", "france", "cat"]


def words() -> Tokenizer:
    made = Tokenizer(models.WordPiece({name: n for n, name in enumerate(NAMES)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(NAMES[:5])
    return made


def network() -> MaskedLM:
    torch.manual_seed(0)
    backbone = TransformerConfig(dim=16, depth=2, num_heads=2, norm_first=False, final_norm=False)
    made = MaskedLM(BERTConfig(vocab_size=12, max_length=8, backbone=backbone))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return made.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    model = network()
    content: dict[str, Any] = {"objective": "MaskedLM", "state_dict": model.state_dict()}
    content |= {"hyper_parameters": dict(model.hparams), "MaskedTextData": {"tokenizer": words().to_str()}}
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    return str(tmp_path / "a.ckpt")


def test_fill_mask(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fill-mask", "paris is the [MASK] of france", "--checkpoint", checkpoint, "--top_k", "2", "--device", "cpu"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "paris is the [MASK] of france"
    with torch.no_grad():
        logits = network().network(torch.tensor([[2, 5, 6, 7, 4, 9, 10, 3]]))[0, 4]
    best = logits.softmax(-1).topk(2)
    shown = [f"{words().decode([i])} {p:.3f}" for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    assert second == "  " + "  ".join(shown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentence": "paris is the capital"}, r"--sentence 'paris is the capital' has no \[MASK\]; write it"),
        ({"sentence": "[MASK] " * 7}, "has 9 tokens, but the network can see 8; shorten it"),
        ({"sentence": "[MASK]", "top_k": 0}, "--top_k must be at least 1, not 0"),
        ({"sentence": "[MASK]", "checkpoint": "nowhere.ckpt"}, "nowhere.ckpt"),
    ],
)
def test_fill_mask_bad_input(options: dict[str, Any], message: str, checkpoint: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        fill_mask(**{"checkpoint": checkpoint, **options}, device="cpu")


def test_a_tokenizer_without_a_mask(checkpoint: str, tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "plain.json"))
    with pytest.raises(TrunklineError, match=r"the tokenizer has no \[CLS\] or <s> token"):
        fill_mask(checkpoint, "[MASK]", device="cpu", tokenizer=str(tmp_path / "plain.json"))


TEXTS = ["the cat", "paris is the capital of france", "the cat", "france"]


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_embed(pool: Any, checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n\n")
    output = tmp_path / "out.parquet"
    arguments = {"texts": str(tmp_path / "lines.txt"), "output": str(output), "pool": pool, "device": "cpu"}
    embed(checkpoint, **arguments, batch_size=3, projector=str(tmp_path / "board"))
    table = pd.read_parquet(output)
    assert table.text.tolist() == TEXTS
    vectors = np.stack(table.embedding)
    for text, vector in zip(TEXTS, vectors, strict=True):  # alone, so without padding
        ids = [2, *(NAMES.index(word) for word in text.split()), 3]
        with torch.no_grad():
            states = network().network.forward_features(torch.tensor([ids])).x[0]
        want = states[0] if pool == "cls" else states.mean(dim=0)
        np.testing.assert_allclose(vector, want / want.norm(), atol=1e-5)
    assert table.nearest[0] == table.nearest[2] == "the cat"
    assert table.similarity[0] == pytest.approx(1, abs=1e-5)
    cosines = vectors @ vectors.T - 3 * np.eye(4)
    np.testing.assert_allclose(table.similarity, cosines.max(axis=1), atol=1e-5)
    assert (tmp_path / "board" / "projector_config.pbtxt").exists()
    embed(checkpoint, **arguments, normalise=False)
    assert np.linalg.norm(np.stack(pd.read_parquet(output).embedding), axis=1).max() > 1.5


def test_nearest_in_blocks() -> None:
    rows = torch.nn.functional.normalize(torch.randn(1500, 8), dim=1)
    found, cosines = most_similar(rows)
    products = rows @ rows.T - 3 * torch.eye(1500)
    assert found == products.argmax(dim=1).tolist()
    torch.testing.assert_close(torch.tensor(cosines), products.max(dim=1).values)


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        ("", "out.parquet", "holds no text; give one text per line"),
        (
            "the " * 7,
            "out.parquet",
            r"text 1 \('the the .*\) has 9 tokens, but the network sees from 1 to 8",
        ),
        ("the", "out.csv", "must be a .parquet file in a folder that exists"),
        ("the", "nowhere/out.parquet", "must be a .parquet file in a folder that exists"),
    ],
)
def test_embed_bad_input(content: str, output: str, message: str, checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text(content)
    with pytest.raises(TrunklineError, match=message):
        embed(checkpoint, str(tmp_path / "lines.txt"), str(tmp_path / output), device="cpu")


def test_embed_missing_file(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"cannot read --texts .*nowhere\.txt"):
        embed(checkpoint, str(tmp_path / "nowhere.txt"), str(tmp_path / "out.parquet"), device="cpu")


def test_a_language_model_knows_no_images(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(
        TrunklineError, match="is of a language model, which embeds only texts; give --texts, or a checkpoint of a CLIP"
    ):
        embed(checkpoint, images=str(tmp_path), output=str(tmp_path / "out.parquet"), device="cpu")


def test_embed_reads_the_standard_input(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "the cat\n\nparis\n"
    (tmp_path / "lines.txt").write_text(lines)
    want, got = tmp_path / "want.parquet", tmp_path / "got.parquet"
    embed(checkpoint, str(tmp_path / "lines.txt"), str(want), device="cpu")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    embed(checkpoint, "-", str(got), device="cpu")
    pd.testing.assert_frame_equal(pd.read_parquet(got), pd.read_parquet(want))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(TrunklineError, match="--texts - holds no text"):
        embed(checkpoint, "-", str(got), device="cpu")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the sea\n\xff\n")))
    with pytest.raises(TrunklineError, match=r"^standard input:2 is not UTF-8"):
        embed(checkpoint, "-", str(got), device="cpu")
