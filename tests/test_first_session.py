"""A newcomer's first session, typed out from the README: train, fine-tune on an own CSV, own class, predict."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

OWN_OBJECTIVE = """
import torch.nn.functional as F
from trunkline.contract import Loss
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.objectives.base import TrunklineModule


class Patient(TrunklineModule):
    network_class = ViT

    def __init__(self, network: ViTConfig | None = None, **shared):
        super().__init__(**shared)
        config = self.configured(ViTConfig, network)
        self.keep_hyperparameters(network=config)
        self.network = ViT(config)
        self.start()

    def loss(self, batch):
        return Loss(F.cross_entropy(self.network(batch["image"]), batch["label"], reduction="sum"), len(batch["label"]))
"""
OWN_RECIPE = """
model:
  class_path: mine.Patient
  init_args:
    network: {patch_size: 4, pool: mean, backbone: {dim: 16, depth: 1, num_heads: 2}}
data:
  class_path: ImageData
  init_args: {source: digits, image_size: 8, channels: 1, num_workers: 0}
trainer: {max_epochs: 1, accelerator: cpu}
"""


class Session:
    """A shell in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def type(self, command: str) -> str:
        """Run a command that must succeed; returns what it printed, on both streams."""
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
        environ.pop("TRUNKLINE_RUN", None)
        program, *arguments = command.split()
        done = subprocess.run(
            [Path(sys.executable).with_name(program), *arguments],
            cwd=self.folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def checkpoint(self, printed: str) -> str:
        """The path in the closing table."""
        found = re.search(r"│ checkpoint +│ (\S+) +│", printed)
        assert found is not None, printed
        assert (self.folder / found[1]).is_file()
        return found[1]


def documented(beginning: str) -> str:
    """The README's command that begins so, without its comment."""
    (line,) = [line for line in README.splitlines() if line.startswith(beginning)]
    return line.partition("  #")[0].strip()


@pytest.mark.slow
@pytest.mark.timeout(3600)  # eleven programs, on any machine
def test_a_first_session(tmp_path: Path) -> None:
    shell = Session(tmp_path)
    quick = "--trainer.max_epochs 9 --data.num_workers 0"
    vit = shell.checkpoint(shell.type(f"{documented('trunkline fit --config vit/digits  ')} {quick}"))

    # Images of one's own, and one of them.
    digits = load_digits()
    (tmp_path / "folder").mkdir()
    for number in range(20):
        pixels = (digits.images[number] * 255 / 16).astype("uint8")
        Image.fromarray(pixels).save(tmp_path / f"folder/{number:02}_is_{digits.target[number]}.png")
    use = documented("trunkline predict --checkpoint runs/vit")
    shell.type(re.sub(r"--checkpoint \S+", f"--checkpoint {vit}", use))
    table = pd.read_csv(tmp_path / "predictions.csv")
    right = [str(label) in path.rpartition("_")[2] for path, label in zip(table.path, table.label, strict=True)]
    assert len(right) == 20
    assert sum(right) > 10
    shell.type(f"trunkline predict --checkpoint {vit} --images {table.path[3]} --output one.csv")
    assert pd.read_csv(tmp_path / "one.csv").label.tolist() == [table.label[3]]

    # A pre-trained BERT, and a CSV of one's own: the documented command without another flag.
    bert = shell.checkpoint(
        shell.type("trunkline fit --config bert/demo --trainer.max_steps 20 --trainer.max_epochs -1")
    )
    words = {"good": "the film was good and I liked it", "bad": "it was bad and I left early"}
    rows = [f"{text} number {n},{label}" for n in range(60) for label, text in words.items()]
    (tmp_path / "cls.csv").write_text("\n".join(["text,label", *rows]))
    tune = documented("trunkline fit --config bert/classify").replace("train.jsonl", "cls.csv").replace("FILE", bert)
    tuned = shell.checkpoint(shell.type(tune))
    (tmp_path / "texts.txt").write_text("\n".join(words.values()))
    shell.type(f"trunkline predict --checkpoint {tuned} --texts texts.txt --output classes.csv")
    assert set(pd.read_csv(tmp_path / "classes.csv").label) <= set(words)

    # A class of one's own, beside its config.
    (tmp_path / "mine.py").write_text(OWN_OBJECTIVE)
    (tmp_path / "mine.yaml").write_text(OWN_RECIPE)
    own = shell.checkpoint(shell.type(documented("trunkline fit --config mine.yaml")))
    assert own.startswith("runs/mine/")

    # The network alone, for another project.
    load = f"from trunkline.modules.networks import ViT; print(ViT.from_checkpoint('{vit}').config.image_size)"
    (tmp_path / "load.py").write_text(load)
    assert shell.type("python load.py") == "16\n"
