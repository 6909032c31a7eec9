"""Prefix beam search over the outputs of CTC (arXiv:1408.2873), alone or with a language model (shallow fusion).

Needs only torch. Shape legend: B clips, T states of a clip, V tokens, N beams. The blank is the last output, id V.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.generation.ctc import ctc_greedy
from trunkline.modules.generation.decoding import Decoder, evaluating

CPU = torch.device("cpu")


@dataclass
class CTCDecoding:
    """How the outputs of CTC become texts.

    Raises:
        TrunklineError: for a value out of range.
    """

    num_beams: int = 1
    """1 takes the likeliest path (greedy). Above 1: this many texts are followed in parallel, each with all its
    paths."""
    lm_weight: float = 0.5
    """Factor of the language model's log-probability, if there is one."""
    length_bonus: float = 0.0
    """Added to the score for each token; above 0 makes up for a language model's liking for short texts."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise TrunklineError(f"num_beams must be at least 1, not {self.num_beams}; 1 is greedy")
        if self.lm_weight < 0:
            raise TrunklineError(f"lm_weight must be at least 0, not {self.lm_weight}; 0 ignores the language model")


@dataclass
class LanguageModel:
    """A language model over the recogniser's tokens."""

    decoder: Decoder
    """Such as a `GPT`; its first V tokens are those of the recogniser."""
    start: int
    """Token that it reads before a text."""
    end: int | None = None
    """Token that ends a text, whose probability is part of the text's; None leaves it out."""
    device: torch.device = CPU
    """Where the decoder computes."""

    @torch.no_grad()
    def log_probs(self, texts: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the next token after each text, (number of texts, tokens) float64 on the CPU.

        Of a text that is longer than the decoder can see, the newest tokens count.
        """
        seen = [[self.start, *text][-self.decoder.max_length :] for text in texts]
        width = max(map(len, seen))
        padded = [[self.start] * (width - len(row)) + row for row in seen]
        real = torch.arange(width) >= torch.tensor([[width - len(row)] for row in seen])
        mask = None if bool(real.all()) else real.to(self.device)
        with evaluating(self.decoder):
            logits, _ = self.decoder.prefill(torch.tensor(padded, device=self.device), mask, room=0)
        return logits.cpu().double().log_softmax(dim=1)


class CTCBeam(NamedTuple):
    """One text that prefix beam search found."""

    tokens: list[int]
    score: float
    """log_prob + lm_weight * log-probability of the language model + length_bonus * number of tokens."""
    log_prob: float
    """Log-probability of CTC: of all paths that read as this text and were followed."""


@torch.inference_mode()
def ctc_beams(
    log_probs: Tensor, lengths: Tensor, config: CTCDecoding, language_model: LanguageModel | None = None
) -> list[list[CTCBeam]]:
    """The N best texts of each clip, the best first.

    Args:
        log_probs: (B, T, V + 1).
        lengths: (B,) number of states of each clip.
        config: options; `num_beams` is N.
        language_model: also scores the texts, as they grow.

    Raises:
        TrunklineError: if the language model has fewer tokens than V.
    """
    vocabulary = log_probs.shape[2] - 1
    if language_model is not None and language_model.decoder.vocab_size < vocabulary:
        raise TrunklineError(
            f"the language model knows {language_model.decoder.vocab_size} tokens, but the recogniser writes "
            f"{vocabulary}; train it with the recogniser's tokenizer"
        )
    given = log_probs.double().cpu()
    silent = torch.arange(given.shape[1]) >= lengths.cpu()[:, None]  # after its end a clip is certainly blank
    given = given.masked_fill(silent[:, :, None], -torch.inf)
    given[:, :, vocabulary] = given[:, :, vocabulary].masked_fill(silent, 0.0)
    search = PrefixSearch(len(given), vocabulary, config, language_model)
    for scores in given.unbind(dim=1):
        search.advance(scores)
    return search.results()


def ctc_texts(
    log_probs: Tensor, lengths: Tensor, config: CTCDecoding, language_model: LanguageModel | None = None
) -> list[list[int]]:
    """The tokens of the best text of each clip; arguments as for `ctc_beams`.

    Raises:
        TrunklineError: as `ctc_beams`, and for a language model without beams.
    """
    if config.num_beams > 1:
        return [beams[0].tokens for beams in ctc_beams(log_probs, lengths, config, language_model)]
    if language_model is not None:
        raise TrunklineError("a language model helps to choose among beams; set num_beams above 1, such as 10")
    return ctc_greedy(log_probs, lengths)


class Prefixes:
    """All texts that a search has followed, as a tree: each node is a token after another node."""

    ROOT, DEAD, NONE = 0, -1, -2
    """The empty text; a beam without a text; what the parent of both is."""

    def __init__(self) -> None:
        self.parents, self.tokens = [self.NONE], [0]
        self.children: dict[tuple[int, int], int] = {}

    def child(self, node: int, token: int) -> int:
        """The node of a text with one more token; there is only one, whichever way leads to it."""
        found = self.children.setdefault((node, token), len(self.parents))
        if found == len(self.parents):
            self.parents.append(node)
            self.tokens.append(token)
        return found

    def text(self, node: int) -> list[int]:
        """All tokens up to a node."""
        tokens = []
        while node > self.ROOT:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]


class PrefixSearch:
    """The N best texts of each clip after the states so far; all tensors are float64 on the CPU.

    A text is followed by the sum of the paths that read as it: those that end in a blank, and those that end in its
    last token, which only a blank lets be said again.
    """

    def __init__(self, clips: int, vocabulary: int, config: CTCDecoding, language_model: LanguageModel | None) -> None:
        self.config, self.language_model, self.prefixes = config, language_model, Prefixes()
        shape = (clips, config.num_beams)
        self.blank = torch.full(shape, -torch.inf, dtype=torch.float64)
        """(B, N) log-probability of the paths that end in a blank."""
        self.blank[:, 0] = 0.0
        self.named = torch.full_like(self.blank, -torch.inf)
        """(B, N) log-probability of the paths that end in the text's last token."""
        self.fused = torch.zeros_like(self.blank)
        """(B, N) what the score has besides."""
        self.nodes = torch.full(shape, Prefixes.DEAD)
        self.nodes[:, 0] = Prefixes.ROOT
        self.parents, self.last = torch.full(shape, Prefixes.NONE), torch.zeros(shape, dtype=torch.long)
        """(B, N) node before each node, and last token."""
        self.gains = torch.full((*shape, vocabulary), config.length_bonus, dtype=torch.float64)
        """(B, N, V) what the score gains besides, if a token comes next."""
        if language_model is not None:
            self.gains += config.lm_weight * language_model.log_probs([[]])[0, :vocabulary]

    def advance(self, scores: Tensor) -> None:
        """Follow the texts through one more state, with log-probabilities (B, V + 1)."""
        beams, vocabulary = self.config.num_beams, self.gains.shape[2]
        total = torch.logaddexp(self.blank, self.named)
        blank = total + scores[:, -1:]
        named = self.named + scores.gather(1, self.last)
        before = total[:, :, None].repeat(1, 1, vocabulary).scatter_(2, self.last[:, :, None], self.blank[:, :, None])
        longer = before + scores[:, None, :-1]  # (B, N, V) the text of each beam, with one more token
        self.join(named, longer)
        kept = torch.logaddexp(blank, named)
        ranks = torch.cat((kept + self.fused, (longer + self.fused[:, :, None] + self.gains).flatten(1)), dim=1)
        best, index = ranks.topk(beams)
        grown, source = index >= beams, torch.where(index < beams, index, (index - beams) // vocabulary)
        token = torch.where(grown, (index - beams) % vocabulary, self.last.gather(1, source))
        self.blank = blank.gather(1, source).masked_fill(grown, -torch.inf)
        extended = longer.flatten(1).gather(1, (index - beams).clamp(min=0))
        self.named = torch.where(grown, extended, named.gather(1, source))
        gained = self.gains.flatten(1).gather(1, (index - beams).clamp(min=0))
        self.fused = self.fused.gather(1, source) + gained * grown
        self.last = token
        self.rename(source, grown, best > -torch.inf)

    def join(self, named: Tensor, longer: Tensor) -> None:
        """Where a beam with one more token is the text of another beam, add its paths to that one; in place."""
        clip, beam, parent = (self.parents[:, :, None] == self.nodes[:, None, :]).nonzero(as_tuple=True)
        token = self.last[clip, beam]
        named[clip, beam] = torch.logaddexp(named[clip, beam], longer[clip, parent, token])
        longer[clip, parent, token] = -torch.inf

    def rename(self, source: Tensor, grown: Tensor, alive: Tensor) -> None:
        """Find the nodes of the new beams, and ask the language model about those that have grown (all (B, N))."""
        nodes = self.nodes.gather(1, source)
        parents = torch.where(grown, nodes, self.parents.gather(1, source))
        self.parents, nodes = parents.masked_fill(~alive, Prefixes.NONE), nodes.masked_fill(~alive, Prefixes.DEAD)
        growing = (grown & alive).nonzero()
        for (clip, beam), token in zip(growing.tolist(), self.last[grown & alive].tolist(), strict=True):
            nodes[clip, beam] = self.prefixes.child(int(nodes[clip, beam]), token)
        self.nodes = nodes
        if self.language_model is not None:
            self.gains = self.gains.gather(1, source[:, :, None].expand_as(self.gains))
            if len(growing):
                texts = [self.prefixes.text(node) for node in nodes[grown & alive].tolist()]
                log_probs = self.language_model.log_probs(texts)[:, : self.gains.shape[2]]
                self.gains[grown & alive] = self.config.length_bonus + self.config.lm_weight * log_probs

    def results(self) -> list[list[CTCBeam]]:
        """The texts of each clip, the best first."""
        found = torch.logaddexp(self.blank, self.named)
        score, alive = found + self.fused, self.nodes != Prefixes.DEAD
        texts = [self.prefixes.text(node) for node in self.nodes[alive].tolist()]
        if self.language_model is not None and self.language_model.end is not None:
            score[alive] += self.config.lm_weight * self.language_model.log_probs(texts)[:, self.language_model.end]
        beams = iter(zip(texts, score[alive].tolist(), found[alive].tolist(), strict=True))
        rows = [[CTCBeam(*next(beams)) for _ in range(count)] for count in alive.sum(dim=1).tolist()]
        return [sorted(row, key=lambda beam: -beam.score) for row in rows]
