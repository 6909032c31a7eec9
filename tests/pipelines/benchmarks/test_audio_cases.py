import pytest
import torch

from trunkline.pipelines.benchmarks import audio_cases
from trunkline.pipelines.benchmarks.audio_cases import features_speed


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
