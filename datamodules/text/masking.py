"""Which tokens a masked language model must predict, and what replaces them in its input."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from trunkline import TrunklineError

NAMES = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>"), "pad": ("[PAD]", "<pad>")}


@dataclass
class MaskingConfig:
    """How tokens are masked (BERT, arXiv:1810.04805).

    Raises:
        TrunklineError: if a share or `mean_span` is out of range.
    """

    probability: float = 0.15
    """Share of a row's tokens that the model must predict."""
    unit: Literal["tokens", "words", "spans"] = "tokens"
    """What is chosen: single tokens, whole words, or spans of tokens with a geometric distribution of lengths
    (arXiv:1907.10529)."""
    masked: float = 0.8
    """Share of the chosen tokens that become `[MASK]`."""
    replaced: float = 0.1
    """Share of the chosen tokens that become a random token; the rest stay as they are."""
    mean_span: float = 3.8
    """Mean length of spans, in tokens, before spans longer than 10 are shortened to 10."""

    def __post_init__(self) -> None:
        if not (0 < self.probability < 1 and self.masked >= 0 and self.replaced >= 0):
            raise TrunklineError(
                f"masking.probability={self.probability} must lie between 0 and 1, "
                f"masked={self.masked} and replaced={self.replaced} must be 0 or more"
            )
        if self.masked + self.replaced > 1 or self.mean_span < 1:
            raise TrunklineError(
                "masking.masked and masking.replaced are shares of a whole, and mean_span is 1 or more"
            )


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that begin (`cls`), end (`sep`), mask (`mask`) and pad (`pad`) a row.

    Raises:
        TrunklineError: if the tokenizer lacks one; names it.
    """
    ids = {}
    for role, names in NAMES.items():
        known = [number for name in names if (number := tokenizer.token_to_id(name)) is not None]
        if not known:
            raise TrunklineError(
                f"the tokenizer has no {' or '.join(names)} token, which masked language modelling needs; set "
                "tokenizer=wordpiece, masked_bpe or another one that has it",
                field="data.tokenizer",
            )
        ids[role] = known[0]
    return ids


def masked_sentence(tokenizer: Tokenizer, text: str, limit: int, where: str) -> tuple[list[int], int]:
    """Encode a sentence with a mask as input of a masked language model.

    Args:
        tokenizer: the tokenizer of the model.
        text: the sentence; it must contain the mask token.
        limit: maximum number of tokens that the model can see.
        where: where the sentence comes from, for messages.

    Returns:
        the ids, with the tokens that begin and end a row, and the id of the mask token.

    Raises:
        TrunklineError: if the sentence has no mask or is too long.
    """
    special = special_ids(tokenizer)
    ids = [special["cls"], *tokenizer.encode(text, add_special_tokens=False).ids, special["sep"]]
    if special["mask"] not in ids:
        mask = tokenizer.id_to_token(special["mask"])
        raise TrunklineError(f"{where} {text!r} has no {mask}; write it where the model must predict a word")
    if len(ids) > limit:
        raise TrunklineError(f"{where} {text!r} has {len(ids)} tokens, but the network can see {limit}; shorten it")
    return ids, special["mask"]


class Masker:
    """Chooses and hides tokens; all randomness comes from the generator in each call.

    Args:
        config: which tokens to hide, and how.
        tokenizer: its vocabulary tells which tokens are special, and where words begin.
    """

    def __init__(self, config: MaskingConfig, tokenizer: Tokenizer) -> None:
        self.config, self.special = config, special_ids(tokenizer)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocab.values()) + 1
        names = [""] * size
        for name, number in vocab.items():
            names[number] = name
        ordinary = np.array([bool(name) and not re.fullmatch(r"\[[A-Z]+\d*\]|<.+>", name) for name in names])
        self.ordinary = ordinary.nonzero()[0]
        """(V',) ids that can replace a token."""
        self.may_hide = ordinary
        self.may_hide[self.special["mask"]] = False
        self.continues = continuations(names)
        """(V,) whether a token continues the word of the token before it."""

    def most(self, tokens: int) -> int:
        """Number of tokens to hide, at least one, if `tokens` may be hidden."""
        return max(1, round(self.config.probability * tokens))

    def choose(self, tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Positions (n,) of the tokens to hide in a row (T,), ascending; special tokens are never hidden."""
        free = self.may_hide[tokens].nonzero()[0]
        if not len(free):
            return free
        count = self.most(len(free))
        if self.config.unit == "tokens":
            return np.sort(generator.permutation(free)[:count])
        if self.config.unit == "spans":
            return self._spans(free, count, generator)
        starts = ~self.continues[tokens[free]]
        starts[0] = True
        words = starts.cumsum() - 1
        sizes = np.bincount(words)
        order = generator.permutation(len(sizes))
        running = sizes[order].cumsum()
        chosen = order[running <= count]
        if not len(chosen):  # the first word alone is too long: hide its first tokens
            return free[words == order[0]][:count]
        return free[np.isin(words, chosen)]

    def _spans(self, free: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        hidden = np.zeros(len(free), bool)
        while (left := count - int(hidden.sum())) > 0:
            length = min(int(generator.geometric(1 / self.config.mean_span)), 10, left)
            start = int(generator.integers(len(free)))
            hidden[start : start + length] = True
        return free[hidden]

    def hide(self, tokens: np.ndarray, positions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A copy of a row (T,) in which each token at `positions` becomes `[MASK]` or a random token, or stays."""
        draw = generator.random(len(positions))
        hidden = tokens.copy()
        hidden[positions[draw < self.config.masked]] = self.special["mask"]
        other = positions[(draw >= self.config.masked) & (draw < self.config.masked + self.config.replaced)]
        hidden[other] = generator.choice(self.ordinary, len(other))
        return hidden


def continuations(names: list[str]) -> np.ndarray:
    """(V,) whether each token continues a word: it begins with `##`, or lacks the sign for a space that others have."""
    if any(name.startswith("##") for name in names):
        return np.array([name.startswith("##") for name in names])
    if any(name.startswith(("Ġ", "▁")) for name in names):  # byte-level BPE, SentencePiece
        spaces = ("Ġ", "Ċ", "ĉ", "▁")  # space, newline and tab, which are letters to a regular expression
        return np.array([not name.startswith(spaces) and bool(re.match(r"\w", name)) for name in names])
    return np.zeros(len(names), bool)
