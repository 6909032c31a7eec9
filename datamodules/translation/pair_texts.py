"""Pairs of texts as a stream of documents, which is tokenised once."""

from collections.abc import Iterator

from trunkline.datamodules.splits import split_of
from trunkline.datamodules.text.text_sources import Piece
from trunkline.datamodules.translation.text_pairs import PairSource, check_language, language_token


class PairTexts:
    """A `TextSource` of pairs. Each text is a document: source and target in turn, or one side alone.

    Args:
        pairs: the pairs.
        sides: which of `source` and `target`.
        prefix: text before every source.
        languages: target languages; if given, a source begins with the token of its target's language.
    """

    def __init__(self, pairs: PairSource, sides: list[str], prefix: str, languages: list[str] | None) -> None:
        self.pairs, self.sides, self.prefix, self.languages = pairs, sides, prefix, languages
        self.files = pairs.files
        self.key = ["pairs", pairs.key, sides, prefix, languages]

    def pieces(self, shares: dict[str, float]) -> Iterator[Piece]:
        """All texts once, in order; the number of a row decides the split of its texts.

        Raises:
            TrunklineError: naming the file and row at fault, or a language that is not among `languages`.
        """
        for pair in self.pairs.pairs():
            check_language(pair, self.languages)
            split = split_of(pair.number, shares)
            if "source" in self.sides:
                token = None if self.languages is None or pair.language is None else language_token(pair.language)
                yield Piece(split, self.prefix + pair.source, True, token)
            if "target" in self.sides:
                yield Piece(split, pair.target, True)
