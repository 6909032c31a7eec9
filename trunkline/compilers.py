"""Tells a compiler that torch.compile called in vain from everything else that goes wrong in a compiled network."""

import re
import sys
from subprocess import CalledProcessError

FAILURES = {"CppCompileError", "InvalidCxxCompiler", "TritonMissing"}
"""Exceptions of PyTorch's compiler; by name, because it is imported with the first compilation."""
COMPILERS = ("torch._inductor", "triton")
PROGRAM_FAILED = re.compile(r"CalledProcessError|\[Errno \d+\]")
REMEDIES = (
    "install a C++ compiler and the headers of Python (g++ and python3-dev), let TORCHINDUCTOR_CACHE_DIR name a folder "
    "that can be written, or"
)
"""What may help, if nothing more is known; what follows is how to do without compiling."""


def compiler_failure(error: BaseException) -> str | None:
    """Why a program that torch.compile called failed, or which file it could not write; None for any other error.

    An error of the network itself, also of a Triton kernel in it, is another one, wherever it is raised.
    """
    inner = getattr(error, "inner_exception", error)
    names = {kind.__name__ for kind in type(inner).__mro__}
    text = str(inner).partition("\n\nSet TORCHDYNAMO_VERBOSE")[0].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    failed = isinstance(inner, OSError | CalledProcessError) and raised_in_a_compiler(inner)
    if "SubprocException" in names:  # of a worker, with its traceback; its program wrote to the terminal
        failed = bool(PROGRAM_FAILED.search(lines[-1]))
    if not failed and not names & FAILURES:
        return None
    # After what is wrong, compilers show where, and how many such errors there were.
    reason = next((line for line in lines if re.search(r"\berror: ", line)), lines[-1])
    return reason if len(reason) < 300 else f"{reason[:100]} … {reason[-150:]}"


def raised_in_a_compiler(error: BaseException) -> bool:
    """Whether the code that raised it, or that called the standard library, belongs to PyTorch's compilers."""
    modules, trace = [], error.__traceback__
    while trace is not None:
        modules.append(str(trace.tb_frame.f_globals.get("__name__")))
        trace = trace.tb_next
    own = [module for module in modules if module.partition(".")[0] not in sys.stdlib_module_names]
    return bool(own) and f"{own[-1]}.".startswith(tuple(f"{package}." for package in COMPILERS))
