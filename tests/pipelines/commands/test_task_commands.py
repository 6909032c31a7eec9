"""The README's commands for tasks on text, as the installed program runs them, from a pre-trained BERT."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from task_files import asked, labelled, pretrained, tagged

from trunkline.modules.metrics.squad import squad_scores

RATES = "--model.network.bert.backbone.dropout 0 --model.network.dropout 0"
SMALL = (
    "--trainer.accelerator cpu --trainer.check_val_every_n_epoch 10 --data.batch_size 4 --data.max_length 24 "
    "--model.optimizer.lr 3e-3"
)


def trunkline(folder: Path, command: str) -> str:
    """Run the installed program; returns what it printed."""
    program = Path(sys.executable).with_name("trunkline")
    done = subprocess.run(
        [program, *command.split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "tagging", "squad"])
def test_fit_and_predict(task: str, tmp_path: Path) -> None:
    """Overfitted to its training file: every class, every tag, every answer is right."""
    start = pretrained(tmp_path)
    path = {"classify": labelled, "tagging": tagged, "squad": asked}[task](tmp_path)
    own = {
        "classify": "--trainer.max_epochs 30",
        "tagging": "--trainer.max_epochs 30",
        "squad": "--trainer.max_epochs 60 --model.optimizer.name muon --model.optimizer.lr 0.02 "
        "--data.max_question_length 8 --data.doc_stride 8",
    }
    fit = f"fit --config bert/{task} --data.source {path} --data.val_source {path} --model.init_from {start}"
    printed = trunkline(tmp_path, f"{fit} --data.tokenizer {start} {RATES} {SMALL} {own[task]}")
    metric = {"classify": "val/acc", "tagging": "val/f1", "squad": "val/exact"}[task]
    assert any(metric in line and "1.0000" in line for line in printed.splitlines()), printed[-3000:]
    (checkpoint,) = tmp_path.glob(f"runs/bert/{task}/*/checkpoints/last.ckpt")
    assert list(checkpoint.parent.parent.glob("events*"))
    output = tmp_path / "out.csv"
    printed = trunkline(tmp_path, f"predict --checkpoint {checkpoint} --texts {path} --output {output}")
    found = pd.read_csv(output)
    assert f"wrote {len(found)} rows to {output}" in printed
    if task == "classify":
        assert found.label.tolist() == pd.read_json(path, lines=True).label.tolist()
    elif task == "tagging":
        gold = [line.split() for line in Path(path).read_text().splitlines() if line]
        assert found[["word", "tag"]].to_numpy().tolist() == gold
    else:
        entries = [q for p in pd.read_json(path).data[0]["paragraphs"] for q in p["qas"]]
        assert found.id.tolist() == [entry["id"] for entry in entries]
        for answer, entry in zip(found.answer, entries, strict=True):
            assert squad_scores([(answer, [gold["text"] for gold in entry["answers"]])])["exact"] == 1
