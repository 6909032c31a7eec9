"""Texts from the outputs of CTC (connectionist temporal classification; Graves et al., 2006), and their alignment.

Needs only torch. Shape legend: B clips, T states of a clip, V tokens, N tokens of a text, S = 2 N + 1. The blank is the
last output, id V.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.contract import IGNORE


def ctc_greedy(scores: Tensor, lengths: Tensor) -> list[list[int]]:
    """The tokens of the likeliest path of each clip: one entry for each run of a token, without blanks.

    Args:
        scores: (B, T, V + 1) logits or log-probabilities.
        lengths: (B,) number of states of each clip.
    """
    blank, paths = scores.shape[2] - 1, zip(scores.argmax(dim=2).tolist(), lengths.tolist(), strict=True)
    return [[token for token, _ in groupby(path[:length]) if token != blank] for path, length in paths]


def states_needed(targets: Tensor) -> Tensor:
    """Fewest states (B,) that can name these tokens (B, N), `IGNORE` after their end.

    One for each token, and one for the blank that must stand between two equal ones.
    """
    real = targets != IGNORE
    repeated = (targets[:, 1:] == targets[:, :-1]) & real[:, 1:]
    return real.sum(dim=1) + repeated.sum(dim=1)


class TokenSpan(NamedTuple):
    """The states that name a token of a text."""

    place: int
    """Number of the token in the text, from 0."""
    start: int
    """First state."""
    end: int
    """The state after the last one."""
    score: float
    """Mean log-probability of the token in these states."""


@torch.no_grad()
def ctc_align(log_probs: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """The likeliest path through the states of each clip that reads as its text (Viterbi).

    Args:
        log_probs: (B, T, V + 1).
        lengths: (B,) number of states of each clip.
        targets: (B, N) tokens of the texts, `IGNORE` after their end.

    Returns:
        (B, T) int64: place in the text of the token that a state names; -1 for a blank, and after the end of a clip.

    Raises:
        TrunklineError: if a text has more tokens than its clip has states.
    """
    needed = states_needed(targets)
    for row in (needed > lengths).nonzero()[:1, 0].tolist():
        raise TrunklineError(
            f"text {row} needs {int(needed[row])} states, but its clip has {int(lengths[row])}; align a shorter text"
        )
    chain = with_blanks(targets, log_probs.shape[2] - 1)  # (B, S)
    skips = torch.zeros_like(chain, dtype=torch.bool)  # whether the blank before a token may be left out
    skips[:, 3::2] = chain[:, 3::2] != chain[:, 1:-2:2]
    best = torch.full(chain.shape, -torch.inf, dtype=log_probs.dtype, device=log_probs.device)  # best score of a path
    best[:, 0] = 0.0  # (B, S) that ends here; before the first state, as if a blank came before
    moves = []
    for t, scores in enumerate(log_probs.unbind(dim=1)):
        one, two = (shifted(best, n) for n in (1, 2))
        reached, move = torch.stack((best, one, two.masked_fill(~skips, -torch.inf))).max(dim=0)
        reached = reached + scores.gather(1, chain)
        heard = (t < lengths)[:, None]
        best = torch.where(heard, reached, best)
        moves.append(move * heard)
    last = 2 * (targets != IGNORE).sum(dim=1, keepdim=True)  # (B, 1) the blank after the text
    before = (last - 1).clamp(min=0)
    place = torch.where(best.gather(1, before) > best.gather(1, last), before, last)
    path = []
    for move in reversed(moves):
        path.append(place)
        place = place - move.gather(1, place)
    places = torch.cat(path[::-1], dim=1)
    heard = torch.arange(len(moves), device=lengths.device) < lengths[:, None]
    return torch.where(heard & (places % 2 == 1), places // 2, -1)


def with_blanks(targets: Tensor, blank: int) -> Tensor:
    """Tokens (B, N) -> (B, 2 N + 1) with a blank before, between and after them; padding becomes blanks."""
    chain = targets.new_full((len(targets), 2 * targets.shape[1] + 1), blank)
    chain[:, 1::2] = targets.masked_fill(targets == IGNORE, blank)
    return chain


def shifted(x: Tensor, count: int) -> Tensor:
    """(B, S) moved to the right by `count`, with minus infinity in front."""
    return torch.nn.functional.pad(x, (count, 0), value=-torch.inf)[:, : x.shape[1]]


def token_spans(places: Tensor, log_probs: Tensor, tokens: Sequence[int]) -> list[TokenSpan]:
    """Where the tokens of a text stand in its clip.

    Args:
        places: (T,) a row of `ctc_align`.
        log_probs: (T, V + 1) of the clip.
        tokens: the text.

    Returns:
        One span for each token, in the order of the text.
    """
    spans, start = [], 0
    for place, run in groupby(places.tolist()):
        end = start + len(list(run))
        if place >= 0:
            spans.append(TokenSpan(place, start, end, float(log_probs[start:end, tokens[place]].mean())))
        start = end
    return spans
