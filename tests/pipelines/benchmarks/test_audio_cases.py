from typing import Any

import pytest
import torch
from torch import nn

from trunkline.modules.backbone import TransformerConfig
from trunkline.pipelines.benchmarks import audio_cases
from trunkline.pipelines.benchmarks.audio_cases import audio, features_speed


def test_features_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute in so many milliseconds is so many times real time; on one thread, and then on as many as before."""
    threads, used = torch.get_num_threads(), []

    def compare(
        case: str, peer: str, ours: audio_cases.Side, theirs: audio_cases.Side, rounds: int
    ) -> dict[str, object]:
        used.append((torch.get_num_threads(), ours() > 0, theirs() > 0, rounds))
        return {"case": case, "peer": peer, "ms": 10.0, "peer_ms": 30.0}

    monkeypatch.setattr(audio_cases, "compare", compare)
    rows = features_speed(7)
    assert used == [(1, True, True, 7)] * 2
    assert [row["case"] for row in rows] == [f"log-mel, {c}: 6000 times real time" for c in ("Kaldi", "Whisper")]
    assert all(row["real_time"] == 6000 and row["peer_real_time"] == 2000 for row in rows)
    assert torch.get_num_threads() == threads


def test_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks are of one size; two loops of four are compiled, and the eager peer is beside every case."""
    pytest.importorskip("transformers")
    compiled: list[nn.Module] = []
    sides: list[list[audio_cases.Side]] = []
    monkeypatch.setattr(audio_cases, "AST_TRUNK", TransformerConfig(dim=16, depth=2, num_heads=2))
    monkeypatch.setattr(audio_cases, "AST_FRAMES", 32)
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(audio_cases, "features_speed", lambda rounds: [{"case": "features", "rounds": rounds}])

    def compare(case: str, peer: str, ours: audio_cases.Side, theirs: audio_cases.Side, rounds: int) -> dict[str, Any]:
        sides.append([ours, theirs])
        return {"case": case, "peer": peer, "rounds": rounds, "positive": ours() > 0 and theirs() > 0}

    monkeypatch.setattr(audio_cases, "compare", compare)
    rows = audio(3, 2)
    assert [row["case"] for row in rows] == [
        "AST fp32 eager",
        "AST bf16 compiled",
        "transformers' own, bf16 compiled",
        "features",
    ]
    assert all(row["peer"] == "transformers fp32 eager" and row["positive"] for row in rows[:3])
    assert [row["rounds"] for row in rows] == [3] * 4
    eager = sides[0][1]
    assert [side[1] for side in sides] == [eager] * 3
    assert len({side[0] for side in sides} | {eager}) == 4
    assert isinstance(compiled[0], audio_cases.AST)
    sizes = [sum(p.numel() for p in network.parameters()) for network in compiled]
    assert sizes[0] == sizes[1] - 2 * 16  # ours keeps the positions of the two class tokens within these tokens
