"""What a user installs, and what the README and the Makefile promise."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from wheels import build_wheel

from trunkline import datamodules
from trunkline.modules.training.muon import multiplies_bfloat16
from trunkline.pipelines.cli import FUNCTIONS, LISTINGS, POSITIONAL, PREPARATION, TRAINING, load_function, main
from trunkline.pipelines.objectives import import_class

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGES = {file: file.read_text(encoding="utf-8") for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
"""What a user reads."""


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_wheel(ROOT, tmp_path_factory.mktemp("wheel")))


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = ("modules", "datamodules", "pipelines", "configs")
    files = [f for name in folders for f in (ROOT / name).rglob("*") if f.suffix in (".py", ".yaml", ".sbatch")]
    want = {f"trunkline/{file.relative_to(ROOT).as_posix()}" for file in files}
    own = ("base_weights", "compilers", "contract", "files", "names", "parts", "ranges", "run_folders", "seal")
    shared = {f"trunkline/{name}" for name in ("__init__.py", "py.typed", *(f"{name}.py" for name in own))}
    want |= shared
    assert {"trunkline/modules/backbone/transformer.py", "trunkline/configs/vit/digits.yaml"} < want
    assert "trunkline/configs/slurm/train.sbatch" in want
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == want
    for name in want - shared:
        assert wheel.read(name) == (ROOT / name.removeprefix("trunkline/")).read_bytes()


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    content = {
        name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in wheel.namelist() if "info" in name
    }
    assert content["entry_points.txt"].split() == [
        "[console_scripts]",
        "trunkline",
        "=",
        "trunkline.pipelines.cli:main",
    ]
    assert content["top_level.txt"].split() == ["trunkline"]
    assert content["licenses/LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "\nRequires-Python: >=3.11\n" in content["METADATA"]


@pytest.fixture(scope="module")
def python(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run `python ARGUMENTS` in an empty folder, where only the wheel's content can be imported as trunkline."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    wheel.extractall(site)
    guard = f"""
import sys
class Guard:  # before the finder of an editable installation
    def find_spec(self, name, path=None, target=None):
        from importlib.machinery import PathFinder
        if name.partition(".")[0] == "trunkline":
            return PathFinder.find_spec(name, path or [{str(site)!r}])
sys.meta_path.insert(0, Guard())
"""
    (site / "sitecustomize.py").write_text(guard)

    def run(*arguments: str) -> str:
        environ = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=empty, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not any(empty.iterdir())
        return done.stdout.replace(str(site), "SITE")

    return run


def test_installed_networks(python: Callable[..., str]) -> None:
    code = """
import importlib.util, sys, trunkline.modules.networks
print({m.__file__.partition("/trunkline/")[0] for n, m in sys.modules.items() if n.partition(".")[0] == "trunkline"})
print([importlib.util.find_spec(name) for name in ("modules", "datamodules", "pipelines", "configs")])
"""
    assert python("-c", code).splitlines() == ["{'SITE'}", "[None, None, None, None]"]


def test_installed_command(python: Callable[..., str]) -> None:
    printed = python("-m", "trunkline.pipelines.cli", "fit", "--config", "vit/digits", "--print_config")
    assert "class_path: trunkline.modules.objectives.image_classifier.ImageClassifier" in printed
    assert re.search(r"^    source: digits$", printed, re.M)
    assert "trunkline.modules.callbacks.Throughput" in printed  # of defaults.yaml


# --- the Makefile, the README and the pages in docs/


def make_targets() -> dict[str, str]:
    """Target -> its line of help."""
    return dict(re.findall(r"^([\w-]+):.*?## (.+)$", MAKEFILE, re.M))


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "-C", ROOT, "--no-print-directory"], capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^  make (\S+) +(.+)$", done.stdout, re.M))
    assert listed == make_targets()
    assert listed.keys() == set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1].split())  # type: ignore[index]
    assert len(done.stdout.splitlines()) == len(listed)


def commands(program: str) -> list[list[str]]:
    """Arguments of the commands of a program in the pages' shell blocks and inline code."""
    blocks = [block for text in PAGES.values() for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)]
    spans = [span for text in PAGES.values() for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans
    words = [shlex.split(line, comments=True) for line in lines if line.split()[:1] == [program]]
    return [w[1:] for w in words if w[1:]]


WRITTEN = {
    "train-vit": "fit --config vit/digits",
    "train-gpt": "fit --config gpt/demo",
    "train-bert": "fit --config bert/demo",
    "train-clip": "fit --config clip/emoji $(PRECISION)",
    "train-translate": "fit --config seq2seq/dates $(PRECISION)",
    "train-audio": "fit --config audio/digits",
    "benchmark": "benchmark",
}


def test_make_commands_of_the_pages() -> None:
    found = commands("make")
    assert {
        "train-vit",
        "train-gpt",
        "train-bert",
        "finetune-bert",
        "train-clip",
        "train-translate",
        "train-audio",
        "test",
    } <= {target for target, *_ in found}
    assert {"help", "tensorboard", "slurm", "test-cluster"} <= {target for target, *_ in found}
    for target, *options in found:
        assert target in make_targets()
        settings = {option.partition("=")[0] for option in options}
        assert settings <= {"ARGS", *(("CONFIG", "NODES", "GPUS", "SBATCH") if target == "slurm" else ())}
    run = {target: re.search(rf"^{target}:.*\n\t(.+)", MAKEFILE, re.M)[1] for target in WRITTEN}  # type: ignore[index]
    assert run == {target: f"$(BIN)/trunkline {command} $(ARGS)" for target, command in WRITTEN.items()}


def test_settings_of_torchrun() -> None:
    """They are those with which `make test-cluster` sees a run recover."""
    short, whole = (c[: c.index("--no-python")] for c in commands("torchrun"))
    assert set(short) < set(whole)
    text = (ROOT / "tests/slurm/two_hosts.py").read_text(encoding="utf-8")
    for option in whole:
        name, _, value = option.partition("=")
        assert name in text
        fixed = value.rpartition(",")[2] if name == "--rdzv-conf" else value
        assert value in ("8", "JOB", "HOST:29500", "ADDRESS") or fixed in text
    page = PAGES[ROOT / "docs/cluster.md"]
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in page
    assert '"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"' in text


def test_precision_of_make() -> None:
    """What `$(PRECISION)` prints is empty or a flag of `trunkline fit`."""
    code = re.search(r"^PRECISION = .* -c '(.+)'\)$", MAKEFILE, re.M)[1]  # type: ignore[index]
    imported = re.search(r"^BFLOAT16 = (.+)", MAKEFILE, re.M)[1]  # type: ignore[index]
    program = code.replace("$(BFLOAT16)", imported)
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    native = multiplies_bfloat16(torch.device("cpu"))
    assert printed.split() == ([] if native else ["--trainer.precision", "32-true"])


def test_make_slurm() -> None:
    """One task for each GPU; the recipe and the flags of `fit` after the script."""

    def printed(*settings: str) -> list[str]:
        command = ["make", "-C", str(ROOT), "--no-print-directory", "-n", "slurm", "READY=", "BIN=/venv/bin", *settings]
        # Without what `make test ARGS=…` hands down.
        environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        return shlex.split(done.stdout)

    start, script = ["TRUNKLINE=/venv/bin/trunkline", "sbatch"], "configs/slurm/train.sbatch"
    options = ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1-0"]
    given = printed("CONFIG=vit/digits", "NODES=2", "GPUS=4", "SBATCH=--time=1-0", "ARGS=--trainer.max_steps 5")
    assert given == [*start, *options, script, "vit/digits", "--trainer.max_steps", "5"]
    assert printed("CONFIG=gpt/demo", "GPUS=0") == [*start, "--nodes=1", "--ntasks-per-node=1", script, "gpt/demo"]
    assert (ROOT / script).is_file()


def commands_of_jobs() -> list[list[str]]:
    """`fit` as `make slurm`, `sbatch` and `torchrun` start it in the pages."""
    found = [c[c.index("--no-python") + 2 :] for c in commands("torchrun")]
    for target, *settings in commands("make"):
        values = {name: value for name, _, value in (setting.partition("=") for setting in settings)}
        if target == "slurm" and "CONFIG" in values:
            found.append([values["CONFIG"], *shlex.split(values.get("ARGS", ""))])
    found += [c[c.index("train.sbatch") + 1 :] for c in commands("sbatch") if "train.sbatch" in c]
    return [c if c[0] == "fit" else ["fit", "--config", c[0], "--config", "trainer/slurm", *c[1:]] for c in found]


def training_commands() -> list[str]:
    """`prepare` and `check` take the configs and flags of `fit`."""
    written = [["fit", *c[1:]] if c[0] in PREPARATION else c for c in commands("trunkline")]
    written += commands_of_jobs()
    written = [c for c in written if c[0] in TRAINING and "--help" not in c]
    options = [shlex.split(c[1].removeprefix("ARGS=")) for c in commands("make") if c[0] == "train-vit" and c[1:]]
    return sorted({shlex.join(c) for c in [*written, *(["fit", "--config", "vit/digits", *o] for o in options)]})


@pytest.mark.parametrize("command", training_commands())
def test_training_commands_of_the_pages(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Configs, flags and values are known: jsonargparse takes all of them before it prints."""
    arguments = shlex.split(command)
    if "--config" not in arguments:  # that of the checkpoint's run, which is not there
        arguments[1:1] = ["--config", "vit/digits"]
    if "mine.yaml" in arguments:  # the reader's own
        for suffix in ("py", "yaml"):
            text = (ROOT / f"tests/support/own_task.{suffix}").read_text(encoding="utf-8")
            (tmp_path / f"mine.{suffix}").write_text(text.replace("own_task.", "mine."))
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trunkline"])
    with pytest.raises(SystemExit) as end:
        main([*arguments, *(["--print_config"] if "--print_config" not in arguments else [])])
    assert end.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    for flag, value in re.findall(r"--([\w.]+)[ =](\S+)", command):
        if flag != "config":
            found = printed
            for key in flag.split("."):
                found = found[key] if key in found else found["init_args"][key]
            given = yaml.safe_load(shlex.split(value)[0])
            assert found == given or str(found) == value or float(found) == float(value)  # YAML takes 1e-3 for a text
    assert {path for path in tmp_path.iterdir() if path.name != "__pycache__"} == before


def test_other_commands_of_the_pages() -> None:
    found = [c for c in commands("trunkline") if c[0] not in (*TRAINING, *PREPARATION)]
    assert all(c[1:] == [] for c in found if c[0] in LISTINGS)
    found = [c for c in found if c[0] not in LISTINGS]
    assert {"predict", "generate", "fill-mask", "embed", "evaluate", "search", "transcribe", "draw"} <= {
        c[0] for c in found
    }
    for name, *options in found:
        if name in POSITIONAL and not options[0].startswith("-"):
            options.insert(0, POSITIONAL[name])
        known = dict(inspect.signature(load_function(FUNCTIONS[name])).parameters)
        completion = FUNCTIONS[name].completion
        if completion:
            options = import_class(f"trunkline.pipelines.{completion}")(options)
            data = vars(datamodules)[options[options.index("--data") + 1]]
            known |= {f"data.{field}": parameter for field, parameter in inspect.signature(data).parameters.items()}
        flags = [word.removeprefix("--").partition("=")[0] for word in options if word.startswith("--")]
        assert set(flags) <= known.keys()
        needed = {key for key, parameter in known.items() if parameter.default is parameter.empty}
        assert needed <= set(flags)


def test_flags_named_in_the_pages() -> None:
    from trunkline.modules.objectives.base import TrunklineModule
    from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText

    named = [name for text in PAGES.values() for name in re.findall(r"`--model\.(\w+) [A-Z_]+`", text)]
    known = {name for c in (TrunklineModule, ContrastiveImageText) for name in inspect.signature(c).parameters}
    assert {"init_from", "freeze_blocks", "init_image_from", "init_text_from"} <= set(named) <= known


def test_files_named_in_the_pages() -> None:
    for file, text in PAGES.items():
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        assert links or file.parent != ROOT
        assert [link for link in links if not (file.parent / link).exists()] == []
