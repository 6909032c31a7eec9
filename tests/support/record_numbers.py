"""Record what training computes, to show that a change of the code leaves it as it was.

    python tests/support/record_numbers.py losses OUT.json [--only NAME]
    python tests/support/record_numbers.py checkpoints FOLDER [--only OBJECTIVE]

`losses` trains every recipe for 20 steps and writes each loss exactly. Recipes that are too large for a CPU are shrunk
and trained on small synthetic data. Compare only files that were written on the same machine. `checkpoints` makes the
files of `tests/fixtures/checkpoints`, one for each objective (see `old_checkpoints.py`).

The script uses only the command line, so that it also runs with older code: call it with `python -P` and another
checkout in PYTHONPATH. `BEFORE` has the old names of flags that changed.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

import trunkline

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where a config finds `record_numbers.LossRecorder`

import small_data
import sound_files

STEPS = 20
ACCUMULATED = 6
"""Optimiser steps of a run that accumulates gradients of two batches."""
CONTRACTS = Path(trunkline.__file__).with_name("contract.py").exists()
"""Whether in this code the data gives a network its sizes, and all sources have the same flag."""
BEFORE = {"source": "path", "val_source": "val_path", "test_source": "test_path", "train_split": "hub_split"}
"""Flags of text data -> their names before that."""


class LossRecorder(Callback):
    """Writes the loss of every batch and a digest of the final weights, when training ends.

    Args:
        output: a .json file.
        weights: a .pt file for the network's initial weights.
        checkpoint: a .ckpt file for the state after `step` optimiser steps.
        step: number of optimiser steps before the checkpoint.
    """

    def __init__(
        self, output: str, weights: str | None = None, checkpoint: str | None = None, step: int | None = None
    ) -> None:
        self.output, self.weights, self.checkpoint, self.step = output, weights, checkpoint, step
        self.losses: list[str] = []
        self.start = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = trainer.global_step
        if self.weights is not None:
            torch.save(weights_of(pl_module), self.weights)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]).hex())  # already divided by the steps of an accumulation
        if self.checkpoint is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights, digest = weights_of(pl_module), hashlib.sha256()
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].contiguous().view(torch.uint8).numpy().tobytes())
        total = sum(float(value.double().sum()) for value in weights.values())
        content = {"losses": self.losses, "start": self.start, "end": trainer.global_step}
        content |= {"weights_sum": total.hex(), "weights_sha256": digest.hexdigest()}
        Path(self.output).write_text(json.dumps(content))


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    """The network's weights by name, on the CPU."""
    state = module.network.state_dict()
    return {name: value.detach().clone().cpu() for name, value in state.items()}


@dataclass
class Shrunk:
    """Flags that make a recipe small.

    Keys are flags without dashes (`model.…` or `data.…`), by their current names.
    """

    flags: dict[str, Any]
    before: dict[str, Any] = field(default_factory=dict)
    """Flags of sizes of the network, which older code does not take from the data."""
    own_precision: bool = False

    def arguments(self) -> list[str]:
        """Arguments of the command line, by the names that the code knows."""
        flags = self.flags if CONTRACTS else self.flags | self.before
        return [f"--{name}={as_text(value)}" for name, value in flags.items()]


def as_text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def text(**flags: Any) -> dict[str, Any]:
    """Flags of text data."""
    return {f"data.{flag if CONTRACTS else BEFORE.get(flag, flag)}": value for flag, value in flags.items()}


def images(**flags: Any) -> dict[str, Any]:
    """Flags of image data."""
    return {f"data.{flag}": value for flag, value in flags.items()}


def network(prefix: str = "", **flags: Any) -> dict[str, Any]:
    """Flags of a network, or of the part of it that `prefix` names."""
    return {f"model.network.{prefix}{flag}": value for flag, value in flags.items()}


def trunk(prefix: str = "", **flags: Any) -> dict[str, Any]:
    """Flags of a small trunk."""
    return network(f"{prefix}backbone.", **{"dim": 32, "depth": 2, "num_heads": 2, **flags})


WARMUP = {"model.optimizer.warmup": 5}
"""A short warm-up instead of thousands of steps, so that 20 steps learn something."""


def vit_recipes(folder: Path) -> dict[str, Shrunk]:
    """Image classifiers."""
    small_data.write_folders(folder / "imagenet/train", 120)
    source = str(Path(small_data.write_folders(folder / "imagenet/validation", 12)).parent)
    cache = {"cache_dir": str(folder / "datasets")}
    sizes = network(image_size=32, num_classes=2)
    imagenet = images(source=source, image_size=32, batch_size=8, **cache) | WARMUP | network(patch_size=8) | trunk()
    parquet = small_data.write_parquet(folder / "cifar.parquet", "img", 120)
    cifar = images(source=parquet, batch_size=8, image_size=16, **cache) | trunk()
    return {
        "vit/digits": Shrunk({}),
        "vit/cifar10": Shrunk(cifar, network(image_size=16, num_classes=2)),
        "vit/imagenet_s16": Shrunk(imagenet, sizes),
        "vit/imagenet_b16": Shrunk(imagenet, sizes),
    }


def gpt_recipes(folder: Path) -> dict[str, Shrunk]:
    """Causal language models."""
    documents, lines = small_data.write_documents(folder / "web.jsonl"), small_data.write_text(folder / "lines.txt")
    tokens = {"tokenizer": str(folder / "gpt.json"), "vocab_size": 320, "max_length": 32, "batch_size": 8}
    web = text(source=documents, **{**tokens, "val_fraction": 0.1}) | WARMUP
    length, characters = network(max_length=32), Shrunk(text(source=lines))
    return {
        "gpt/demo": Shrunk({}),
        "gpt/gpt2_124m": Shrunk(web | trunk(), length),
        "gpt/modern_124m": Shrunk(web | trunk(num_heads=4, num_kv_heads=2), length),
        "gpt/shakespeare_char": characters,
        "gpt/shakespeare_char_baseline": characters,
    }


def bert_recipes(folder: Path) -> dict[str, Shrunk]:
    """Masked language models, and tasks that use them."""
    tokens = {"tokenizer": str(folder / "words.json"), "batch_size": 8}
    documents = small_data.write_documents(folder / "wiki.jsonl")
    base = text(source=documents, **tokens, vocab_size=64, max_length=24, val_fraction=0.1) | WARMUP
    body = trunk("bert.") | network("bert.", max_length=40)
    vocabulary = network("bert.", vocab_size=64)
    labelled = text(source=small_data.write_labelled(folder / "labelled.jsonl"), max_length=24)
    tagged = text(source=small_data.write_tagged(folder / "tagged.conll"), max_length=24)
    asked = {name: small_data.write_questions(folder / f"{name}.json") for name in ("source", "val_source")}
    squad = text(**asked, max_length=24, doc_stride=8, max_question_length=8)
    task = text(**tokens, vocab_size=64) | body
    languages = Shrunk(text(tokenizer=str(folder / "bytes.json"), vocab_size=4096))
    return {
        "bert/base": Shrunk(base | trunk() | network(max_length=40)),
        "bert/demo": Shrunk({}),
        "bert/classify": Shrunk(labelled | task, vocabulary),
        "bert/tagging": Shrunk(tagged | task, vocabulary | network(num_outputs=3)),
        "bert/squad": Shrunk(squad | task, vocabulary),
        "bert/classify_demo": languages,
    }


def clip_recipes(folder: Path) -> dict[str, Shrunk]:
    """CLIPs."""
    data = images(source=small_data.write_shards(folder / "shards"), image_size=32, batch_size=8, val_fraction=0.1)
    data |= images(tokenizer=str(folder / "clip.json"), vocab_size=320, max_length=32)
    small = network(dim=16) | trunk("image.") | network("image.", patch_size=8)
    image, words = network("image.", image_size=32), {"vocab_size": 320, "max_length": 32}
    gpt = Shrunk(data | WARMUP | small | trunk("gpt."), image | network("gpt.", **words))
    masked = data | images(tokenizer=str(folder / "bytes.json")) | small | WARMUP
    return {
        "clip/emoji": Shrunk({}, own_precision=True),
        "clip/shared_trunk": Shrunk({}, own_precision=True),
        "clip/vit_b32": gpt,
        "clip/lit": gpt,
        "clip/siglip_b16": Shrunk(masked | {"model.chunk_size": 4} | trunk("bert."), image | network("bert.", **words)),
    }


def seq2seq_recipes(folder: Path) -> dict[str, Shrunk]:
    """Encoder-decoders."""
    tokens = {"tokenizer": str(folder / "spans.json"), "vocab_size": 320, "max_length": 32}
    sizes = {"dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
    small = network("encoder.", **sizes) | network("decoder.", **sizes) | WARMUP
    pairs = text(source=small_data.write_translations(folder / "pairs.jsonl"), max_target_length=24, **tokens)
    pairs |= text(source_column="source", target_column="target", val_split=None, test_split=None)
    pairs |= small | {"model.generation.max_new_tokens": 24}
    documents = small_data.write_documents(folder / "c4.jsonl")
    return {
        "seq2seq/dates": Shrunk({}),
        "seq2seq/phrases": Shrunk({}),
        "seq2seq/summarise": Shrunk(pairs | text(batch_size=8)),
        "seq2seq/t5_small_c4": Shrunk(small | text(source=documents, val_fraction=0.1, batch_size=8, **tokens)),
        "seq2seq/transformer_base_wmt": Shrunk(pairs | text(batch_tokens=200)),
    }


def audio_recipes(folder: Path) -> dict[str, Shrunk]:
    """Classifiers and recognisers of sounds."""
    sizes = {"dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
    own = text(source=sound_files.write_spoken(folder / "sounds", 60), hub_config=None, val_split=None, test_split=None)
    own |= {"data.log_mel.max_seconds": 1.0} | WARMUP
    labelled = Shrunk(own | text(label_column="label", batch_size=8) | network("backbone.", **sizes))
    spoken = own | text(train_split=None, vocab_size=None, tokenizer="chars")
    trunks = network("encoder.", **sizes) | network("decoder.", **sizes)
    return {
        "audio/digits": Shrunk({}),
        "audio/speech_commands": labelled,
        "audio/esc50": labelled,
        "audio/ast_audioset": labelled,
        "audio/librispeech_ctc": Shrunk(spoken | text(batch_seconds=8) | network("backbone.", **sizes)),
        "audio/whisper_tiny": Shrunk(spoken | text(batch_size=8) | trunks),
    }


def shrunk_recipes(folder: Path) -> dict[str, Shrunk]:
    """Every recipe of `configs/`, with the flags that make it small; writes the data below a folder."""
    small_data.save_tokenizers(folder)
    found = vit_recipes(folder) | gpt_recipes(folder) | bert_recipes(folder) | clip_recipes(folder)
    found |= seq2seq_recipes(folder) | audio_recipes(folder)
    configs = Path(trunkline.__file__).with_name("configs")
    known = {str(file.relative_to(configs).with_suffix("")) for file in configs.glob("*/*.yaml")}
    missing = {name for name in known - set(found) if not name.startswith("trainer/")}
    assert not missing, f"add {', '.join(sorted(missing))} to this script"
    return found


def runs(folder: Path) -> dict[str, tuple[str, Shrunk, list[str]]]:
    """Name of a run -> recipe, the flags that make it small, and further arguments."""
    recipes = shrunk_recipes(folder)
    found = {name: (name, shrunk, [f"--trainer.max_steps={STEPS}"]) for name, shrunk in recipes.items()}
    twice = ["--trainer.accumulate_grad_batches=2", f"--trainer.max_steps={ACCUMULATED}"]
    packed = "gpt/gpt2_124m"
    found[f"{packed}, documents"] = (packed, recipes[packed], ["--data.packing=documents", *found[packed][2]])
    for name in ("vit/digits", "bert/demo", "bert/tagging", "clip/emoji"):
        found[f"{name}, accumulated"] = (name, recipes[name], twice)
    found[f"{packed}, documents, accumulated"] = (packed, recipes[packed], ["--data.packing=documents", *twice])
    return found


def train(arguments: list[str], folder: Path, **recorder: Any) -> dict[str, Any]:
    """Run `trunkline fit`, and return what the recorder wrote.

    Args:
        arguments: arguments of the command, beginning with `--config` and the recipe.
        folder: a folder for the run.
        recorder: arguments of `LossRecorder`.
    """
    from trunkline.pipelines.cli import main

    output = folder / "recorded.json"
    callbacks = [{"class_path": "record_numbers.LossRecorder", "init_args": {"output": str(output), **recorder}}]
    same = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "logger": False, "enable_progress_bar": False}
    same |= {"enable_model_summary": False, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    flags = [f"--trainer.{name}={as_text(value)}" for name, value in same.items()]
    flags += [f"--trainer.callbacks={json.dumps(callbacks)}", "--test_with=none", "--threads=1", "--compile=false"]
    main(["fit", *arguments[:2], *flags, "--data.num_workers=0", f"--run_dir={folder / 'runs'}", *arguments[2:]])
    content: dict[str, Any] = json.loads(output.read_text())
    output.unlink()
    return content


def record_losses(output: Path, only: str | None = None) -> None:
    """Train the recipes (or those whose name begins with `only`), and write their losses."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TRUNKLINE_CACHE"] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        for title, (recipe, shrunk, more) in runs(folder).items():
            if only is not None and not title.startswith(only):
                continue
            begin = time.perf_counter()
            precision = [] if shrunk.own_precision else ["--trainer.precision=32-true"]
            arguments = ["--config", recipe, *precision, "--trainer.enable_checkpointing=false"]
            found[title] = train([*arguments, *shrunk.arguments(), *more], folder)
            seconds, losses = time.perf_counter() - begin, found[title]["losses"]
            shown = " ".join(f"{float.fromhex(loss):.4f}" for loss in (losses[0], losses[-1]))
            print(f"{title}: {len(losses)} losses, {shown}, {seconds:.1f} s", flush=True)
    check_origin()
    output.write_text(json.dumps(found, indent=1) + "\n")


def check_origin() -> None:
    """Refuse results of two mixed checkouts: modules that one lacks may come from an editable installation."""
    root = Path(trunkline.__file__).resolve().parent.parent
    files = [Path(str(module.__file__)) for name, module in sys.modules.items() if name.startswith("trunkline.")]
    strangers = [file for file in files if not file.resolve().is_relative_to(root)]
    assert not strangers, f"{strangers[0]} is not of {root}"
    print(f"recorded {root}")


def run_script(arguments: list[str]) -> None:
    """Run the command line, as the docstring of this file describes it."""
    match arguments:
        case ["losses", output]:
            record_losses(Path(output))
        case ["losses", output, "--only", name]:
            record_losses(Path(output), name)
        case ["checkpoints", folder, *more] if more[:1] in ([], ["--only"]):
            from old_checkpoints import make_checkpoints

            make_checkpoints(Path(folder), *more[1:])
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(sys.argv[1:])
