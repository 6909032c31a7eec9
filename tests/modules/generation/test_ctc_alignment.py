"""Alignment of texts with the outputs of CTC, against torchaudio and against all paths one by one."""

import re
from itertools import groupby, product

import pytest
import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

from trunkline import TrunklineError
from trunkline.contract import IGNORE
from trunkline.modules.generation.ctc import ctc_align, states_needed, token_spans


def rows(seed: int, clips: int, states: int, vocabulary: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, lengths, and targets that fit."""
    draw = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(clips, states, vocabulary + 1, generator=draw).log_softmax(dim=2)
    lengths = torch.randint(states // 2, states + 1, (clips,), generator=draw)
    counts = torch.randint(1, longest + 1, (clips, 1), generator=draw)
    targets = torch.randint(0, vocabulary, (clips, longest), generator=draw)
    targets = targets.masked_fill(torch.arange(longest) >= counts, IGNORE)
    fit = states_needed(targets) <= lengths
    return log_probs[fit], lengths[fit], targets[fit]


def test_paths_are_those_of_torchaudio() -> None:
    """Also their spans, and the mean probability in each span; a small vocabulary repeats itself often."""
    compared = 0
    for seed in range(10):
        log_probs, lengths, targets = rows(seed, clips=8, states=24, vocabulary=3, longest=9)
        places = ctc_align(log_probs, lengths, targets)
        for row, length in enumerate(lengths.tolist()):
            text = targets[row][targets[row] != IGNORE]
            want, scores = forced_align(log_probs[row : row + 1, :length], text[None], blank=3)
            own = torch.where(places[row] < 0, 3, text[places[row].clamp(min=0)])
            assert torch.equal(own[:length], want[0].long())
            assert (places[row, length:] == -1).all()
            spans = token_spans(places[row], log_probs[row], text.tolist())
            merged = merge_tokens(want[0], scores[0], blank=3)
            assert [(text[span.place], span.start, span.end) for span in spans] == [
                (span.token, span.start, span.end) for span in merged
            ]
            assert [span.score for span in spans] == pytest.approx([span.score for span in merged], abs=1e-5)
            assert [span.place for span in spans] == list(range(len(text)))
            compared += 1
    assert compared > 60


def test_no_path_is_likelier() -> None:
    log_probs, lengths, targets = rows(3, clips=5, states=6, vocabulary=2, longest=3)
    assert len(log_probs) >= 3
    places = ctc_align(log_probs.double(), lengths, targets)
    for row, length in enumerate(lengths.tolist()):
        text = targets[row][targets[row] != IGNORE].tolist()
        paths = [
            path
            for path in product(range(3), repeat=length)
            if [token for token, _ in groupby(path) if token != 2] == text
        ]
        best = max(paths, key=lambda path: sum(float(log_probs[row, t, token]) for t, token in enumerate(path)))
        assert [2 if place < 0 else text[place] for place in places[row, :length].tolist()] == list(best)


def test_texts_that_are_empty_or_just_fit() -> None:
    log_probs = torch.zeros(3, 5, 4).log_softmax(dim=2)
    targets = torch.tensor([[IGNORE] * 3, [1, 1, 1], [0, 1, 2]])
    places = ctc_align(log_probs, torch.tensor([5, 5, 3]), targets)
    assert places.tolist() == [[-1] * 5, [0, -1, 1, -1, 2], [0, 1, 2, -1, -1]]
    assert token_spans(places[0], log_probs[0], []) == []


def test_states_that_a_text_needs() -> None:
    targets = torch.tensor([[1, 2, 3, 1], [1, 1, 1, 1], [2, 2, IGNORE, IGNORE], [IGNORE] * 4])
    assert states_needed(targets).tolist() == [4, 7, 3, 0]


def test_a_text_that_does_not_fit() -> None:
    targets = torch.tensor([[1, 2, IGNORE], [0, 1, 1]])
    message = "text 1 needs 4 states, but its clip has 3; align a shorter text"
    with pytest.raises(TrunklineError, match=re.escape(message)):
        ctc_align(torch.zeros(2, 4, 3), torch.tensor([4, 3]), targets)
