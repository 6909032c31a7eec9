"""Somebody else's project on the built wheel: `tests/downstream`, whose own package is called `modules`.

It loads networks, trains them in a plain loop and in its own LightningModule, and subclasses nothing of ours.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from handed_out import checkpoint_of
from parity import assert_near, randomise
from timm.models import save_for_hf
from wheels import build_wheel, pip

import trunkline

PROJECT = Path(__file__).parent / "downstream"
ROOT = PROJECT.parents[1]

RUN = """
import inspect, runpy, sys
from contextlib import suppress
from pathlib import Path

site = Path(sys.argv[1])
sys.argv[:2] = [str(site / "bin/sort-tiles")]
with suppress(SystemExit):  # with which every console script ends
    runpy.run_path(sys.argv[0], run_name="__main__")
for top in ("trunkline", "modules"):
    own = [m for name, m in sys.modules.items() if name.partition(".")[0] == top]
    assert own and all(Path(m.__file__).is_relative_to(site / top) for m in own), own
classes = {c for m in own for _, c in inspect.getmembers(m, inspect.isclass) if c.__module__.startswith("modules.")}
assert "Sorter" in {c.__name__ for c in classes}
assert not [c for c in classes for base in c.__mro__ if base.__module__.startswith("trunkline")]
"""
"""Runs the project's command. Both packages must be the installed ones, each with its own files, and no class of the
project's may have a base of ours."""

BLOCK = """
import sys
import torch

def others():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names

class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed | sys.stdlib_module_names:
            asked.append(top)
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

def only_torch():
    \"\"\"From now on nothing can be imported but what torch has imported by itself.\"\"\"
    sys.meta_path.insert(0, Block())
    return others()

asked, ours = [], {"trunkline", "safetensors", "modules"}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both wheels are installed."""
    target = tmp_path_factory.mktemp("site")
    wheels = [build_wheel(project, tmp_path_factory.mktemp("wheel")) for project in (ROOT, PROJECT)]
    pip("install", "--target", str(target), *map(str, wheels))
    assert {f.name for f in target.iterdir() if f.suffix != ".dist-info"} == {"bin", "modules", "trunkline"}
    return target


@pytest.fixture(scope="module")
def python(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run code outside the checkout, where the installed wheels come first, and read the JSON that it prints."""
    empty = tmp_path_factory.mktemp("empty")

    def run(code: str, *arguments: object) -> Any:
        environ = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
        done = subprocess.run(command, cwd=empty, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not any(empty.iterdir())
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a training run: a Vision Transformer with three classes."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("run") / "best.ckpt"
    checkpoint_of("vit", file)
    return file


# --- the project


def test_plain_loop_and_probe(site: Path, python: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    """With torch and safetensors alone: everything else is blocked."""
    # An optimiser makes torch import more of its own.
    blocked = f"{BLOCK}\ntorch.optim.AdamW([torch.zeros(1)])\nallowed = only_torch() | ours\n"
    found = python(f"{blocked}{RUN}\nassert not asked, asked", site, checkpoint, tmp_path, "loop", "probe")
    loop = found["loop"]
    assert loop["before"] > 1.2
    assert loop["after"] < 0.5
    assert loop["reloaded"] == pytest.approx(loop["after"], rel=1e-5)
    assert found["probe"]["accuracy"] > 0.9

    network = trunkline.load(checkpoint)
    trained, before = trunkline.load(tmp_path / "loop").state_dict(), network.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, trained[name])}
    assert changed == {
        name
        for name in before
        if name.startswith("backbone.blocks.1.") or name in ("backbone.norm.weight", "backbone.norm.bias")
    }

    seen = torch.load(tmp_path / "probe/probe.pt", weights_only=True)
    with torch.no_grad():
        assert_near(seen["scores"], network(seen["pictures"]), 1e-6)
        _, (first, last) = network.forward_intermediates(seen["pictures"], indices=[0, 1], norm=True)
    assert_near(seen["states"], torch.cat((first.mean((2, 3)), last.mean((2, 3))), dim=1), 1e-6)
    assert seen["scores"].std() > 0.01


def test_its_own_lightning_module(site: Path, python: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    found = python(RUN, site, checkpoint, tmp_path, "lightning")["lightning"]
    assert found["before"] > 1.2
    assert found["after"] < 0.5
    assert found["reloaded"] == pytest.approx(found["after"], rel=1e-5)
    trained, before = trunkline.load(tmp_path / "lightning").state_dict(), trunkline.load(checkpoint).state_dict()
    same = {name for name, value in before.items() if torch.equal(value, trained[name])}
    assert same == {"head.weight", "head.bias"}  # the project has a head of its own


# --- what loading imports

LOAD = """
import json
from pathlib import Path

allowed = only_torch() | ours
before = others()
import trunkline
from trunkline.modules.networks import ViT
rows = torch.load(sys.argv[1], weights_only=True)
scores = {}
for source in sys.argv[2:]:
    network = trunkline.load(source)
    assert isinstance(network, ViT) and network.transform(rows[0]).shape == rows[0].shape
    scores[source] = network(rows).tolist()
told = {"more": sorted(others() - before), "asked": list(asked)}
for attempt in (lambda: trunkline.load("owner/name"), lambda: __import__("PIL"), lambda: __import__("timm.layers")):
    try:
        attempt()
    except ImportError as error:
        told[str(error)] = ""
    except trunkline.TrunklineError as error:
        told["hub"] = str(error)
print(json.dumps(told | {"blocked": asked, "scores": scores}))
"""


def foreign_folders(folder: Path) -> dict[str, Any]:
    """Tiny Vision Transformers of timm and transformers, as these libraries write them, with their models."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    of_timm = randomise(timm.create_model("vit_tiny_patch16_224", **sizes).eval())
    save_for_hf(of_timm, folder / "timm", {"input_size": (3, 16, 16), "crop_pct": 1.0}, model_args=sizes)
    widths = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    labels = {"id2label": dict(enumerate("abc"))}
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=8, **widths, **labels)
    )
    randomise(theirs.eval()).save_pretrained(folder / "transformers")
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(folder / "transformers")
    return {"timm": of_timm, "transformers": lambda rows: theirs(rows).logits}


def test_loading_imports_torch_and_safetensors(python: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    peers = foreign_folders(tmp_path)
    network = trunkline.load(checkpoint)
    network.save_pretrained(tmp_path / "own")
    rows = torch.randn(2, 3, 16, 16)
    torch.save(rows, tmp_path / "rows.pt")
    want = {str(checkpoint): network, str(tmp_path / "own"): network}
    want |= {str(tmp_path / name): model for name, model in peers.items()}
    told = python(BLOCK + LOAD, tmp_path / "rows.pt", *want)
    assert told["more"] == ["safetensors", "trunkline"]
    assert told["asked"] == []
    with torch.no_grad():
        for source, model in want.items():
            assert_near(torch.tensor(told["scores"][source]), model(rows))
    # What is blocked cannot be had.
    assert told["blocked"] == ["huggingface_hub", "PIL", "timm"]
    assert "blocked: huggingface_hub" in told["hub"]
    assert {"blocked: PIL", "blocked: timm"} <= told.keys()
