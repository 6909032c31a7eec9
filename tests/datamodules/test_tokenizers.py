"""Tokenizers that are trained or read, and the fast way through much text against the library's own."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trunkline import TrunklineError
from trunkline.datamodules import text_encoder
from trunkline.datamodules import tokenizers as ours
from trunkline.datamodules.text.text_sources import open_text
from trunkline.datamodules.text_encoder import TextEncoder, treats_words_alone
from trunkline.datamodules.tokenizers import (
    END_OF_TEXT,
    MASKING_TOKENS,
    UNKNOWN,
    end_of_text_id,
    load_tokenizer,
    size_of,
    train_tokenizer,
    train_wordpiece,
)
from trunkline.files import digest
from trunkline.modules.training.checkpoints import SafeCheckpointIO

TEXT = "".join(piece.text for piece in open_text("pydoc", "text").pieces({"train": 1.0}))[:100_000]
ODD = (
    "\ufeff a  b\n\n\n   c\t\td\u00a0 e \u2003 f! !\r\n\x1c!\x1c g 's it's\x85 日本 語\u3000 e\u0301 🙂 "
    "<|endoftext|> [SEP]\x00 "
)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {name: train_tokenizer(name, iter([TEXT]), 600) for name in ("chars", "bpe", "wordpiece")}


@pytest.mark.parametrize("name", ["chars", "bpe"])
def test_decoding_gives_the_text_back(name: str, trained: dict[str, Tokenizer]) -> None:
    texts = [TEXT, "  two  spaces\n\n", " x"] + ([ODD] if name == "bpe" else [])
    for text in texts:
        ids = TextEncoder(trained[name]).encode([text])[0]
        assert trained[name].decode(ids.tolist(), skip_special_tokens=False) == text


def test_chars_has_each_character_of_the_text_in_order(trained: dict[str, Tokenizer]) -> None:
    vocab = trained["chars"].get_vocab()
    assert sorted(vocab, key=vocab.__getitem__) == [END_OF_TEXT, UNKNOWN, *sorted(set(TEXT))]
    assert trained["chars"].encode("a\u20acb").ids == [vocab["a"], vocab[UNKNOWN], vocab["b"]]
    assert trained["chars"].encode("\u20ac\u20ac").ids == [1, 1]


def test_trained_sizes_and_special_tokens(trained: dict[str, Tokenizer]) -> None:
    assert size_of(trained["bpe"]) == size_of(trained["wordpiece"]) == 600
    assert end_of_text_id(trained["bpe"]) == end_of_text_id(trained["chars"]) == 0
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [trained["wordpiece"].id_to_token(n) for n in range(5)] == specials
    assert end_of_text_id(trained["wordpiece"]) == 3
    assert trained["wordpiece"].encode("THE words").tokens == trained["wordpiece"].encode("the  Words").tokens
    assert trained["wordpiece"].decode(trained["wordpiece"].encode("The statement").ids) == "the statement"


def learnt_slowly(text: str, size: int) -> list[str]:
    """The tokens of a WordPiece, joined by a plain loop: of the most frequent pairs, that with the lowest numbers."""
    words = Counter(text.split())
    letters = Counter(letter for word, count in words.items() for letter in word for _ in range(count))
    limit = min(1000, (size - 5) // 2)
    alphabet = sorted(letters, key=lambda letter: (-letters[letter], letter))[:limit]
    split = {
        word: [letter if n == 0 else f"##{letter}" for n, letter in enumerate(word) if letter in alphabet]
        for word in words
    }
    inside = sorted({token for tokens in split.values() for token in tokens if token.startswith("##")})
    tokens = [*MASKING_TOKENS, *inside, *sorted(alphabet)]
    while len(tokens) < size:
        pairs = Counter[tuple[str, str]]()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        first, second = min(pairs, key=lambda pair: (-pairs[pair], *map(tokens.index, pair)))
        joint = first + second.removeprefix("##")
        tokens += [] if joint in tokens else [joint]
        for word, parts in split.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == (first, second):
                    joined[-1] = joint
                else:
                    joined.append(part)
            split[word] = joined
    return tokens


def test_wordpiece_is_a_function_of_its_text() -> None:
    draw = random.Random(5)  # few words of few letters, so that nearly all frequencies are tied
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(1, 7))) for _ in range(60)]
    names = [piece.text for piece in open_text("emoji", "text").pieces({"train": 1.0})][:8000]  # in 8 scripts
    for texts, size in (([" ".join(words)], 90), ([" ".join(words)], 20), (names, 300)):
        learnt = [train_wordpiece(iter(order), size) for order in (texts, texts[::-1], texts, texts)]
        assert len({tokenizer.to_str() for tokenizer in learnt}) == 1
        vocab = learnt[0].get_vocab()
        if len(texts) == 1:
            assert sorted(vocab, key=vocab.__getitem__) == learnt_slowly(texts[0], size)
        assert learnt[0].get_added_tokens_decoder().keys() == set(range(5))


def test_training_reads_no_more_than_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "TRAINING_BYTES", 50)
    read = []

    def texts() -> object:
        for n in range(100):
            read.append(n)
            yield "twenty bytes of text"

    train_tokenizer("bpe", texts(), 300)  # type: ignore[arg-type]
    assert read == [0, 1, 2]
    read.clear()
    assert size_of(train_tokenizer("chars", (t + chr(600 + n) for n, t in enumerate(texts())), None)) > 110  # type: ignore[arg-type, var-annotated]


def test_an_error_of_the_source_comes_out_of_the_training() -> None:
    def texts() -> object:
        yield "a"
        raise TrunklineError("in.txt, byte 3: fix it")

    for name in ("bpe", "wordpiece", "chars"):
        with pytest.raises(TrunklineError, match=r"in\.txt, byte 3"):
            train_tokenizer(name, texts(), None)  # type: ignore[arg-type]


def test_too_small_vocabularies() -> None:
    with pytest.raises(TrunklineError, match=r"vocab_size=256 is too small for bpe; set it to at least 257"):
        train_tokenizer("bpe", [TEXT], 256)
    assert size_of(train_tokenizer("bpe", [TEXT], 257)) == 257
    assert size_of(train_tokenizer("wordpiece", ["".join(map(chr, range(0x4E00, 0x5000)))], 64)) <= 64


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(["</s>", "a"], 0), (["a", "<eos>"], 1), (["[SEP]", "</s>"], 0), (["</s>", END_OF_TEXT], 1)],
)
def test_end_of_text_is_the_best_there_is(tokens: list[str], expected: int) -> None:
    assert end_of_text_id(Tokenizer(models.WordLevel({t: n for n, t in enumerate(tokens)}))) == expected


def test_no_end_of_text() -> None:
    with pytest.raises(TrunklineError, match=r"no token that ends a document .* tokenizer"):
        end_of_text_id(Tokenizer(models.WordLevel({"a": 0})))


def test_a_vocabulary_with_holes_has_the_size_of_its_last_id() -> None:
    assert size_of(Tokenizer(models.WordLevel({"a": 0, "b": 9}))) == 10


# --- encoding


@pytest.mark.parametrize("name", ["chars", "bpe", "wordpiece"])
def test_fast_encoding_is_the_library_s(name: str, trained: dict[str, Tokenizer]) -> None:
    library = Tokenizer.from_str(trained[name].to_str())
    library.encode_special_tokens = True
    draw = random.Random(0)
    alphabet = [
        " ",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\x1c",
        "\x85",
        "a",
        "The",
        "'s",
        "1",
        "!",
        "é",
        "語",
    ]
    texts = ["", " ", "x", ODD, TEXT[:5000]]
    texts += ["".join(draw.choices(alphabet, k=draw.randrange(30))) for _ in range(3000)]
    encoder = TextEncoder(trained[name])
    for part in (texts, texts[::-1], [], [""]):  # the second time from memory
        ids, counts = encoder.encode(part)
        expected = [library.encode(text, add_special_tokens=False).ids for text in part]
        assert counts.tolist() == [len(e) for e in expected]
        assert ids.tolist() == [i for e in expected for i in e]


def test_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch, trained: dict[str, Tokenizer]) -> None:
    encoder = TextEncoder(trained["bpe"])
    first = encoder.encode([TEXT[:9000]])[0].tolist()
    for name in ("KNOWN_WORDS", "KNOWN_CHARACTERS"):
        monkeypatch.setattr(text_encoder, name, 100)
        assert encoder.encode(["abc"])[0].tolist() == trained["bpe"].encode("abc").ids
        assert len(encoder.words) == 1
        assert encoder.encode([TEXT[:9000]])[0].tolist() == first
        monkeypatch.undo()


def test_only_tokenizers_that_treat_words_alone_go_word_by_word(trained: dict[str, Tokenizer]) -> None:
    assert treats_words_alone(trained["bpe"])
    assert treats_words_alone(trained["wordpiece"])
    assert not treats_words_alone(trained["chars"])

    def changed(name: str, **parts: object) -> Tokenizer:
        spec = json.loads(trained[name].to_str())
        spec.update(parts)
        return Tokenizer.from_str(json.dumps(spec))

    byte_level = json.loads(trained["bpe"].to_str())["pre_tokenizer"]
    assert not treats_words_alone(changed("bpe", normalizer={"type": "Strip", "strip_left": True, "strip_right": True}))
    assert not treats_words_alone(changed("bpe", pre_tokenizer={**byte_level, "add_prefix_space": True}))
    assert not treats_words_alone(changed("bpe", pre_tokenizer={**byte_level, "use_regex": False}))
    assert not treats_words_alone(changed("bpe", pre_tokenizer=None))
    assert not treats_words_alone(changed("wordpiece", normalizer=None))
    tokenizer = changed("bpe")
    tokenizer.add_tokens([AddedToken("of the")])
    assert not treats_words_alone(tokenizer)


def test_the_name_of_a_special_token_in_a_text_is_text(trained: dict[str, Tokenizer]) -> None:
    for name in trained:
        ids = TextEncoder(trained[name]).encode([f"a{END_OF_TEXT}b [SEP]"])[0]
        assert end_of_text_id(trained[name]) not in ids
    assert 0 in trained["bpe"].encode(f"a{END_OF_TEXT}b").ids  # the user's own is left as it was


# --- reading


def test_a_tokenizer_file_is_read_without_truncation_and_padding(tmp_path: Path, trained: dict[str, Tokenizer]) -> None:
    tokenizer = Tokenizer.from_str(trained["bpe"].to_str())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(name)).to_str() == trained["bpe"].to_str()


def test_unreadable_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(TrunklineError, match=r"cannot read tokenizer=.*t\.json: .*give chars, bpe, masked_bpe"):
        load_tokenizer(str(tmp_path / "t.json"))

    def from_pretrained(name: str) -> None:
        raise Exception("no network")

    monkeypatch.setattr(ours, "Tokenizer", SimpleNamespace(from_pretrained=from_pretrained))
    with pytest.raises(
        TrunklineError, match="tokenizer=bep: there is no such file here, and as a hub name: no network"
    ):
        load_tokenizer("bep")


def test_the_tokenizer_of_a_checkpoint(tmp_path: Path, trained: dict[str, Tokenizer]) -> None:
    """Read like any checkpoint: after its digest is compared, and without running code."""
    path, beside = tmp_path / "a.ckpt", tmp_path / "a.ckpt.sha256"
    torch.save({"TextData": {"tokenizer": trained["bpe"].to_str()}}, path)
    beside.write_text(digest(path))
    assert load_tokenizer(str(path)).to_str() == trained["bpe"].to_str()
    run = tmp_path / "runs/mine/one/checkpoints/last.ckpt"
    SafeCheckpointIO().save_checkpoint({"global_step": 1, "TextData": {"tokenizer": trained["bpe"].to_str()}}, run)
    assert load_tokenizer(str(tmp_path / "runs/mine")).to_str() == trained["bpe"].to_str()
    beside.write_text("0" * 64)
    with pytest.raises(TrunklineError, match=r"a\.ckpt is damaged") as caught:
        load_tokenizer(str(path))
    assert caught.value.field == "data.tokenizer"
    beside.unlink()
    torch.save({"TextData": {"tokenizer": path}}, path)
    with pytest.raises(TrunklineError, match=r"a\.ckpt is not a checkpoint of plain data"):
        load_tokenizer(str(path))


def test_other_pipelines_are_encoded_by_the_library() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    ids, counts = TextEncoder(tokenizer).encode(["a b", "", "c a"])
    assert (ids.tolist(), counts.tolist()) == ([0, 1, 2, 0], [2, 0, 2])
