"""`trunkline translate`: its texts against decoding by hand; files line by line; bad input is one clear message."""

import io
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_steps import record_steps
from tiny_translator import END, LANGUAGES, LONGEST_TARGET, REV, UP, by_hand, letters, random_network, save

from trunkline import TrunklineError
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.decoding import GenerationConfig
from trunkline.modules.generation.sampling import generate
from trunkline.pipelines.cli import main
from trunkline.pipelines.commands.translate import translate
from trunkline.pipelines.trained import Trained
from trunkline.pipelines.translating import Translator

TEXTS = ["abc", "a", "fed cab", "bb", "cafe bad", "dead", "f", "beef cab"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is told the target's language."""
    return save(tmp_path_factory.mktemp("run"), {"languages": LANGUAGES})


def run(checkpoint: str, **options: Any) -> None:
    translate(checkpoint, **{"device": "cpu", **options})


def lines_of_file(checkpoint: str, folder: Path, content: bytes, **options: Any) -> list[str]:
    """The lines that a file becomes."""
    (folder / "in.txt").write_bytes(content)
    run(checkpoint, texts=str(folder / "in.txt"), output=str(folder / "out.txt"), **options)
    return (folder / "out.txt").read_bytes().decode().removesuffix("\n").split("\n")


# --- texts


def test_texts_are_those_of_decoding_by_hand(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = random_network()
    want = [by_hand(network, text) for text in TEXTS]
    assert len({len(text) for text in want}) > 3  # some end early
    for text, own in zip(TEXTS, want, strict=True):
        run(checkpoint, text=text)
        captured = capsys.readouterr()
        assert captured.out == own + "\n"
        assert captured.err == ""
    run(checkpoint, text=TEXTS)
    assert capsys.readouterr().out == "".join(f"{own}\n" for own in want)


def test_targets_with_a_tokenizer_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = letters("xyzuvwst")
    options: dict[str, Any] = {"share_embeddings": False, "target_vocab_size": 12, "seed": 0}
    run(save(tmp_path, target=words, **options), text=TEXTS)
    want = [by_hand(random_network(**options), text, words=words) for text in TEXTS]
    assert capsys.readouterr().out.splitlines() == want
    assert set("".join(want)) & set("xyz")


def test_the_prefix_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(save(tmp_path, {"prefix": "be "}), text="abc")
    assert capsys.readouterr().out == by_hand(random_network(), "be abc") + "\n"


def test_the_language(several: str, capsys: pytest.CaptureFixture[str]) -> None:
    network, found = random_network(), []
    for language, token in zip(LANGUAGES, (UP, REV), strict=True):
        run(several, text=TEXTS, language=language)
        found.append(capsys.readouterr().out.splitlines())
        assert found[-1] == [by_hand(network, text, (token,)) for text in TEXTS]
    assert found[0] != found[1]


def test_command_line(checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts follow the command, and mean what they say even where they look like YAML."""
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    network = random_network()
    main(["translate", "fed cab", "--checkpoint", checkpoint, "--device", "cpu"])
    assert capsys.readouterr().out == by_hand(network, "fed cab") + "\n"
    odd = ["null", "[a, b]", "12", "a: b", "abc"]
    main(["translate", *odd, "--checkpoint", checkpoint, "--device=cpu"])
    assert capsys.readouterr().out.splitlines() == [by_hand(network, text) for text in odd]
    main(["translate", "--checkpoint", checkpoint, "--device=cpu", "--text", "fed cab", "--max_new_tokens", "2"])
    assert capsys.readouterr().out == by_hand(network, "fed cab", longest=2) + "\n"
    main(["translate", "--help"])
    assert "--no_repeat_ngram" in capsys.readouterr().out


# --- files


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_lines_of_a_file(checkpoint: str, tmp_path: Path, batch_size: int) -> None:
    """In their order, whatever their lengths; empty lines stay, and the ends of lines do not matter."""
    network = random_network()
    texts = [*TEXTS[:3], "", *TEXTS[3:6], "  ", *TEXTS[6:]]
    content = "\n".join(texts[:5]) + "\r\n" + "\n".join(texts[5:])  # the last line has no end
    found = lines_of_file(checkpoint, tmp_path, content.encode(), batch_size=batch_size)
    assert found == [by_hand(network, text) if text.strip() else "" for text in texts]
    assert not list(tmp_path.glob(".*"))


def test_an_empty_file_and_one_of_empty_lines(checkpoint: str, tmp_path: Path) -> None:
    assert lines_of_file(checkpoint, tmp_path, b"") == [""]
    assert (tmp_path / "out.txt").read_bytes() == b""
    assert lines_of_file(checkpoint, tmp_path, b"\n\n") == ["", ""]


def test_standard_input_and_output(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n\nfed cab\n")))
    run(checkpoint, texts="-")
    network = random_network()
    captured = capsys.readouterr()
    assert captured.out == f"{by_hand(network, 'abc')}\n\n{by_hand(network, 'fed cab')}\n"
    assert captured.err == ""  # no progress, which is for terminals
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("abc\nä".encode("latin1"))))
    with pytest.raises(TrunklineError, match="standard input:2 is not UTF-8"):
        run(checkpoint, texts="-")


def test_a_translation_of_a_line_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = letters("abcdef \n")
    path = save(tmp_path, target=words, seed=1)
    want = by_hand(random_network(1), "fed cab", words=words)
    assert "\n" in want.strip()
    assert lines_of_file(path, tmp_path, b"fed cab\nabc\n")[0] == " ".join(want.splitlines())
    capsys.readouterr()
    run(path, text="fed cab")
    assert capsys.readouterr().out == want + "\n"


def test_nothing_is_half_written(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.txt"
    output.write_text("before\n")
    (tmp_path / "in.txt").write_text("abc\n" * 5)
    calls = []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr("trunkline.pipelines.generating.generate", broken)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, texts=str(tmp_path / "in.txt"), output=str(output), batch_size=1)
    assert output.read_text() == "before\n"
    assert {file.name for file in tmp_path.iterdir()} == {"out.txt", "in.txt"}


# --- generation


def encoded(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[*letters().encode(text).ids, END] for text in texts]
    width = max(map(len, rows))
    mask = torch.tensor([[n < len(row) for n in range(width)] for row in rows])
    return torch.tensor([row + [END] * (width - len(row)) for row in rows]), mask


def beams(network: Any, **options: Any) -> list[str]:
    """The best beam of each text, one text at a time."""
    config, found = GenerationConfig(LONGEST_TARGET, temperature=0, **options), []
    for text in TEXTS:
        decoder = network.decoder_of(*encoded([text]))
        best = beam_search(decoder, torch.tensor([[END]]), None, config, [END])[0][0]
        found.append(letters().decode(best.tokens))
    return found


def test_beams_and_repetitions(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = random_network()
    greedy = [by_hand(network, text) for text in TEXTS]
    for options in ({"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.2}, {"num_beams": 2, "no_repeat_ngram": 1}):
        run(checkpoint, text=TEXTS, **options)
        found = capsys.readouterr().out.splitlines()
        assert found == beams(network, **options) != greedy
    assert all(len(set(text)) == len(text) for text in found)  # no token comes twice


def test_the_recipe_says_how_texts_are_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is given replaces it."""
    recipe = asdict(GenerationConfig(6, temperature=0, num_beams=3, first_token=7))
    path = save(tmp_path, change=lambda content: content["hyper_parameters"].update(generation=recipe))
    run(path, text=TEXTS)
    found = capsys.readouterr().out.splitlines()
    config = GenerationConfig(6, temperature=0, num_beams=3, first_token=7)
    network = random_network()
    best = beam_search(network.decoder_of(*encoded(TEXTS)), torch.full((len(TEXTS), 1), END), None, config, [END])
    assert found == [letters().decode(rows[0].tokens) for rows in best]
    assert all(text.startswith("d") for text in found)
    assert max(map(len, found)) == 6
    run(path, text=TEXTS, num_beams=1, max_new_tokens=4)
    again = capsys.readouterr().out.splitlines()
    assert max(map(len, again)) == 4
    with pytest.raises(TrunklineError, match="num_beams=3 is beam search, which does not sample: leave out top_k"):
        run(path, text="a", top_k=3)


def test_samples_depend_on_the_number_of_the_line_alone(checkpoint: str, tmp_path: Path) -> None:
    content = "\n".join(["abc", "fed cab"] * 4).encode()
    found = [lines_of_file(checkpoint, tmp_path, content, top_k=5, batch_size=size) for size in (1, 3, 64)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 8  # each line has draws of its own
    assert lines_of_file(checkpoint, tmp_path, content, top_k=5, seed=1) != found[0]
    network, config = random_network(), GenerationConfig(LONGEST_TARGET, temperature=1.0, top_k=5)
    alone = generate(network.decoder_of(*encoded(["abc"])), torch.tensor([[END]]), config=config, end_ids=[END])
    assert found[0][0] == letters().decode(alone[0])
    hot = lines_of_file(checkpoint, tmp_path, content, temperature=3.0)
    assert hot != found[0]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"num_beams": 3}], ids=["greedy", "draws", "beams"])
def test_a_compiled_step_writes_the_same(
    checkpoint: str, options: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one graph over one memory: the last batch is filled up."""
    steps = record_steps(monkeypatch)
    run(checkpoint, text=TEXTS, batch_size=3, **options)
    want = capsys.readouterr().out
    assert not steps
    run(checkpoint, text=TEXTS, batch_size=3, compile=True, **options)
    assert capsys.readouterr().out == want
    assert len(steps) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_number_formats(checkpoint: str, tmp_path: Path, dtype: Any) -> None:
    """Most of the choices are clear enough to survive the rounding."""
    network = random_network()
    found = lines_of_file(checkpoint, tmp_path, "\n".join(TEXTS).encode(), dtype=dtype, max_new_tokens=1)
    want = [by_hand(network, text, longest=1) for text in TEXTS]
    assert sum(ours == right for ours, right in zip(found, want, strict=True)) >= len(TEXTS) - 2


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": None}, "there is nothing to translate; give a text, or --texts with a file"),
        ({"text": []}, "there is nothing to translate"),
        ({"texts": "in.txt"}, "a text and --texts are both given; leave one of them out"),
        ({"text": ["a", " "]}, "text 2 is empty; give a text, or leave it out"),
        ({"text": None, "texts": "nowhere.txt"}, "--texts nowhere.txt: there is no such file; fix the path"),
        ({"output": "nowhere/out.txt"}, "--output nowhere/out.txt: there is no folder nowhere; make it first"),
        ({"output": "."}, r"--output \. is a folder; give a file in it"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"max_new_tokens": 12}, r"max_new_tokens=12 is more than the 11 tokens .*; set it to at most 11"),
        ({"language": "up"}, "language=up, but the model was trained without target languages; leave it out"),
        ({"text": ["abc", "abcdefabcdef"]}, "text 2 has 13 tokens, but the model reads at most 12; shorten it"),
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"num_beams": 2, "top_p": 0.5}, "num_beams=2 is beam search, which does not sample: leave out top_p"),
        ({"device": "gpu"}, "--device gpu cannot be used here"),
    ],
)
def test_bad_options(
    checkpoint: str, options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        run(checkpoint, **{"text": "abc", **options})
    assert not list(tmp_path.iterdir())


def test_languages_that_are_not_known(several: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="language=de: the model was not trained on it; choose among up, rev") as e:
        run(several, text="abc", language="de")
    assert e.value.field == "language"
    (tmp_path / "in.txt").write_text("\n")
    with pytest.raises(TrunklineError, match="several target languages; name one with language: up, rev"):
        run(several, texts=str(tmp_path / "in.txt"))  # also if there is nothing to translate


def test_a_line_that_is_too_long(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = b"abc\n\nabcdefabcdef\nab\n"
    with pytest.raises(TrunklineError, match=r"in\.txt:3 has 13 tokens, but the model reads at most 12; shorten it"):
        lines_of_file(checkpoint, tmp_path, content)
    assert not (tmp_path / "out.txt").exists()
    found = lines_of_file(checkpoint, tmp_path, content, too_long="cut")
    assert found[2] == by_hand(random_network(), "abcdefabcde")
    assert capsys.readouterr().err == "1 of 3 texts were cut to 12 tokens, as in training\n"


def test_messages_name_the_flag(
    several: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    for text, options, flag in (
        ("abc", [], "--language"),
        ("abc", ["--language", "up", "--max_new_tokens", "99"], "--max_new_tokens"),
        ("abc" * 20, ["--language", "up"], "--too_long"),
    ):
        with pytest.raises(SystemExit):
            main(["translate", text, "--checkpoint", several, "--device", "cpu", *options])
        assert capsys.readouterr().err.strip().endswith(f"({flag})")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(objective="CausalLM"), "is no checkpoint of Seq2Seq, but of CausalLM"),
        (
            lambda c: c.pop("TranslationData"),
            "was trained without TranslationData, so how to prepare",
        ),
        (
            lambda c: c.update(classes={"data": "trunkline.datamodules.X"}, X={"tokenizer": "{}"}),
            "was trained with X, which has no pairs of sources and targets; train it on TranslationData first",
        ),
        (
            lambda c: c["TranslationData"].update(tokenizer="{}"),
            "the tokenizer in .* is no tokenizer of",
        ),
        (lambda c: c["TranslationData"].update(target_tokenizer="{}"), "the tokenizer in .* is no tokenizer"),
        (lambda c: c["TranslationData"]["settings"].update(start_token="<s>"), "has no token <s>; train again"),
        (lambda c: c["state_dict"].popitem(), "do not fit its configuration"),
    ],
)
def test_bad_checkpoints(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        run(save(tmp_path, change=change), text="abc")


def test_rows_can_be_as_long_as_in_training(checkpoint: str) -> None:
    """A source that fills all positions, and one of a single letter."""
    translator = Translator.of(Trained.read(checkpoint), torch.device("cpu"))
    rows = translator.sources.encode(["abcdefabcde", "a"])
    assert [len(row) for row in rows] == [12, 2]
    found = translator.write(rows, GenerationConfig(11, temperature=0), 2)
    assert found == [by_hand(random_network(), text, longest=11) for text in ("abcdefabcde", "a")]
