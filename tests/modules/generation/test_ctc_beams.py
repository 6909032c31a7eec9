"""Prefix beam search against all paths one by one, and against a slow search with dictionaries."""

import math
from collections import defaultdict
from itertools import groupby, product
from typing import Any

import pytest
import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation.ctc import ctc_greedy
from trunkline.modules.generation.ctc_beams import CTCDecoding, LanguageModel, ctc_beams, ctc_texts
from trunkline.modules.networks import GPT, GPTConfig

Text = tuple[int, ...]


def drawn(clips: int, states: int, vocabulary: int, seed: int = 0, peaked: float = 1.0) -> Tensor:
    logits = torch.randn(clips, states, vocabulary + 1, generator=torch.Generator().manual_seed(seed))
    return (logits.double() * peaked).log_softmax(dim=2)


def all_texts(log_probs: Tensor) -> dict[Text, float]:
    """Log-probability of each text that the states (T, V + 1) can read as, summed over all paths."""
    blank, found = log_probs.shape[1] - 1, defaultdict(float)
    for path in product(range(blank + 1), repeat=len(log_probs)):
        text = tuple(token for token, _ in groupby(path) if token != blank)
        found[text] += math.exp(sum(float(log_probs[t, token]) for t, token in enumerate(path)))
    return {text: math.log(value) for text, value in found.items()}


def slow_search(log_probs: Tensor, beams: int, gain: Any = None) -> dict[Text, float]:
    """As in arXiv:1408.2873, over (T, V + 1): the texts that are kept after the last state, and their probability."""
    blank = log_probs.shape[1] - 1
    kept: dict[Text, tuple[float, float]] = {(): (1.0, 0.0)}  # ends in a blank, ends in its last token
    for row in log_probs.exp().tolist():
        grown: dict[Text, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for text, (after_blank, after_token) in kept.items():
            grown[text][0] += (after_blank + after_token) * row[blank]
            if text:
                grown[text][1] += after_token * row[text[-1]]
            for token in range(blank):
                before = after_blank if text and token == text[-1] else after_blank + after_token
                grown[(*text, token)][1] += before * row[token]
        scores = {text: math.log(sum(p)) + (gain(text) if gain else 0) for text, p in grown.items() if sum(p) > 0}
        best = sorted(scores, key=lambda text: -scores[text])[:beams]
        kept = {text: (grown[text][0], grown[text][1]) for text in best}
    return {text: math.log(sum(p)) for text, p in kept.items()}


def language_model(vocabulary: int, max_length: int = 16, end: int | None = None) -> LanguageModel:
    """A GPT with a token more, which starts a text."""
    torch.manual_seed(4)
    network = GPT(GPTConfig(vocabulary + 1, max_length, backbone=TransformerConfig(dim=16, depth=2, num_heads=2)))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return LanguageModel(network.double(), vocabulary, end)


@torch.no_grad()
def score_of(model: LanguageModel, text: Text, end: bool = False) -> float:
    """Log-probability of a text, from the network's own forward pass."""
    network: Any = model.decoder
    tokens = [model.start, *text]
    log_probs = network.eval()(torch.tensor([tokens])).log_softmax(2)[0]
    total = sum(float(log_probs[place, token]) for place, token in enumerate(text))
    return total + (float(log_probs[-1, model.end]) if end and model.end is not None else 0.0)


# --- the search alone


def test_with_room_for_all_texts_it_finds_their_exact_probabilities() -> None:
    for seed in range(5):
        log_probs = drawn(2, 5, 2, seed)
        found = ctc_beams(log_probs, torch.tensor([5, 3]), CTCDecoding(100))
        for row, length in enumerate((5, 3)):
            want = all_texts(log_probs[row, :length])
            assert {tuple(beam.tokens): beam.log_prob for beam in found[row]} == pytest.approx(want, abs=1e-9)
            assert [beam.score for beam in found[row]] == pytest.approx(sorted(want.values(), reverse=True))
            assert all(beam.score == beam.log_prob for beam in found[row])


@pytest.mark.parametrize("beams", [2, 3, 8])
def test_with_few_beams_it_is_the_slow_search(beams: int) -> None:
    """Texts leave the beams and come back."""
    for seed in range(8):
        log_probs = drawn(3, 12, 4, seed)
        lengths = torch.tensor([12, 7, 1])
        for row, found in enumerate(ctc_beams(log_probs, lengths, CTCDecoding(beams))):
            want = slow_search(log_probs[row, : lengths[row]], beams)
            assert {tuple(beam.tokens): beam.log_prob for beam in found} == pytest.approx(want, abs=1e-9)


def test_a_clip_alone_and_beside_longer_ones() -> None:
    """Whatever stands after its end."""
    log_probs, lengths = drawn(3, 10, 4), torch.tensor([10, 6, 0])
    together = ctc_beams(log_probs, lengths, CTCDecoding(4))
    for row, length in enumerate(lengths.tolist()):
        assert ctc_beams(log_probs[row : row + 1, :length], lengths[row : row + 1], CTCDecoding(4)) == [together[row]]
    assert together[2] == [([], 0.0, 0.0)]


def test_paths_of_one_text_count_together() -> None:
    """The likeliest path is blank, blank; but more than half of the probability is the text of one token."""
    row = torch.tensor([0.4, 0.6]).log()  # of the token, of the blank
    log_probs, lengths = row.expand(1, 2, 2), torch.tensor([2])
    assert ctc_greedy(log_probs, lengths) == ctc_texts(log_probs, lengths, CTCDecoding()) == [[]]
    (found,) = ctc_beams(log_probs, lengths, CTCDecoding(2))
    assert [beam.tokens for beam in found] == [[0], []]
    assert [math.exp(beam.log_prob) for beam in found] == pytest.approx([0.64, 0.36])
    assert ctc_texts(log_probs, lengths, CTCDecoding(2)) == [[0]]


def test_greedy_texts() -> None:
    """Equal tokens with a blank between them are two; what follows the end of a clip is not heard."""
    paths = torch.tensor([[1, 1, 2, 1, 2, 2, 0], [2, 2, 2, 0, 0, 1, 1]])
    scores = torch.nn.functional.one_hot(paths, 3).float()
    assert ctc_greedy(scores, torch.tensor([7, 5])) == [[1, 1, 0], [0]]
    assert ctc_greedy(scores, torch.tensor([4, 0])) == [[1, 1], []]


def test_a_bonus_for_length() -> None:
    log_probs, lengths = drawn(2, 5, 2), torch.tensor([5, 5])
    for bonus in (-1.5, 1.5):
        for row, found in enumerate(ctc_beams(log_probs, lengths, CTCDecoding(100, length_bonus=bonus))):
            want = {text: value + bonus * len(text) for text, value in all_texts(log_probs[row]).items()}
            assert {tuple(beam.tokens): beam.score for beam in found} == pytest.approx(want, abs=1e-9)


# --- with a language model


@pytest.mark.parametrize("end", [None, 2])
def test_scores_with_a_language_model(end: int | None) -> None:
    """Log-probability of the sound + weight * that of the text, with its end if it has one + bonus."""
    model, log_probs, lengths = language_model(2, end=end), drawn(2, 5, 2), torch.tensor([5, 4])
    found = ctc_beams(log_probs, lengths, CTCDecoding(100, lm_weight=0.7, length_bonus=0.3), model)
    for row, beams in enumerate(found):
        heard = all_texts(log_probs[row, : lengths[row]])
        want = {text: heard[text] + 0.7 * score_of(model, text, end=True) + 0.3 * len(text) for text in heard}
        assert {tuple(beam.tokens): beam.score for beam in beams} == pytest.approx(want, abs=1e-9)
        assert {tuple(beam.tokens): beam.log_prob for beam in beams} == pytest.approx(heard, abs=1e-9)
        assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)


@pytest.mark.parametrize("beams", [2, 4])
def test_a_language_model_decides_which_texts_stay(beams: int) -> None:
    model, lengths = language_model(4), torch.tensor([9, 6])
    config = CTCDecoding(beams, lm_weight=1.5, length_bonus=0.5)
    for seed in range(4):
        log_probs = drawn(2, 9, 4, seed)
        for row, found in enumerate(ctc_beams(log_probs, lengths, config, model)):
            want = slow_search(
                log_probs[row, : lengths[row]], beams, lambda text: 1.5 * score_of(model, text) + 0.5 * len(text)
            )
            assert {tuple(beam.tokens): beam.log_prob for beam in found} == pytest.approx(want, abs=1e-9)


def test_a_language_model_that_forgets_the_beginning() -> None:
    model = language_model(4, max_length=3)
    texts = [[], [1], [1, 2, 0, 3], [2, 0, 3], [0, 0, 3]]
    found = model.log_probs(texts)
    assert torch.allclose(found[2], found[3], rtol=0, atol=1e-12)
    assert not torch.allclose(found[3], found[4], rtol=0, atol=1e-3)
    for text, row in zip(texts[:2], found, strict=False):
        assert float(row[3]) == pytest.approx(score_of(model, (*text, 3)) - score_of(model, tuple(text)))


def test_a_language_model_is_left_as_it_was() -> None:
    model: Any = language_model(2)
    model.decoder.train()
    ctc_beams(drawn(1, 4, 2), torch.tensor([4]), CTCDecoding(3), model)
    assert all(module.training for module in model.decoder.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, not 0; 1 is greedy"),
        ({"lm_weight": -0.1}, "lm_weight must be at least 0, not -0.1; 0 ignores the language model"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        CTCDecoding(**options)


def test_language_models_that_cannot_help() -> None:
    log_probs, lengths = drawn(1, 4, 5), torch.tensor([4])
    message = "the language model knows 3 tokens, but the recogniser writes 5; train it with the recogniser's tokenizer"
    with pytest.raises(TrunklineError, match=message):
        ctc_beams(log_probs, lengths, CTCDecoding(3), language_model(2))
    with pytest.raises(TrunklineError, match="a language model helps to choose among beams; set num_beams above 1"):
        ctc_texts(log_probs, lengths, CTCDecoding(), language_model(5))
