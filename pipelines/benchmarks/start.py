"""How long a user waits for the first line, a help page, the merged config, a first step, and the end of a command."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ONE_STEP = "--trainer.max_steps 1 --trainer.limit_val_batches 0 --test_with none --data.num_workers 0"
COMMANDS = {
    "fit --help": "fit --help",
    "generate --help": "generate --help",
    "fit --print_config": "fit --config vit/digits --print_config",
    "a first step (vit/digits)": f"fit --config vit/digits {ONE_STEP}",
}


class Wait(NamedTuple):
    """Seconds that a command takes."""

    first: float
    """Until it prints anything."""
    whole: float
    """Until its process has ended."""
    end: float
    """From its last line on."""


def wait_for(command: list[str], folder: str) -> Wait:
    """Run a command, and time what it prints.

    Raises:
        RuntimeError: if it fails.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder) as process:
        assert process.stdout is not None
        times, text = [], b""
        while part := os.read(process.stdout.fileno(), 1 << 16):
            times.append(time.perf_counter() - start)
            text += part
    whole = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {text.decode(errors='replace')}")
    return Wait(times[0] if times else whole, whole, whole - times[-1] if times else 0.0)


def start_times(rounds: int) -> list[dict[str, object]]:
    """Medians for each of `COMMANDS`, and the ratio of its whole time to that of `import torch` just before it."""
    trunkline = [sys.executable, "-m", "trunkline.pipelines.cli"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, command in COMMANDS.items():
            waits, ratios = [], []
            for turn in range(rounds + 1):
                torch = wait_for([sys.executable, "-c", "import torch"], folder).whole
                wait = wait_for([*trunkline, *command.split()], folder)
                if turn:  # the first round fills the caches of the disk
                    waits.append(wait)
                    ratios.append(wait.whole / torch)
            medians = Wait(*(statistics.median(values) for values in zip(*waits, strict=True)))
            rows.append({"command": name, **medians._asdict(), "ratio": statistics.median(ratios)})
    return rows
