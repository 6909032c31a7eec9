"""Which tokens a masked language model has to name, and what stands in their place."""

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
        TrunklineError: for shares that are none.
    """

    probability: float = 0.15
    """Share of a row's tokens that are to be predicted."""
    unit: Literal["tokens", "words", "spans"] = "tokens"
    """Single tokens, whole words, or spans of tokens of geometrically distributed length (arXiv:1907.10529)."""
    masked: float = 0.8
    """Share of these that become `[MASK]`."""
    replaced: float = 0.1
    """Share of these that become another token; the rest stay as they are."""
    mean_span: float = 3.8
    """Mean length of spans, of which none is longer than 10; the paper's."""

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
    """Ids of the tokens that begin, end, mask and pad a row: `cls`, `sep`, `mask`, `pad`.

    Raises:
        TrunklineError: if the tokenizer lacks one; names it.
    """
    found = {}
    for role, names in NAMES.items():
        known = [number for name in names if (number := tokenizer.token_to_id(name)) is not None]
        if not known:
            raise TrunklineError(
                f"the tokenizer has no {' or '.join(names)} token, which masked language modelling needs; set "
                "tokenizer=wordpiece, masked_bpe or another one that has it",
                field="data.tokenizer",
            )
        found[role] = known[0]
    return found


def masked_sentence(tokenizer: Tokenizer, text: str, limit: int, where: str) -> tuple[list[int], int]:
    """Ids of a text as a masked language model sees it, with the tokens that begin and end a row; and that of the mask.

    Args:
        tokenizer: of the model.
        text: with a mask in it.
        limit: tokens that the model sees at most.
        where: the text is from, for messages.

    Raises:
        TrunklineError: if there is no mask, or it is too long.
    """
    special = special_ids(tokenizer)
    ids = [special["cls"], *tokenizer.encode(text, add_special_tokens=False).ids, special["sep"]]
    if special["mask"] not in ids:
        mask = tokenizer.id_to_token(special["mask"])
        raise TrunklineError(f"{where} {text!r} has no {mask}; write it where a word is to be found")
    if len(ids) > limit:
        raise TrunklineError(f"{where} {text!r} has {len(ids)} tokens, but the network can see {limit}; cut it")
    return ids, special["mask"]


class Masker:
    """Chooses and hides tokens; what it draws comes from the given generator alone.

    Args:
        config: how.
        tokenizer: for the special tokens, and the words that are hidden whole.
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
        """(V',) ids that a token may be replaced by."""
        self.may_hide = ordinary
        self.may_hide[self.special["mask"]] = False
        self.continues = continuations(names)
        """(V,) whether a token goes on with the word before it."""

    def most(self, tokens: int) -> int:
        """Number of tokens to hide among `tokens` that may be hidden: at least one."""
        return max(1, round(self.config.probability * tokens))

    def choose(self, tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Positions (n,) to hide, ascending, of a row (T,); special tokens are never among them."""
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
        taken = order[running <= count]
        if not len(taken):  # one long word
            return free[words == order[0]][:count]
        return free[np.isin(words, taken)]

    def _spans(self, free: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        hidden = np.zeros(len(free), bool)
        while (left := count - int(hidden.sum())) > 0:
            length = min(int(generator.geometric(1 / self.config.mean_span)), 10, left)
            start = int(generator.integers(len(free)))
            hidden[start : start + length] = True
        return free[hidden]

    def hide(self, tokens: np.ndarray, positions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A copy of (T,) with `[MASK]` or another token at most of these positions."""
        draw = generator.random(len(positions))
        hidden = tokens.copy()
        hidden[positions[draw < self.config.masked]] = self.special["mask"]
        other = positions[(draw >= self.config.masked) & (draw < self.config.masked + self.config.replaced)]
        hidden[other] = generator.choice(self.ordinary, len(other))
        return hidden


def continuations(names: list[str]) -> np.ndarray:
    """(V,) whether each token goes on with a word: `##` of WordPiece, or no mark of a space where others have one."""
    if any(name.startswith("##") for name in names):
        return np.array([name.startswith("##") for name in names])
    if any(name.startswith(("Ġ", "▁")) for name in names):  # byte-level BPE, SentencePiece
        spaces = ("Ġ", "Ċ", "ĉ", "▁")  # space, newline and tab, which are letters to a regular expression
        return np.array([not name.startswith(spaces) and bool(re.match(r"\w", name)) for name in names])
    return np.zeros(len(names), bool)
