"""The floors of the house: who imports whom, and what importing costs."""

import ast
import re
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


LIBRARIES = {
    *sys.stdlib_module_names,
    "torch",
    "safetensors",
    "huggingface_hub",
    "trunkline.TrunklineError",
    "trunkline.__version__",
    "trunkline.ranges",
}
FLOOR_1 = LIBRARIES | {
    f"trunkline.{name}" for name in ("modules.attention_kernels", "modules.backbone", "names", "ranges")
}
FLOOR_2 = FLOOR_1 | {
    f"trunkline.{name}" for name in ("contract", "files", "run_folders", "modules.networks", "modules.generation")
}
FLOOR_2 |= {"trunkline.compilers", "trunkline.modules.chunked_cross_entropy", "trunkline.modules.training.distributed"}
FLOOR_2.add("trunkline.modules.training.muon")
PURE = (
    "modules/networks",
    "modules/generation",
    "modules/losses.py",
    "modules/chunked_cross_entropy.py",
    "modules/training/distributed.py",
    "modules/training/muon.py",
    "modules/training/optim.py",
)
MEASURES = FLOOR_2 | {"torchmetrics", "sacrebleu", "numpy", "sklearn", "trunkline.modules.metrics"}


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("modules/attention_kernels.py", LIBRARIES),
        ("modules/backbone", FLOOR_1),
        *((place, FLOOR_2) for place in PURE),
        ("modules/metrics", MEASURES),
    ],
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


# --- the graph of all imports


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "trunkline" else ("trunkline", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Every module of the package, and those of the package that it imports, inside functions too."""
    folders = ("trunkline", "modules", "datamodules", "pipelines")
    # `trunkline/*.py` alone: its folders are links to the others
    files = [f for folder in folders for f in (ROOT / folder).glob("*.py" if folder == "trunkline" else "**/*.py")]
    modules = {module_name(file): file for file in files}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        found = [imported for imported in imports(file) if f"{imported}.".startswith("trunkline.")]
        graph[name] = {part if part in modules else part.rpartition(".")[0] for part in found} - {"trunkline"}
        assert graph[name] <= modules.keys(), f"{name} imports what is not there"
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path through the graph that ends where it begins; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for child in sorted(graph[node]):
            found = visit(child, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circle_of_imports() -> None:
    graph = import_graph()
    assert "trunkline.pipelines.training" in graph["trunkline.pipelines.cli"]  # which it imports in a function
    assert len(graph) > 80
    assert circle(graph) == []


FLOORS = {
    "trunkline": 0,
    "trunkline.modules.attention_kernels": 1,
    "trunkline.modules.backbone": 1,
    "trunkline.modules.networks": 2,
    "trunkline.modules.generation": 2,
    "trunkline.modules.metrics": 2,
    "trunkline.modules.losses": 2,
    "trunkline.modules.chunked_cross_entropy": 2,
    "trunkline.modules": 3,
    "trunkline.datamodules": 3,
    "trunkline.pipelines": 4,
}
"""Module or folder -> its floor; a module that is not listed has the floor of its nearest listed folder."""


def floor(module: str) -> int:
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def test_no_import_up_a_floor() -> None:
    graph = import_graph()
    assert {floor(module) for module in graph} == set(range(5))
    up = [(module, other) for module, others in graph.items() for other in others if floor(other) > floor(module)]
    assert up == []


def test_what_commands_share_knows_no_command() -> None:
    graph = import_graph()
    rooms = tuple(f"trunkline.pipelines.{room}." for room in ("commands", "evaluation", "benchmarks"))
    shared = [name for name in graph if name.startswith("trunkline.pipelines.") and not name.startswith(rooms)]
    known = {(name, other) for name in shared for other in graph[name] if other.startswith(rooms)}
    assert known == {("trunkline.pipelines.cli", "trunkline.pipelines.commands.prepare")}


COMMANDS = sorted(module_name(file) for file in (ROOT / "pipelines/commands").glob("*.py"))


def test_importing_a_command_imports_no_objective() -> None:
    """Nor do the other functions of the command line: a checkpoint's own is imported when it is read."""
    code = """
import sys
from importlib import import_module
from trunkline.pipelines.cli import FUNCTIONS, load_function
from trunkline.pipelines.objectives import KINDS

before = {kind.objective.rpartition(".")[0] for kind in KINDS.values()}
for name in sys.argv[1:]:
    import_module(name)
for function in FUNCTIONS.values():
    load_function(function)
print(*before & set(sys.modules), len(before))
"""
    assert "trunkline.pipelines.commands.generate" in COMMANDS
    assert python(code, *COMMANDS).split() == ["11"]


# --- flags

FLAG = re.compile(r"(?<![\w-])--[a-z]")


def flags_in(code: str) -> list[str]:
    """The strings of a program that contain a flag: messages, docstrings, and the fixed parts of f-strings."""
    nodes = (node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant))
    return [value for value in nodes if isinstance(value, str) and FLAG.search(value)]


def test_a_flag_is_found() -> None:
    code = 'def f(x):\n    """Give --data.source."""\n    raise ValueError(f"{x}: give --model", "a--b", "-- a")'
    assert flags_in(code) == ["Give --data.source.", ": give --model"]


def test_only_pipelines_know_flags() -> None:
    """Elsewhere a message names its field, and whoever calls from Python reads nothing of a command line."""
    folders = ("trunkline", "modules", "datamodules")
    files = [f for folder in folders for f in (ROOT / folder).glob("*.py" if folder == "trunkline" else "**/*.py")]
    assert len(files) > 60
    found = {str(f.relative_to(ROOT)): flags_in(f.read_text(encoding="utf-8")) for f in files}
    assert {file: flags for file, flags in found.items() if flags} == {}
    assert flags_in((ROOT / "pipelines/errors.py").read_text(encoding="utf-8"))


# --- names


def public_names(file: Path) -> Iterator[str]:
    """Classes, functions and variables that a file defines at its top level."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if name and not name.startswith("_"))


def test_no_two_files_define_the_same_name() -> None:
    places: dict[str, list[str]] = {}
    folders = ("trunkline", "modules", "datamodules", "pipelines")
    for file in (f for folder in folders for f in (ROOT / folder).glob("*.py" if folder == "trunkline" else "**/*.py")):
        for name in set(public_names(file)):
            places.setdefault(name, []).append(str(file.relative_to(ROOT)))
    assert len(places) > 300
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


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
