"""`trunkline export` from a checkpoint to files that run on their own."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from handed_out import CLASSES, checkpoint_of

from trunkline.modules.networks import export as module
from trunkline.pipelines.cli import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def files() -> set[str]:
    return {file.name for file in Path().iterdir()}


def test_a_checkpoint_as_onnx(capsys: pytest.CaptureFixture[str]) -> None:
    network = checkpoint_of("vit", Path("vit.ckpt"))
    main(["export", "--checkpoint", "vit.ckpt", "--output", "pets.onnx"])
    shown = capsys.readouterr().out
    assert "pets.onnx: ONNX, opset 20, 0.2 MB; image (batch, 3, 16, 16) -> logits" in shown
    assert "compared with the network at 4 sizes: results differ by" in shown
    assert files() == {"vit.ckpt", "pets.onnx", "preprocessing.json"}
    session = onnxruntime.InferenceSession("pets.onnx")
    image = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        want = network(image).numpy()
    np.testing.assert_allclose(session.run(["logits"], {"image": image.numpy()})[0], want, rtol=1e-4, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == CLASSES
    assert json.loads(Path("preprocessing.json").read_text())["pictures"]["mean"] == [0.4, 0.5, 0.6]


def test_a_saved_encoder_decoder_as_programs(capsys: pytest.CaptureFixture[str]) -> None:
    network = checkpoint_of("t5", Path("t5.ckpt"))
    network.save_pretrained("saved")
    main(["export", "--checkpoint", "saved", "--output", "dates.pt2", "--to", "torch-export"])
    shown = capsys.readouterr().out
    assert "dates_encoder.pt2: a program of torch.export, " in shown
    assert "target_tokens (batch, target_length), context (batch, states, 16), context_mask (batch, states)" in shown
    encoder, decoder = (torch.export.load(f"dates_{part}.pt2").module() for part in ("encoder", "decoder"))
    source, target = torch.randint(0, 300, (4, 7)), torch.randint(0, 300, (4, 5))
    with torch.no_grad():
        want, mask = network(source, target), torch.ones_like(source, dtype=torch.bool)
        found = decoder(target_tokens=target, **encoder(tokens=source, mask=mask))["logits"]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_what_failed_leaves_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_of("gpt", Path("gpt.ckpt"))
    before = files()
    monkeypatch.setattr(module, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(SystemExit) as end:
        main(["export", "--checkpoint", "gpt.ckpt", "--output", "gpt.pt2", "--to", "torch-export"])
    assert end.value.code == 2
    assert "error: gpt.pt2 gives other results than the GPT: at " in capsys.readouterr().err
    assert files() == before
    Path("gpt.onnx").write_text("mine")
    with pytest.raises(SystemExit):
        main(["export", "--checkpoint", "gpt.ckpt", "--output", "gpt.onnx"])
    assert "error: there is gpt.onnx already; choose another folder or name\n  (--output" in capsys.readouterr().err
    assert Path("gpt.onnx").read_text() == "mine"


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_of("vit", Path("vit.ckpt"))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(SystemExit):
        main(["export", "--checkpoint", "vit.ckpt", "--output", "vit.onnx"])
    assert "ONNX needs the package onnxruntime: pip install 'trunkline[onnx]'" in capsys.readouterr().err
    assert files() == {"vit.ckpt"}
