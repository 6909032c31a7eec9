"""Tokenizers: learnt here or loaded."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.files import load_checkpoint
from trunkline.names import check_regular, hub_access, looks_like_path
from trunkline.run_folders import find_checkpoint

# A forked process (a loader's worker) does not have the threads of the library and would wait for them for ever.
# Without this setting, the library prints a long warning about that in each worker.
if "TOKENIZERS_PARALLELISM" not in os.environ:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unk|>"
END_TOKENS = (END_OF_TEXT, "[SEP]", "</s>", "<eos>")
"""Names of the token that ends a document; the first one that a tokenizer has is used."""
DEFAULT_VOCAB_SIZE = 8192
LARGEST_TOKENIZER = 100_000_000
"""Bytes of a tokenizer.json; reading a larger one takes minutes, and the largest of well-known models has 35 MB."""
TRAINING_BYTES = 100_000_000
"""Bytes of text that BPE and WordPiece learn from, at most: more text changes little and takes memory."""


def end_of_text_id(tokenizer: Tokenizer, field: str = "data.tokenizer") -> int:
    """Id of the token that ends a document; `field` is the field that named the tokenizer, for the message.

    Raises:
        TrunklineError: if the vocabulary has none.
    """
    for token in END_TOKENS:
        number = tokenizer.token_to_id(token)
        if number is not None:
            return number
    raise TrunklineError(
        f"the tokenizer has no token that ends a document ({END_OF_TEXT}, [SEP], </s> or <eos>); add one to its "
        "tokenizer.json, or choose another tokenizer",
        field,
    )


def size_of(tokenizer: Tokenizer) -> int:
    """Rows that an embedding of the tokenizer's ids needs: the largest id + 1, because some vocabularies have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def embedding_rows(tokenizer: Tokenizer, vocab_size: int | None, name: str, field: str = "data.vocab_size") -> int:
    """Rows of the embedding of a tokenizer's ids: `vocab_size`, or if it is None the size of the tokenizer.

    Args:
        tokenizer: the tokenizer.
        vocab_size: as the recipe states it.
        name: name of the tokenizer, for messages.
        field: the field that holds `vocab_size`, for messages.

    Raises:
        TrunklineError: if the tokenizer has more tokens than `vocab_size`; names both numbers.
    """
    size = size_of(tokenizer)
    if vocab_size and vocab_size < size:
        raise TrunklineError(
            f"{field.rpartition('.')[2]}={vocab_size} is smaller than the {size} tokens of the tokenizer {name}; set "
            f"it to at least {size}, or to null",
            field,
        )
    return vocab_size or size


@dataclass(kw_only=True, eq=False, repr=False)
class Vocabulary:
    """Which tokenizer turns text into rows of tokens. A mixin of datamodules, placed before `TrunklineDataModule`."""

    tokenizer: str
    """`chars`, `bpe` (byte-level), `masked_bpe` (the same with `[MASK]` and other special tokens), `span_bpe` (the same
    with `<extra_id_0>` to `<extra_id_99>`) or `wordpiece`, learnt from at most 100 MB of the training texts; else a
    tokenizer.json, a training checkpoint (.ckpt) or a hub name."""
    vocab_size: int | None = None
    """Rows of the network's embedding; None uses the size of the tokenizer. A tokenizer that is learnt here, other than
    `chars`, gets at most this size (None: 8192). For a smaller tokenizer the embedding is padded to this size."""
    max_length: int
    """T, the number of tokens in a row, special tokens included."""

    @property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer itself, loaded or learnt at the first use."""
        raise NotImplementedError(f"{type(self).__name__} has no tokenizer")

    @cached_property
    def token_facts(self) -> DataFacts:
        """The tokenizer, and the sizes that follow from it.

        Raises:
            TrunklineError: if the tokenizer cannot be loaded or learnt, or has more tokens than `vocab_size`.
        """
        self.check_size()
        size = embedding_rows(self.vocabulary, self.vocab_size, self.tokenizer)
        return DataFacts(tokenizer=self.vocabulary, vocab_size=size, max_length=self.max_length)

    def check_size(self) -> None:
        """Check that the tokenizer has no more than `vocab_size` tokens.

        Raises:
            TrunklineError: if it has more; names both numbers.
        """
        embedding_rows(self.vocabulary, self.vocab_size, self.tokenizer)

    def tokenizer_origin(self) -> str:
        """Where the tokenizer comes from, for messages."""
        return f"tokenizer={self.tokenizer}"

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer as JSON, so that a checkpoint is enough to encode and decode text."""
        return {**super().state_dict(), "tokenizer": self.vocabulary.to_str()}  # type: ignore[misc]  # of a datamodule

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint has the same tokenizer.

        Raises:
            TrunklineError: if not, because then the ids mean other words.
        """
        if state_dict["tokenizer"] != self.vocabulary.to_str():
            raise TrunklineError(
                f"the checkpoint was trained with another tokenizer than {self.tokenizer_origin()}; give that "
                "checkpoint as tokenizer",
                field="data.tokenizer",
            )


def train_chars(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """One token for each character in the texts, in Unicode order; other characters become `<|unk|>`."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocab = {token: n for n, token in enumerate([END_OF_TEXT, UNKNOWN, *sorted(characters)])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=UNKNOWN, fuse_unk=False))  # no merges: tokens are characters
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return tokenizer


MASKING_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PADDING, SENTINELS = "<pad>", 100


def sentinel(number: int) -> str:
    """Name of a token that stands for a hidden span of text, as in T5."""
    return f"<extra_id_{number}>"


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str | AddedToken] = (END_OF_TEXT,)) -> Tokenizer:
    """Byte-level BPE as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_bytes(texts), trainer)
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """WordPiece of lower-case text, as in BERT; the same texts always give the same tokenizer.

    The library alone breaks ties by chance: it chooses among equally frequent characters, and numbers the tokens of
    characters inside words (`##`) in the order of a hash map, then among equally frequent pairs it joins those with the
    lowest numbers first. So both are settled here: a first training without any joint finds the characters that stand
    inside words, the second gets them as special tokens, whose numbers are given.
    """
    pieces = [
        text.encode() for text in first_bytes(texts)
    ]  # read three times; as bytes, because that takes less memory
    # Each character is two tokens: at the beginning of a word, and inside a word (with ##).
    limit = min(1000, (vocab_size - len(MASKING_TOKENS)) // 2)
    characters = Counter[str]()
    for piece in pieces:
        characters.update(empty_wordpiece().normalizer.normalize_str(piece.decode()))
    del characters[" "]
    alphabet = sorted(characters, key=lambda character: (-characters[character], character))[:limit]

    def learn(size: int, first: list[str]) -> list[str]:
        tokenizer = empty_wordpiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=first,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(bytes.decode, pieces), trainer)
        vocab = tokenizer.get_vocab()
        return sorted(vocab, key=vocab.__getitem__)

    inside = sorted(set(learn(1, MASKING_TOKENS)) - {*MASKING_TOKENS, *alphabet})
    tokenizer = empty_wordpiece(learn(vocab_size, MASKING_TOKENS + inside))
    tokenizer.add_special_tokens(MASKING_TOKENS)
    return tokenizer


def empty_wordpiece(tokens: Sequence[str] = ("[UNK]",)) -> Tokenizer:
    """A WordPiece tokenizer of lower-case text with these tokens, but no special ones."""
    tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return tokenizer


TRAINED: dict[str, Callable[[Iterable[str], int], Tokenizer]] = {
    "chars": train_chars,
    "bpe": train_bpe,
    # A mask or sentinel includes the space before it, because the tokens that it hides do.
    "masked_bpe": partial(
        train_bpe, special=[*MASKING_TOKENS[:-1], AddedToken(MASKING_TOKENS[-1], lstrip=True, special=True)]
    ),
    "span_bpe": partial(
        train_bpe,
        special=[PADDING, END_OF_TEXT, *(AddedToken(sentinel(n), lstrip=True, special=True) for n in range(SENTINELS))],
    ),
    "wordpiece": train_wordpiece,
}
SMALLEST = {"chars": 0, "bpe": 257, "masked_bpe": 261, "span_bpe": 258 + SENTINELS, "wordpiece": 64}


def first_bytes(texts: Iterable[str]) -> Iterator[str]:
    """The texts up to about `TRAINING_BYTES`."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= TRAINING_BYTES:
            return


def train_tokenizer(name: str, texts: Iterable[str], vocab_size: int | None, special: Sequence[str] = ()) -> Tokenizer:
    """Learn a tokenizer from text.

    Args:
        name: chars, bpe, masked_bpe, span_bpe or wordpiece.
        texts: the texts of the training split.
        vocab_size: maximum number of tokens, except for chars; None is 8192.
        special: special tokens to add; they get the last ids, and count towards `vocab_size`.

    Raises:
        TrunklineError: if `vocab_size` is too small.
    """
    check_vocab_size(name, vocab_size, len(special))
    tokenizer = TRAINED[name](texts, (vocab_size or DEFAULT_VOCAB_SIZE) - len(special))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def check_vocab_size(name: str, vocab_size: int | None, special: int = 0, field: str = "data.vocab_size") -> None:
    """Check that a vocabulary has room for the tokens that every tokenizer of this kind has.

    Args:
        name: as in `train_tokenizer`, or the name of a tokenizer that is loaded.
        vocab_size: as the recipe states it.
        special: number of special tokens that will be added to a tokenizer that is learnt.
        field: the field that holds `vocab_size`, for the message.

    Raises:
        TrunklineError: if not.
    """
    smallest = SMALLEST[name] + special if name in SMALLEST else 1
    if vocab_size is not None and vocab_size < smallest:
        raise TrunklineError(
            f"{field.rpartition('.')[2]}={vocab_size} is too small for {name}; set it to at least {smallest}", field
        )


def check_room(max_length: int, smallest: int = 5, field: str = "data.max_length") -> None:
    """Check that a row has room for text beside the special tokens; `field` is the field that holds `max_length`.

    Raises:
        TrunklineError: if not.
    """
    if max_length < smallest:
        raise TrunklineError(
            f"{field.rpartition('.')[2]}={max_length} leaves no room for text beside the special tokens", field
        )


def load_tokenizer(name: str, field: str = "data.tokenizer") -> Tokenizer:
    """Load a tokenizer from a file or from the hub.

    Args:
        name: a `tokenizer.json`, a folder that holds one, a training checkpoint (.ckpt), a run's folder, or a hub name.
        field: the field that gave the name, for messages.

    Raises:
        TrunklineError: if the tokenizer cannot be found or read.
    """
    given = field.rpartition(".")[2]
    path = find_checkpoint(name, field, other="tokenizer.json")
    if path.is_dir():
        path /= "tokenizer.json"
    check_regular(path, field)
    if not path.exists() and (looks_like_path(name) or path.name == "tokenizer.json"):
        raise TrunklineError(f"{given}={name}: there is no file {path}; fix the path", field)
    if path.suffix != ".ckpt" and path.exists() and path.stat().st_size > LARGEST_TOKENIZER:
        raise TrunklineError(
            f"{given}={name} has {path.stat().st_size / 1e6:,.0f} MB, but even a tokenizer of a million tokens has "
            f"less than {LARGEST_TOKENIZER / 1e6:.0f} MB; give another file",
            field,
        )
    try:
        if path.suffix == ".ckpt":
            content = load_checkpoint(path, mmap=True, field=field)
            text = tokenizer_of_checkpoint(content, given) or tokenizer_of_checkpoint(content)
            if text is None:
                raise TrunklineError(
                    f"{given}={name}: this checkpoint has no tokenizer; give one of a run on text", field
                )
            tokenizer = Tokenizer.from_str(text)
        else:
            tokenizer = Tokenizer.from_file(str(path)) if path.exists() else tokenizer_of_hub(name)
    except TrunklineError:
        raise
    except Exception as error:  # the library raises bare `Exception`s
        missing = "" if path.exists() else "there is no such file here, and as a hub name: "
        offers = [*TRAINED, ""] if field.startswith("data.") else []
        raise TrunklineError(
            f"cannot read {given}={name}: {missing}{' '.join(str(error).split())}; give {', '.join(offers)}the path "
            "of a tokenizer.json, or the name of a hub model that has one",
            field,
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_of_hub(name: str) -> Tokenizer:
    """The tokenizer of a hub model; raises what the libraries raise."""
    with hub_access():
        return Tokenizer.from_pretrained(name)


def tokenizer_of_checkpoint(content: Any, role: str = "tokenizer") -> str | None:
    """A tokenizer of a training checkpoint, as JSON, from the state of its datamodule; None if it has none.

    Args:
        content: content of the checkpoint.
        role: `tokenizer`, or `target_tokenizer` for that of the targets, if they have another one.
    """
    for state in content.values() if isinstance(content, dict) else ():
        if isinstance(state, dict) and isinstance(state.get(role), str):
            return state[role]
    return None
