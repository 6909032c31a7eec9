"""`trunkline generate`: what it prints equals the core's tokens decoded; bad input is one clear message."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.generation import compiled
from trunkline.modules.generation.beams import beam_search
from trunkline.modules.generation.sampling import GenerationConfig
from trunkline.modules.generation.sampling import generate as generate_tokens
from trunkline.modules.networks import GPT, GPTConfig
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.cli import main
from trunkline.pipelines.commands import generate as command
from trunkline.pipelines.commands.generate import Text, generate_text

CORPUS = ["the cat sat on the mat", "häuser über 東京 🎉🎉 naïve", "the dog ate the cat. the end"]
END = "<|endoftext|>"


def bpe(end: str = END) -> Tokenizer:
    """Bytes: a character beyond ASCII takes several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def chars(*special: str) -> Tokenizer:
    names = ["<|unk|>", *special, *sorted(set("".join(CORPUS)))]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|unk|>", *special])
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer | None, change: Callable[[dict[str, Any]], Any] = lambda c: None) -> str:
    """A checkpoint in the format of training, of a network with random weights."""
    torch.manual_seed(0)
    size = 300 if tokenizer is None else tokenizer.get_vocab_size()
    config = GPTConfig(size, max_length=24, backbone=TransformerConfig(dim=16, depth=1, num_heads=2, causal=True))
    network = GPT(config)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    content = {
        "objective": "CausalLM",
        "hyper_parameters": {"network": asdict(config)},
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "TextData": {"tokenizer": None if tokenizer is None else tokenizer.to_str()},
    }
    change(content)
    SafeCheckpointIO().save_checkpoint(content, folder / "a.ckpt")
    return str(folder / "a.ckpt")


def network_of(path: str) -> GPT:
    content = torch.load(path, weights_only=True)
    trunk = TransformerConfig(**content["hyper_parameters"]["network"].pop("backbone"))
    network = GPT(GPTConfig(**content["hyper_parameters"]["network"], backbone=trunk)).eval()
    network.load_state_dict({name.removeprefix("network."): value for name, value in content["state_dict"].items()})
    return network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("run"), bpe())


@pytest.fixture
def printed(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(path: str = checkpoint, **options: Any) -> str:
        generate_text(path, **{"device": "cpu", "max_new_tokens": 20, **options})
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def continuation(network: GPT, prompt: str, ends: list[int], row: int = 0, **options: Any) -> str:
    """The same by hand; `row` is its number in the batch."""
    words = bpe()
    ids = words.encode(prompt).ids or [words.token_to_id(END)]
    config = GenerationConfig(**{"max_new_tokens": 20, **options})
    new = generate_tokens(network, torch.tensor([ids] * (row + 1)), config=config, end_ids=ends)[row]
    return prompt + words.decode(ids + new)[len(words.decode(ids)) :].rstrip("\ufffd")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["the cat", "東京", ""])
def test_text_of_one_prompt(checkpoint: str, printed: Any, prompt: str, stream: bool) -> None:
    network = network_of(checkpoint)
    for seed in range(4):
        want = continuation(network, prompt, [0], seed=seed)
        assert printed(prompt=prompt, stream=stream, seed=seed) == want + "\n"
    want = continuation(network, prompt, [0], temperature=0)
    assert printed(prompt=prompt, stream=stream, temperature=0.0) == want + "\n"


def test_texts_of_several_prompts_and_samples(checkpoint: str, printed: Any) -> None:
    network = network_of(checkpoint)
    blocks = printed(prompt=["the", "the cat sat"], num_samples=2, seed=3).removesuffix("\n").split("\n---\n")
    want = [continuation(network, "the", [0], row, seed=3) for row in (0, 1)]
    want += [continuation(network, "the cat sat", [0], row, seed=3) for row in (2, 3)]
    assert blocks == want
    assert len(set(blocks)) == 4


def test_beams(checkpoint: str, printed: Any) -> None:
    words, network = bpe(), network_of(checkpoint)
    ids = words.encode("the cat").ids
    beams = beam_search(network, torch.tensor([ids]), None, GenerationConfig(20, num_beams=3), [0])[0]
    want = ["the cat" + words.decode(ids + b.tokens).removeprefix("the cat").rstrip("\ufffd") + "\n" for b in beams]
    assert printed(prompt="the cat", num_beams=3) == want[0]
    assert printed(prompt=["the cat"], num_beams=3, num_samples=2) == "---\n".join(want[:2])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_number_formats(printed: Any, dtype: Any) -> None:
    assert printed(prompt="the cat", dtype=dtype, temperature=0.0).startswith("the cat")


def test_sliding_past_the_context(tmp_path: Path, printed: Any) -> None:
    assert len(printed(save(tmp_path, chars()), prompt="the cat", max_new_tokens=100)) > 7 + 80  # a few are unknown


def test_chars_without_end_and_unknown_characters(tmp_path: Path, printed: Any) -> None:
    path = save(tmp_path, chars())
    text = printed(path, prompt="the Q")  # no capital letter is known
    assert text.startswith("the Q")
    assert 20 <= len(text) <= 5 + 20 + 1


@pytest.mark.parametrize("end", [END, "[SEP]", "</s>", "<eos>"])
def test_the_end_of_text_ends_it(tmp_path: Path, printed: Any, end: str) -> None:
    def forced(content: dict[str, Any]) -> None:
        weights = content["state_dict"]
        weights["network.backbone.norm.weight"][:] = 0  # every state is ones, and the end token fits it best
        weights["network.backbone.norm.bias"][:] = 1
        weights["network.head.weight"][0] = weights["network.token_embed.weight"][0] = 10

    assert printed(save(tmp_path, bpe(end), forced), prompt="the cat") == "the cat\n"


def test_another_tokenizer(tmp_path: Path, printed: Any) -> None:
    bpe().save(str(tmp_path / "tokenizer.json"))
    path = save(tmp_path, bpe(), lambda c: c.pop("TextData"))
    assert printed(path, prompt="the", tokenizer=str(tmp_path / "tokenizer.json")).startswith("the")


def test_command_line(checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    flags = ["--checkpoint", checkpoint, "--device", "cpu", "--max_new_tokens", "3", "--top_k", "5"]
    main(["generate", *flags, "--prompt", "the cat: a"])
    assert capsys.readouterr().out.startswith("the cat: a")
    main(["generate", *flags, "--prompt", '["the", "cat"]', "--stop", "x", "--top_p", "0.9"])
    assert "\n---\ncat" in capsys.readouterr().out
    for name in ("--top_p", "--stop", "--num_samples", "--dtype"):
        main(["generate", "--help"])
        assert name in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["generate", *flags, "--temperature", "-1"])
    assert "temperature must be at least 0" in capsys.readouterr().err


# --- Text


def pieces(text: str, stops: list[str], tokenizer: Tokenizer | None = None) -> tuple[list[str], str]:
    """What a growing text gives token by token, and what it gives at the end alone."""
    words = tokenizer or bpe()
    prompt = words.encode("the cat").ids
    growing, whole = Text(words, prompt, stops), Text(words, prompt, stops)
    taken = []
    for token in words.encode(text).ids:
        ended = growing.add(token)
        assert whole.add(token) == ended
        taken.append(growing.take())
        if ended:
            break
    taken.append(growing.take(last=True))
    assert growing.take(last=True) == ""
    return taken, whole.take(last=True)


@pytest.mark.parametrize("text", [" sat. Über 東京 🎉🎉 naïve", "🎉", "x" * 50, " \n\n  the", ""])
@pytest.mark.parametrize("tokenizer", [bpe(), chars()])
def test_pieces_are_whole_characters_and_together_the_text(text: str, tokenizer: Tokenizer) -> None:
    taken, whole = pieces(text, [], tokenizer)
    assert "".join(taken) == whole == tokenizer.decode(tokenizer.encode(text).ids)
    assert not any("\ufffd" in piece for piece in taken)
    assert sum(map(bool, taken)) >= len(whole) / 10  # it does stream


@pytest.mark.parametrize(
    ("stops", "want"),
    [
        (["dog"], "a cat. the "),
        (["cat. the d"], "a "),
        (["the", "cat."], "a "),
        (["dogs", "t. the dx"], "a cat. the dog ate"),
        (["te"], "a cat. the dog a"),
        (["a"], ""),
        (["東"], "a cat. the dog ate"),
    ],
)
def test_stop_strings(stops: list[str], want: str) -> None:
    taken, whole = pieces("a cat. the dog ate", stops)
    assert "".join(taken) == whole == want
    assert not any(stop in want for stop in stops)


def test_half_characters_at_the_end_are_left_out() -> None:
    words = bpe()
    text = Text(words, [], [])
    for token in words.encode("a東").ids[:-1]:
        text.add(token)
    assert text.take() + text.take(last=True) == "a"


def test_stop_ends_the_row(checkpoint: str, printed: Any) -> None:
    text = printed(prompt="the cat", temperature=0.0).removesuffix("\n")
    stop = text[10:13]
    want = text[: text.index(stop, 7)]
    for stream in (True, False):
        assert printed(prompt="the cat", temperature=0.0, stop=[stop], stream=stream) == want + "\n"
        assert printed(prompt="the cat", temperature=0.0, stop=stop, stream=stream) == want + "\n"
    both = printed(prompt=["the cat", "a dog"], temperature=0.0, stop=[stop])
    assert both.startswith(want + "\n---\na dog")


def test_a_compiled_step_writes_the_same(printed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, but not compiled to code, which would take long."""
    used: list[Any] = []
    captured = torch.compile(compiled._step, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(compiled, "compiled_step", lambda options, form: used.append(options) or captured)
    for options in ({"prompt": "the cat", "temperature": 0.0}, {"prompt": ["the cat", "a dog"], "num_beams": 2}):
        assert printed(**options, compile=True) == printed(**options)
    assert set(used) == {()}
    torch._dynamo.reset()


def test_tokens_are_read_one_by_one_only_where_they_are_shown(printed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of sixteen steps are read at once after a compiled step; a stop string still ends its own text."""
    monkeypatch.setattr(compiled, "compiled_step", lambda *_: compiled._step)
    read: list[int] = []
    add = command.add_tokens

    def add_tokens(texts: list[Text], steps: list[torch.Tensor], ended: torch.Tensor) -> None:
        read.append(len(steps))
        add(texts, steps, ended)

    monkeypatch.setattr(command, "add_tokens", add_tokens)
    several = {"prompt": ["the cat", "a dog"], "num_samples": 2, "top_k": 9, "max_new_tokens": 40}
    stop = printed(**several)[20:22]
    for options, sizes in (
        (several, [16, 16, 8]),
        ({**several, "stop": stop}, [16, 16, 8]),
        ({"prompt": "the cat", "max_new_tokens": 5, "stream": True}, [1] * 5),
    ):
        want = printed(**options)
        read.clear()
        assert printed(**options, compile=True) == want
        assert read == sizes


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "--prompt is an empty list; give at least one text"),
        ({"stop": ["a", ""]}, "--stop has an empty string"),
        ({"num_samples": 0}, "--num_samples must be at least 1, not 0"),
        ({"num_samples": 2, "temperature": 0.0}, "--num_samples 2 with --temperature 0 gives the same text"),
        ({"num_samples": 3, "num_beams": 2}, "--num_samples 3 needs at least as many beams: --num_beams 3"),
        ({"top_k": -1}, "top_k must be at least 1, not -1"),
        ({"device": "gpu"}, "--device gpu cannot be used here: .*; try --device cpu"),
        (
            {"prompt": "x" * 25},
            r"--prompt has 25 tokens, but the network can see 24 \(max_length\); leave out at least 1 ",
        ),
        ({"prompt": ["a", "x" * 30]}, "--prompt: text 2 has 30 tokens, .* leave out at least 6 "),
        ({"tokenizer": "nowhere.json"}, "tokenizer=nowhere.json: there is no file nowhere.json; fix the path"),
    ],
)
def test_bad_options(checkpoint: str, capsys: pytest.CaptureFixture[str], options: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        generate_text(checkpoint, **{"device": "cpu", **options})
    assert capsys.readouterr().out == ""


def test_an_empty_prompt_needs_an_end_token(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"--prompt is empty, and the tokenizer has no end-of-text token \(<\|end"):
        generate_text(save(tmp_path, chars()), device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(objective="ImageClassifier"), "is no checkpoint of CausalLM, but of ImageClassifier"),
        (lambda c: c.pop("objective"), "but of something else"),
        (lambda c: c.pop("TextData"), "holds no tokenizer; name its file with --tokenizer tokenizer.json"),
        (lambda c: c.update(TextData={"tokenizer": "{}"}), "the tokenizer in .* is no tokenizer of the tokenizers lib"),
        (lambda c: c["hyper_parameters"]["network"].update(x=1), "GPTConfig has no field 'x'"),
        (lambda c: c["hyper_parameters"].pop("network"), "names no network"),
        (lambda c: c["hyper_parameters"]["network"].update(max_length=9), "do not fit its configuration: .*pos_embed"),
    ],
)
def test_bad_checkpoints(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        generate_text(save(tmp_path, bpe(), change), prompt="the", device="cpu")


def test_damaged_checkpoint(tmp_path: Path) -> None:
    path = Path(save(tmp_path, bpe()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrunklineError, match=r"a\.ckpt is damaged"):
        generate_text(str(path), prompt="the")


def test_a_tokenizer_with_more_tokens_than_the_network(tmp_path: Path) -> None:
    path = save(tmp_path, chars())
    bpe().save(str(tmp_path / "big.json"))
    size = len(json.loads(bpe().to_str())["model"]["vocab"])
    with pytest.raises(
        TrunklineError, match=rf"--tokenizer .*big\.json has {size} tokens, but the network of .* knows"
    ):
        generate_text(path, prompt="the", tokenizer=str(tmp_path / "big.json"))
