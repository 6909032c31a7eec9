"""Compiled training: one graph for each objective, without breaks, that nothing else touches."""

from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from resumed_run import arguments, write_config
from small_data import save_tokenizers, write_questions, write_tagged, write_text
from tasks import TASKS
from torch import nn
from torch._dynamo.utils import counters

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import SpeechEncoder, SpeechEncoderConfig
from trunkline.pipelines.cli import main

RAGGED = {"translate", "speech", "listen"}
"""Tasks whose batches have as many rows as fit, and rows of different lengths: their one graph has symbolic sizes."""
ALIKE = {"block", "masked", "classify", "tags", "questions", "listen"}
"""Tasks whose networks and batches are those of `documents`, `masked_pairs`, `adapted` and `translate`."""
RECIPES = {
    **dict.fromkeys(["gpt/demo", "gpt/gpt2_124m", "gpt/modern_124m"], "block"),
    **dict.fromkeys(["gpt/shakespeare_char", "gpt/shakespeare_char_baseline"], "block"),
    **dict.fromkeys(["bert/base", "bert/demo"], "masked"),
    **dict.fromkeys(["bert/classify", "bert/classify_demo"], "classify"),
    **{"bert/squad": "questions", "bert/tagging": "tags"},
    **dict.fromkeys(["clip/emoji", "clip/lit", "clip/shared_trunk", "clip/siglip_b16", "clip/vit_b32"], "pairs"),
    **dict.fromkeys(["vit/cifar10", "vit/digits", "vit/imagenet_b16", "vit/imagenet_s16"], "image"),
    **dict.fromkeys(["seq2seq/dates", "seq2seq/phrases", "seq2seq/summarise"], "translate"),
    **{"seq2seq/t5_small_c4": "spans", "seq2seq/transformer_base_wmt": "translate"},
    **dict.fromkeys(["audio/ast_audioset", "audio/esc50", "audio/speech_commands"], "audio"),
    **dict.fromkeys(["audio/digits", "audio/librispeech_ctc"], "speech"),
    "audio/whisper_tiny": "listen",
}
"""All packaged recipes, and the task whose data they are trained on."""
SHRUNK = {"dim": 16, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 32, "patch_size": 4, "stride": 3}
SHRUNK |= {"chunk_size": 10, "max_new_tokens": 8, "mlp_dim": 32, "head_dim": 4}


def text_task(folder: Path, kind: str) -> dict[str, Any]:
    """Data of a task that is not among the `TASKS`, for a recipe's model."""
    save_tokenizers(folder)
    words = {"tokenizer": str(folder / "words.json"), "max_length": 32, "val_fraction": 0.4, "batch_size": 10}
    if kind == "questions":
        source = write_questions(folder / "questions.json", 80)
        return {
            "class_path": "SquadData",
            "init_args": {**words, "source": source, "doc_stride": 8, "max_question_length": 8},
        }
    if kind == "tags":
        source = write_tagged(folder / "tags.conll", 150)
        return {"class_path": "TaggedTextData", "init_args": {**words, "source": source}}
    words |= {"source": write_text(folder / "text.txt"), "tokenizer": str(folder / "spans.json")}
    return {"class_path": "SpanCorruptionData", "init_args": {**words, "cache_dir": str(folder / "cache")}}


def compiled_graphs(
    folder: Path, task: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any] | None = None, **trainer: Any
) -> list[bool]:
    """Whether each graph that was compiled has symbolic sizes; with an evaluation before training and after every step.

    Args:
        folder: of the run.
        task: one of the `TASKS`.
        monkeypatch: undone after the test.
        change: changes the recipe.
        trainer: more of its options.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    graphs: list[list[Any]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(inputs)
        return graph

    compile_network = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile_network(self, backend=backend))
    options = {"limit_val_batches": 2, "num_sanity_val_steps": 2, "val_check_interval": 1, "max_steps": 6, **trainer}
    config = write_config(folder, task, logger=True, log_every_n_steps=2, **options)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks+"] = content["trainer"]["callbacks+"][:1]  # the average
    content["data"]["init_args"]["eval_batch_size"] = 7
    if change is not None:
        change(content)
    config.write_text(yaml.safe_dump(content))
    torch._dynamo.reset()
    counters.clear()
    main([*arguments(config, 1), "--compile", "true"])
    assert counters["graph_break"] == Counter()
    assert counters["unimplemented"] == Counter()
    assert counters["stats"]["unique_graphs"] == len(graphs)
    return [any(isinstance(x, torch.SymInt) for x in inputs) for inputs in graphs]


@pytest.mark.parametrize("task", [pytest.param(task, marks=[pytest.mark.slow] * (task in ALIKE)) for task in TASKS])
def test_training_is_compiled_once(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although evaluations have batches of another size."""
    assert compiled_graphs(tmp_path, task, monkeypatch) == [task in RAGGED]


def test_texts_that_are_written_between_steps_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is written after each step, token by token over a cache, from prompts of two lengths."""
    samples = {"prompts": ["a", "b c"], "max_new_tokens": 4}

    def add(content: Any) -> None:
        callback = {"class_path": "trunkline.modules.callbacks.TextSamples", "init_args": samples}
        content["trainer"]["callbacks+"].append(callback)

    assert compiled_graphs(tmp_path, "block", monkeypatch, add) == [False]


def shrink(part: Any) -> Any:
    """Small sizes in place of a recipe's."""
    if not isinstance(part, dict):
        return part
    return {key: SHRUNK[key] if key in SHRUNK and value else shrink(value) for key, value in part.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_compiled_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their networks and losses, small but with all options: grouped queries, shared trunks, mixed pictures."""
    task = RECIPES[name]

    def take(content: Any) -> None:
        recipe = yaml.safe_load((files("trunkline") / f"configs/{name}.yaml").read_text(encoding="utf-8"))
        if task in TASKS:
            assert recipe["model"]["class_path"] == content["model"]["class_path"]
        else:
            content["data"] = text_task(tmp_path, task)
        model = content["model"] = {**recipe["model"], "init_args": shrink(recipe["model"]["init_args"])}
        if model["init_args"]["network"].get("bert") == {}:  # as large as the network that it starts from
            model["init_args"]["network"]["bert"]["backbone"] = {"dim": 16, "depth": 2, "num_heads": 4}

    first = task if task in TASKS else "block"
    assert compiled_graphs(tmp_path, first, monkeypatch, take) == [task in RAGGED]


@pytest.mark.slow
def test_the_backward_pass_takes_other_lengths() -> None:
    """With the real compiler, and masks for padding: gradients as without it."""
    trunk = TransformerConfig(16, 2, 2)
    network = SpeechEncoder(SpeechEncoderConfig(vocab_size=6, num_mels=12, strides=[2], backbone=trunk))
    torch._dynamo.reset()
    counters.clear()
    compiled, found = torch.compile(network), []
    for rows, length in ((17, 16), (21, 24)):
        x, mask = torch.randn(rows, length, 12), torch.ones(rows, length, dtype=torch.bool)
        mask[0, 9:] = False
        for field in (x, mask):
            torch._dynamo.maybe_mark_dynamic(field, [0, 1])
        found.append(
            [
                torch.autograd.grad(each(x, mask).square().mean(), list(network.parameters()))
                for each in (compiled, network)
            ]
        )
    for got, want in found:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_all_recipes_are_compiled() -> None:
    configs = Path(str(files("trunkline") / "configs"))
    names = {file.relative_to(configs).with_suffix("").as_posix() for file in configs.glob("*/*.yaml")}
    assert set(RECIPES) == {name for name in names if not name.startswith("trainer/")}


@pytest.mark.slow
def test_a_batch_of_one_row_has_a_graph_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the 13 batches has one; PyTorch compiles a size of 1 as a constant."""
    assert compiled_graphs(tmp_path, "translate", monkeypatch, max_steps=26) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["block", "pairs", "translate"])
def test_accumulation_compiles_nothing_more(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = compiled_graphs(tmp_path, task, monkeypatch, accumulate_grad_batches=2, max_steps=3)
    assert graphs == [task in RAGGED]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["image", "block"])
def test_recomputed_activations_compile_nothing_more(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recompute(content: Any) -> None:
        content["model"]["init_args"]["network"]["backbone"]["activation_checkpointing"] = True

    assert compiled_graphs(tmp_path, task, monkeypatch, recompute) == [False]
