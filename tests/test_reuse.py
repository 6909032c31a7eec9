"""The README's section on reuse: its code runs as it stands there, in order, after a tiny training run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trunkline.modules.networks.convert.families import FOREIGN_FAMILIES
from trunkline.pipelines.cli import main

ROOT = Path(__file__).parents[1]
SECTION = re.search(r"^## Reuse\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]  # type: ignore[index]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", SECTION, re.M | re.S)
SMALL = """
model: {init_args: {network: {patch_size: 8, backbone: {dim: 16, depth: 1, num_heads: 2}}}}
data: {init_args: {val_fraction: 0.2, test_fraction: 0.6, num_workers: 0}}
trainer: {max_epochs: 1, enable_progress_bar: false, enable_model_summary: false}
"""
GIVEN = """
import sys
import numpy
import torch
from PIL import Image

picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (20, 16), dtype=numpy.uint8))
batches = [(torch.randn(4, 1, 16, 16), torch.arange(4))] * 2
"""
CHECKED = """
with torch.no_grad():
    want = trunkline.load("my_vit")(batches[0][0])
    assert torch.allclose(network.eval()(batches[0][0]), want, atol=1e-5) and want.std() > 0
    kept = trunkline.load("runs/vit/digits")(batches[0][0])
    assert torch.allclose(model.eval()(batches[0][0]), kept, atol=1e-5) and not torch.allclose(kept, want, atol=1e-4)
assert logits.shape == (1, 10) and abs(logits - scores.detach().numpy()).max() <= 1e-4 * abs(logits).max()
assert scores.shape == (1, 10) and torch.equal(trunkline.load("my_vit").transform(picture), image)
tuned = trunkline.load("runs/vit/tuned")
assert not torch.equal(tuned(batches[0][0]), kept) and tuned.state_dict().keys() == network.state_dict().keys()
print("done")
"""


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trunkline"])
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    Path("small.yaml").write_text(SMALL)
    main(["fit", "--config", "vit/digits", "--config", "small.yaml"])
    kinds = [kind for kind, _ in BLOCKS]
    assert set(kinds) == {"sh", "python"}
    assert kinds.count("python") >= 4
    for command in (line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()):
        program, *arguments = shlex.split(command, comments=True)
        assert program == "trunkline"
        main([*arguments, "--config", "small.yaml"] if arguments[0] == "fit" else arguments)
    code = "\n".join([GIVEN, *(block for kind, block in BLOCKS if kind == "python"), CHECKED])
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("done\n"), done.stderr


def test_the_page_lists_every_family() -> None:
    """And no other."""
    page = (ROOT / "docs/reuse.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (transformers|timm|open_clip) \|$", page, re.M)
    listed = {(network, library, name) for network, names, library in rows for name in names.split(", ")}
    short = {"Vision Transformer of timm": {"`vit_*`", "`deit_*`", "`deit3_*`"}, "T5": {"T5", "mT5"}}
    short |= {"CLIP of open_clip": {"CLIP with Vision Transformers"}, "SigLIP of open_clip": {"SigLIP"}}
    known = set()
    for family in FOREIGN_FAMILIES:
        name = re.sub(r"^an? | of transformers$", "", family.name)
        name = re.sub(r"^(Roberta|DistilBert)For\w+$", "those of RoBERTa and DistilBERT", name)
        known |= {(family.network.__name__, family.origin, each) for each in short.get(name, {name})}
    assert listed == known
    assert len(page.splitlines()) <= 80
