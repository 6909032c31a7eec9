"""What is the fault of a compiler, or of the machine around it, and what is the network's own; with real errors."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trunkline.compilers import compiler_failure, raised_in_a_compiler
from trunkline.pipelines.errors import from_outside


def error_of(call: Callable[[], Any]) -> Exception:
    """The error that a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


def compile_error(forward: Callable[[Tensor], Tensor], folder: Path, cxx: str = "false") -> Exception:
    """That of a compiled network, with another C++ compiler and nothing in the cache."""
    network = nn.Module()
    network.forward = forward  # type: ignore[method-assign]
    torch._dynamo.reset()
    from torch._inductor import config  # takes seconds

    with pytest.MonkeyPatch.context() as patch, config.patch({"cpp.cxx": (None, cxx)}):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        return error_of(lambda: torch.compile(network)(torch.ones(2, 4)))


def broken_compiler(folder: Path, said: str) -> str:
    """A g++ that tells its version and compiles nothing."""
    program = folder / "g++"
    version = 'case "$*" in *--version*) echo "g++ (GCC) 12.2.0"; exit;; esac'
    program.write_text(f"#!/bin/sh\n{version}\ncat >&2 <<EOF\n{said}\nEOF\nexit 1\n")
    program.chmod(0o755)
    return str(program)


MISSING_HEADER = """\
In file included from main.cpp:3:
main.cpp:1:10: fatal error: Python.h: No such file or directory
    1 | #include <Python.h>
      |          ^~~~~~~~~~
compilation terminated."""


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    error = compile_error(lambda x: x.sin(), tmp_path / "cache", broken_compiler(tmp_path, MISSING_HEADER))
    assert type(error).__name__ == "InductorError"
    assert compiler_failure(error) == "main.cpp:1:10: fatal error: Python.h: No such file or directory"
    found = from_outside(error)
    assert found is not None
    assert found.field == "compile"
    for words in ("Python.h: No such", "python3-dev", "TORCHINDUCTOR_CACHE_DIR", "set compile to false"):
        assert words in str(found)


def test_a_program_that_is_no_compiler(tmp_path: Path) -> None:
    assert "No working C++ compiler" in str(compiler_failure(compile_error(lambda x: x.sin(), tmp_path / "cache")))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = compile_error(lambda x: x.sin(), tmp_path / "file" / "cache")
    assert isinstance(error, OSError)
    assert str(tmp_path / "file") in str(compiler_failure(error))


def refused(x: Tensor) -> Tensor:
    if x.shape[0] == 2:
        raise OSError("the network's own")
    return x


@pytest.mark.parametrize(
    "forward",
    [refused, lambda x: x.sin() @ torch.ones(7, 7), lambda x: x + len(Path("/nowhere/at/all").read_bytes())],
    ids=["it raises", "shapes", "a file of its own"],
)
def test_an_error_of_the_network(forward: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    error = compile_error(forward, tmp_path / "cache")
    assert type(error).__name__ in ("OSError", "TorchRuntimeError", "FileNotFoundError", "Unsupported")
    assert compiler_failure(error) is None


def called_from(module: str, call: Callable[[], Any]) -> Exception:
    """The error of a call from code of another module."""
    scope: dict[str, Any] = {"__name__": module}
    exec("def run(call):\n    call()", scope)
    return error_of(lambda: scope["run"](call))


def test_who_called_the_standard_library() -> None:
    """Compiled code is PyTorch's, but may call an operator of the network's own."""
    failing: Callable[[], Any] = subprocess.CompletedProcess(["gcc"], 1).check_returncode  # of the standard library
    error = called_from("triton.runtime.build", failing)
    assert raised_in_a_compiler(error)
    assert compiler_failure(error) == "Command '['gcc']' returned non-zero exit status 1."
    assert compiler_failure(called_from("tritonic", failing)) is None
    assert compiler_failure(called_from("torch._inductor.output_code", lambda: failing())) is None
    assert compiler_failure(OSError("never raised")) is None


class SubprocException(Exception):
    """As PyTorch's, which a worker of its compiler raises."""


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (
            f"subprocess.CalledProcessError: Command '['gcc', '{'x' * 900}']' returned non-zero exit status 1.",
            "exit st",
        ),
        ("PermissionError: [Errno 13] Permission denied: '/home/me/.triton'", "/home/me/.triton"),
        ("triton.compiler.errors.CompilationError: at 5:4: name 'y' is not defined", None),
    ],
)
def test_a_worker_of_the_compiler(last: str, expected: str | None) -> None:
    """A Triton kernel that does not compile is the network's own."""
    error = SubprocException(f"An exception occurred in a subprocess:\n\nName=k\nTraceback:\n  File a.py\n{last}\n")
    found = compiler_failure(error)
    assert (found is None) == (expected is None)
    assert expected is None or (expected in str(found) and len(str(found)) < 300)
