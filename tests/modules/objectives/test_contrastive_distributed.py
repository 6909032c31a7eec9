"""Loss and gradients on several processes are those of one process that sees the whole batch."""

import math
import socket
from pathlib import Path

import pytest
import torch
from contrastive_processes import CASES, PAIRS, evaluation, losses_and_gradients, worker
from recorded_run import CONTEXT


@pytest.fixture(scope="module")
def whole() -> list[dict[str, torch.Tensor]]:
    return losses_and_gradients()


@pytest.mark.parametrize("counts", [[6, 5], [4, 4, 3], [1, 3, 7]], ids=str)
def test_equal_to_one_process(counts: list[int], whole: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    assert sum(counts) == PAIRS
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [CONTEXT.Process(target=worker, args=(r, counts, port, tmp_path)) for r in range(len(counts))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    results = torch.load(tmp_path / "results.pt")
    for case, got, want in zip(CASES, results["steps"], whole, strict=True):
        assert want["network.image.patch_embed.proj.weight"].abs().max() > 1e-2, case  # there is something to compare
        assert want["network.scale.logit_scale"].abs() > 1e-3, case
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}")
    # Pairs 6 to 10 are not valid: with [6, 5] one process has none, and no process has any in the second batch.
    alone = evaluation([PAIRS])
    assert results["evaluation"] == pytest.approx(alone, abs=1e-5)
    assert alone["val/chance_loss"] == pytest.approx(math.log(6))
    assert {"val/loss", "val/text_to_image_R@1", "val/image_to_text_median_rank"} <= alone.keys()


def test_cases_differ(whole: list[dict[str, torch.Tensor]]) -> None:
    """Chunks change nothing; to ignore equal captions does."""
    for negatives, ignored, chunked in (whole[:3], whole[3:]):
        torch.testing.assert_close(chunked, ignored, rtol=1e-5, atol=1e-5)
        assert negatives["loss"] - ignored["loss"] > 1e-2
