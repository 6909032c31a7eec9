"""Beam search: extend several texts per prompt in parallel and return the likeliest.

Needs only torch. Shape legend: B rows, T tokens of the prompt, V vocabulary, N beams, L new tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline.modules.generation.decoding import (
    Decoder,
    GenerationConfig,
    Window,
    check_prompts,
    cut,
    evaluating,
    filter_logits,
    tokens_seen,
)

NEVER = -1e9
"""Score of a beam that must not be chosen."""


class Beam(NamedTuple):
    """One text that beam search found."""

    tokens: list[int]
    """Without the end token."""
    score: float
    """Sum of the tokens' log-probabilities, divided by their number ** length_penalty; the end token counts too."""


@torch.inference_mode()
def beam_search(
    decoder: Decoder,
    tokens: Tensor,
    mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    end_ids: Sequence[int] = (),
) -> list[list[Beam]]:
    """The N best texts of each row, the best first.

    As in Hugging Face with `early_stopping=False`: a row is done when its best running beam, scored at its current
    length, is not better than its worst ended text. Arguments and errors are those of `sampling.stream`.
    """
    config = config or GenerationConfig(num_beams=4)
    tokens, mask = check_prompts(decoder, tokens, mask, config)
    ends = tokens.new_tensor(end_ids)
    beams = Beams(len(tokens), config, tokens.device)
    with evaluating(decoder):
        seen = tokens_seen(decoder, tokens, mask, config)
        window = Window(decoder, tokens, mask, config.max_new_tokens - 1)
        every = torch.arange(len(tokens), device=tokens.device).repeat_interleave(config.num_beams)
        window.take(every)
        seen = None if seen is None else seen[every]
        greedy = replace(config, temperature=0.0)
        while True:
            scores = window.logits.float().log_softmax(dim=1)
            repeated, first = window.repeats(config.no_repeat_ngram), beams.length == 0
            scores = filter_logits(scores, greedy, seen, repeated, first)
            source, chosen = beams.grow(scores, ends)
            if not beams.going():
                return beams.results(end_ids)
            window.take(source, logits=False)
            window.append(chosen)
            if seen is not None:
                seen = seen[source].scatter_(1, chosen[:, None], True)


class Beams:
    """The N running and the N best ended texts of each of B rows."""

    def __init__(self, rows: int, config: GenerationConfig, device: torch.device) -> None:
        self.config, self.length = config, 0
        shape = (rows, config.num_beams)
        self.texts = torch.full((*shape, config.max_new_tokens), -1, device=device)
        self.scores = torch.full(shape, NEVER, device=device)
        self.scores[:, 0] = 0.0  # at first all beams of a row are equal, so only one counts
        self.ended_texts, self.ended_scores = self.texts.clone(), torch.full(shape, NEVER, device=device)
        self.open = torch.ones(rows, 1, dtype=torch.bool, device=device)
        """(B, 1) whether a running beam may still beat an ended text."""

    def grow(self, scores: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Extend the beams with the best tokens; `scores` (B * N, V) are log-probabilities.

        Returns:
            The row of the window that each beam continues, and its new token, both (B * N,).
        """
        rows, beams = self.scores.shape
        total = (self.scores[:, :, None] + scores.unflatten(0, (rows, beams))).flatten(1)  # (B, N * V)
        count = min(beams * max(2, 1 + len(ends)), total.shape[1])  # enough for N running beams even if every beam ends
        best, index = total.topk(count)
        source, token = index // scores.shape[1], index % scores.shape[1]
        texts = take_beams(self.texts, source)
        texts[:, :, self.length] = token
        self.length += 1
        last = self.length == self.config.max_new_tokens
        ending = torch.isin(token, ends) | last
        self._keep_ended(best, texts, ending)
        self.scores, kept = (best + NEVER * ending).topk(beams)
        self.texts = take_beams(texts, kept)
        worst = self.ended_scores.amin(dim=1, keepdim=True)
        self.open &= self.scores[:, :1] / self.length**self.config.length_penalty > worst
        self.open &= not last
        offset = torch.arange(rows, device=token.device)[:, None] * beams
        return (source.gather(1, kept) + offset).flatten(), token.gather(1, kept).flatten()

    def _keep_ended(self, best: Tensor, texts: Tensor, ending: Tensor) -> None:
        """Replace ended texts by better ones that end now, if these are among the N best candidates."""
        beams = self.config.num_beams
        counted = (ending & self.open)[:, :beams]
        score = (best[:, :beams] / self.length**self.config.length_penalty).masked_fill(~counted, NEVER)
        scores = torch.cat((self.ended_scores, score), dim=1)
        self.ended_scores, index = scores.topk(beams)
        self.ended_texts = take_beams(torch.cat((self.ended_texts, texts[:, :beams]), dim=1), index)

    def going(self) -> bool:
        """Whether a row is not done yet."""
        return bool(self.open.any())

    def results(self, end_ids: Sequence[int]) -> list[list[Beam]]:
        """The ended texts of each row, the best first."""
        pairs = zip(self.ended_texts.tolist(), self.ended_scores.tolist(), strict=True)
        return [[Beam(cut(t, [-1, *end_ids]), s) for t, s in zip(*row, strict=True) if s > NEVER] for row in pairs]


def take_beams(texts: Tensor, index: Tensor) -> Tensor:
    """Select beams: texts (B, M, L) at index (B, N) -> (B, N, L)."""
    return texts.gather(1, index[:, :, None].expand(-1, -1, texts.shape[2]))
