"""The floors of the house: who imports whom, and what importing costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(file: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def strangers(folder: str, allowed: set[str]) -> list[str]:
    """Imports of the files in `folder` (or of that file) that begin with no allowed name."""
    files = [ROOT / folder] if folder.endswith(".py") else sorted((ROOT / folder).rglob("*.py"))
    assert files
    names = {(str(file.relative_to(ROOT)), name) for file in files for name in imports(file)}
    prefixes = tuple(f"{name}." for name in allowed)
    return [f"{file}: {name}" for file, name in sorted(names) if not f"{name}.".startswith(prefixes)]


LIBRARIES = {*sys.stdlib_module_names, "torch", "safetensors", "huggingface_hub", "trunkline.TrunklineError"}
FLOOR_1 = LIBRARIES | {"trunkline.modules.backbone"}
FLOOR_2 = FLOOR_1 | {"trunkline.modules.networks", "trunkline.modules.generation"}
PURE = ("modules/networks", "modules/generation", "modules/losses.py", "modules/training/optim.py")


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("modules/backbone", FLOOR_1), *((place, FLOOR_2) for place in PURE)],
)
def test_floors_below_lightning(folder: str, allowed: set[str]) -> None:
    assert strangers(folder, allowed) == []


@pytest.mark.parametrize(
    ("wing", "forbidden"),
    [("modules", ("datamodules", "pipelines")), ("datamodules", ("modules", "pipelines"))],
)
def test_wings_do_not_meet(wing: str, forbidden: tuple[str, ...]) -> None:
    paths = tuple(prefix + name for name in forbidden for prefix in ("", "trunkline."))
    names = [(file.name, name) for file in (ROOT / wing).rglob("*.py") for name in imports(file)]
    assert names
    assert [entry for entry in names if f"{entry[1]}.".startswith(tuple(f"{path}." for path in paths))] == []


def test_the_trunk_stays_small() -> None:
    lines = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "modules/backbone").rglob("*.py")}
    assert lines["transformer.py"] < 400
    assert sum(lines.values()) < 800


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_is_light() -> None:
    """Nothing is imported that torch has not, so that there is nothing to take time, on whatever machine."""
    code = """
import sys
import torch
before = set(sys.modules)
import trunkline.modules.backbone, trunkline.modules.networks
print(*{name.partition(".")[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names)
"""
    assert python(code).split() == ["trunkline"]


def test_networks_need_only_torch_and_safetensors(tmp_path: Path) -> None:
    code = """
import sys

ALLOWED = sys.stdlib_module_names | {"torch", "safetensors", "trunkline"} | {
    "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "numpy", "packaging", "sympy",
    "torchgen", "triton", "typing_extensions"}  # which torch itself imports

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from trunkline.modules.networks import ViT, ViTConfig
from trunkline.modules.backbone import TransformerConfig

network = ViT(ViTConfig(image_size=8, patch_size=4, num_classes=3, backbone=TransformerConfig(16, 1, 2)))
torch.nn.init.normal_(network.head.weight)
network.save_pretrained(sys.argv[1])
image = torch.randn(1, 3, 8, 8)
print(torch.equal(ViT.from_pretrained(sys.argv[1])(image), network(image)))
try:
    import timm
except ModuleNotFoundError as error:
    print(error)
"""
    assert python(code, tmp_path).splitlines() == ["True", "blocked: timm"]
