"""`trunkline benchmark`: compare speed with other libraries, in one run on one machine."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from trunkline import TrunklineError
from trunkline.datamodules import LabelledTextData
from trunkline.pipelines.benchmarks.audio_cases import audio
from trunkline.pipelines.benchmarks.clip_cases import clip_chunks, clip_compiled, clip_eager
from trunkline.pipelines.benchmarks.ddp import ddp_scaling
from trunkline.pipelines.benchmarks.dtw import dtw_errors
from trunkline.pipelines.benchmarks.export_cases import exported_forward
from trunkline.pipelines.benchmarks.image_cases import (
    muon_step,
    svm_accuracy,
    trainer_overhead,
    vit_compiled,
    vit_eager,
)
from trunkline.pipelines.benchmarks.jpeg_cases import jpeg_input
from trunkline.pipelines.benchmarks.loading import loading_times, show_loads
from trunkline.pipelines.benchmarks.loss_cases import chunked_loss
from trunkline.pipelines.benchmarks.ngrams import date_matches, ngram_accuracy
from trunkline.pipelines.benchmarks.saves import save_stalls
from trunkline.pipelines.benchmarks.seq2seq_cases import seq2seq
from trunkline.pipelines.benchmarks.start import start_times
from trunkline.pipelines.benchmarks.text_cases import (
    bert_compiled,
    bert_eager,
    bert_memory,
    generation,
    gpt_compiled,
    gpt_eager,
    tokenization,
)
from trunkline.ranges import check_ranges

CASES = {
    "vit": vit_eager,
    "vit_compiled": vit_compiled,
    "gpt": gpt_eager,
    "gpt_compiled": gpt_compiled,
    "bert": bert_eager,
    "bert_compiled": bert_compiled,
    "clip": clip_eager,
    "clip_compiled": clip_compiled,
    "clip_chunks": clip_chunks,
    "seq2seq": seq2seq,
    "audio": audio,
    "generation": generation,
    "tokenization": tokenization,
    "loss": chunked_loss,
    "muon": muon_step,
    "overhead": trainer_overhead,
    "saves": save_stalls,
    "ddp": ddp_scaling,
    "export": exported_forward,
    "jpeg": jpeg_input,
}
"""Cases that measure times, by name."""
DATE_TESTS = ("dates:years", "dates:locales", "dates:forms", "dates:languages")


def benchmark(
    what: Literal[
        "all",
        "vit",
        "vit_compiled",
        "gpt",
        "gpt_compiled",
        "bert",
        "bert_compiled",
        "bert_memory",
        "clip",
        "clip_compiled",
        "clip_chunks",
        "seq2seq",
        "audio",
        "generation",
        "tokenization",
        "loss",
        "muon",
        "overhead",
        "saves",
        "ddp",
        "export",
        "jpeg",
        "svm",
        "ngram",
        "dates",
        "dtw",
        "start",
        "loading",
    ] = "all",
    rounds: int = 10,
    batch_size: int | None = None,
    output: str | None = None,
    device: str | None = None,
    minutes: float | None = None,
) -> None:
    """Measure Trunkline side by side with other libraries.

    Args:
        what: `vit`: a training step of ViT-Ti/16 at 224 pixels, float32 eager, against timm's model in the same loop.
            `vit_compiled`: the same with bfloat16 and torch.compile, against timm's model in float32 eager. `gpt` and
            `gpt_compiled`: the same for a GPT of 6 layers, width 384 and 256 tokens per row, against transformers'
            GPT-2. `bert` and `bert_compiled`: the same for BERT-mini with 128 tokens per row, 15% of them hidden;
            `bert_compiled` compiles both sides. `bert_memory`: peak memory of such a step in float32 eager. `clip` and
            `clip_compiled`: the same for a CLIP at 72 pixels, width 256, 6 image and 4 text layers, against open_clip.
            `clip_chunks`: memory and time of 2,048 pairs in chunks of 128. `seq2seq`: training steps of a T5 1.1 with 4
            + 4 layers, width 256 and pairs of 64 tokens, in float32 eager and in bfloat16 compiled, and a token of 8
            texts with 4 beams, against transformers' T5. `audio`: training steps of an AST of 12 layers, width 192 and
            128 x 256 spectrograms, in float32 eager and in bfloat16 compiled, against transformers' AST in float32
            eager; and log-mel features on one core, in times real time. `generation`: one token of GPT-2 124M, batch
            size 1. `tokenization`: byte-level BPE against the bare library. `loss`: forward and backward pass of
            GPT-2's output layer and loss on 4,096 tokens, against all logits at once, and memory. `muon`: an optimiser
            step on the matrices of the digits recipe's network, against torch's Muon, which updates one matrix after
            the other. `overhead`: `trainer.fit` with progress bar, throughput, TensorBoard and signal handling, against
            a bare loop with the same network and batch size. `saves`: how long a save of 500 MB holds up training,
            against writing it at once; and a step beside it, against a step alone. `ddp`: two processes of one thread
            that train the ViT together, against two that each train one, at the same time. `export`: forward passes of
            GPT-2 124M with 1 and 4 rows of 256 tokens, exported to onnxruntime, against our own in float32 eager, and
            memory. `jpeg`: from JPEG files to inputs of 224 pixels, decoded no larger than needed, against whole ones.
            `svm`: test accuracy of an RBF SVM on the splits of vit/digits. `ngram`: test accuracy of a logistic
            regression on character n-grams on the splits of bert/classify_demo. `dates`: dates that logistic
            regressions on character n-grams read right in the test sets of seq2seq/dates, in about 80 seconds of CPU
            time. `dtw`: digit errors of time warping with recorded templates on test sets of audio/digits. `start`:
            what a user waits for, in seconds and in times `import torch`: the first line, help pages, `--print_config`,
            a first step, the end after the last line. `loading`: time and peak memory to load GPT-2 124M, BERT-base,
            ViT-B/16 and CLIP ViT-B/32 from files of transformers and timm, against the library's own loading, each time
            in a fresh process (Linux).
        rounds: number of measurements of each side.
        batch_size: images or rows per step; default: 16 images or sounds, 8 rows of a GPT, 32 rows of BERT or T5, 64
            pairs, 1 in generation, 8 with beams; in `loss`, tokens; in `jpeg`, crops of a picture.
        output: a JSON file for the results; with `device` it is `benchmark_<kind of device>.json` unless named.
        device: measure on this device at the sizes for which GPUs are bought, in bfloat16 and compiled on both sides:
            training steps of GPT-2 124M with 32 x 1,024 tokens, ViT-S/16 and ViT-B/16 at 224 pixels, BERT-base and CLIP
            ViT-B/32 (`gpt`, `vit`, `bert`, `clip`), greedy generation with batch 1 and 64 (`generation`), and the
            output layer and loss of 4,096 tokens against all logits at once, plain and compiled (`loss`): tokens or
            images a second, share of the device's peak speed (MFU), and peak memory. `cpu` rehearses it with tiny
            networks. Default: the other cases.
        minutes: with `device`, when to stop; the results so far are in the file after each case.
    """
    check_ranges("", {"rounds": rounds, "batch_size": batch_size}, rounds="[1, inf)", batch_size="[1, inf)")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise TrunklineError(f"--output {output}: there is no folder {Path(output).absolute().parent}; make it first")
    check_ranges("", {"minutes": minutes}, minutes="(0, inf)")
    if device is not None:
        from trunkline.pipelines.benchmarks.device_benchmark import measure_device  # imports objectives

        measure_device(what, rounds, batch_size, output, device, minutes)
        return
    if minutes is not None:
        raise TrunklineError("--minutes goes with --device; without it all cases are measured to their end")
    print_findings(what, rounds, batch_size)
    chosen = {name: case for name, case in CASES.items() if what in ("all", name)}
    rows = [row for case in chosen.values() for row in case(rounds, batch_size)]
    if rows:
        show_cases(rows)
    if rows and output is not None:
        Path(output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def print_findings(what: str, rounds: int, batch_size: int | None) -> None:
    """Print what is no comparison of times; arguments as in `benchmark`."""
    if what in ("all", "svm"):
        print(f"RBF SVM on the digits: test accuracy {svm_accuracy():.4f}")
    if what in ("all", "ngram"):
        data = LabelledTextData("emoji", tokenizer="", train_rows=1000, val_fraction=0.1, test_fraction=0.1)
        print(f"n-grams and logistic regression on bert/classify_demo: test accuracy {ngram_accuracy(data):.4f}")
    if what in ("all", "dates"):
        for name, share in date_matches(DATE_TESTS).items():
            print(f"n-grams and logistic regressions on {name}: exact match {share:.4f}")
    if what in ("all", "dtw"):
        for name, share in dtw_errors().items():
            print(f"dynamic time warping on {name}: digit error {share:.4f}")
    if what in ("all", "start"):
        for row in start_times(rounds):
            times = "first line {first:.2f} s, whole {whole:.2f} s, end {end:.2f} s; {ratio:.2f} times import torch"
            print(f"{row['command']}: {times.format(**row)}")
    if what in ("all", "loading"):
        show_loads(loading_times(rounds))
    if what in ("all", "bert_memory"):
        ours, theirs = bert_memory(batch_size)
        print(f"BERT-mini fp32 eager, peak memory of a training step: {ours:.0f} MiB; transformers: {theirs:.0f} MiB")


def show_cases(rows: list[dict[str, Any]]) -> None:
    """Print a table of the results of `compare`."""
    table = Table("case", "peer", "ms", "peer ms", "peer / ours", "range", title=f"{torch.get_num_threads()} threads")
    for row in rows:
        low, high = row["range"]
        figures = f"{row['ms']:.1f}", f"{row['peer_ms']:.1f}", f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}"
        table.add_row(row["case"], row["peer"], *figures)
    Console().print(table)
