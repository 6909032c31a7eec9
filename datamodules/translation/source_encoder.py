"""Turns source texts into tokens for a trained encoder-decoder, as its training data did."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tokenizers import Tokenizer

from trunkline import TrunklineError
from trunkline.datamodules.text_encoder import TextEncoder
from trunkline.datamodules.tokenizers import check_room, end_of_text_id
from trunkline.datamodules.translation.text_pairs import language_token


class SourceEncoder:
    """Encodes sources as the rows of `TranslationData`: language token, prefix and text, end token.

    Args:
        tokenizer: the tokenizer of the sources.
        prefix: text before every source.
        languages: target languages that the model knows, each with a token `<2de>`; None if it is told none.
        max_length: largest number of tokens in a source, special tokens included.
        too_long: what happens to a longer source: `cut` takes the end of its text off, `refuse` is an error.

    Raises:
        TrunklineError: if the tokenizer has no token that ends a text or none for a language, or if `max_length` leaves
            no room for text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prefix: str = "",
        languages: Sequence[str] | None = None,
        max_length: int,
        too_long: Literal["cut", "refuse"] = "cut",
    ) -> None:
        check_room(max_length, smallest=3 if languages else 2)  # a language, a token of text, the end
        self.tokenizer, self.prefix, self.max_length, self.too_long = tokenizer, prefix, max_length, too_long
        self.end, self.languages = end_of_text_id(tokenizer), None if languages is None else list(languages)
        self.language_ids: dict[str, int] = {}
        for language in languages or ():
            token = tokenizer.token_to_id(language_token(language))
            if token is None:
                raise TrunklineError(
                    f"the tokenizer has no token {language_token(language)} for the target language '{language}'; add "
                    "it as a special token, or let one be learnt",
                    field="data.tokenizer",
                )
            self.language_ids[language] = token
        self.cut = 0
        """Number of texts so far that were too long and lost their ends."""
        self._encoder = TextEncoder(tokenizer)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], too_long: Literal["cut", "refuse"] = "cut") -> "SourceEncoder":
        """The encoder of a trained model.

        Args:
            state: what `TranslationData` keeps in a checkpoint.
            too_long: as in the class.
        """
        settings = {name: state["settings"][name] for name in ("prefix", "languages", "max_length")}
        return cls(Tokenizer.from_str(state["tokenizer"]), **settings, too_long=too_long)

    def encode(
        self, texts: Sequence[str], language: str | None = None, names: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Token ids of each text.

        Args:
            texts: source texts, without the prefix.
            language: the target language, if the model knows several.
            names: what messages call each text; None is `text 1` and so on.

        Raises:
            TrunklineError: if a text is empty or, unless it is cut, too long; names it. If the language is unknown,
                missing, or given to a model that is told none.
        """
        first = self.language_id(language)
        names = names or [f"text {number}" for number in range(1, len(texts) + 1)]
        for name, text in zip(names, texts, strict=True):
            if not text.strip():
                raise TrunklineError(f"{name} is empty; give a text, or leave it out")
        ids, counts = self._encoder.encode([self.prefix + text for text in texts])
        flat, stop, rows = ids.tolist(), 0, []
        room = self.max_length - len(first) - 1
        for name, count in zip(names, counts.tolist(), strict=True):
            start, stop = stop, stop + count
            if count > room:
                if self.too_long != "cut":
                    raise TrunklineError(
                        f"{name} has {count + len(first) + 1} tokens, but the model reads at most "
                        f"{self.max_length}; shorten it, or set too_long=cut",
                        field="too_long",
                    )
                self.cut += 1
            rows.append([*first, *flat[start : min(stop, start + room)], self.end])
        return rows

    def language_id(self, language: str | None) -> list[int]:
        """The id of a language's token; empty if the model is told no language.

        Raises:
            TrunklineError: as in `encode`.
        """
        if self.languages is None:
            if language is not None:
                raise TrunklineError(
                    f"language={language}, but the model was trained without target languages; leave it out",
                    field="language",
                )
            return []
        known = ", ".join(self.languages)
        if language is None:
            raise TrunklineError(f"the model has several target languages; name one with language: {known}", "language")
        if language not in self.language_ids:
            raise TrunklineError(
                f"language={language}: the model was not trained on it; choose among {known}", field="language"
            )
        return [self.language_ids[language]]
