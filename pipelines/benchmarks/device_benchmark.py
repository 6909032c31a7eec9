"""`trunkline benchmark --device`: what a GPU makes of a training step and of generation, within a number of minutes."""

import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from trunkline import TrunklineError, __version__
from trunkline.compilers import compiler_failure
from trunkline.files import write_json
from trunkline.modules.training.peak_speed import peak_speed
from trunkline.pipelines.benchmarks.device_cases import TINY, Bench, DeviceCase, Prepared, Sizes, Turn, device_cases
from trunkline.pipelines.benchmarks.timing import seconds_a_step
from trunkline.pipelines.device_limits import check_compiler, check_precision, in_gib
from trunkline.pipelines.devices import find_device

WARM_UP = 3
"""Steps of each side before it is measured: the first compiles, the second may record or allocate."""
WINDOW, MOST_STEPS = 0.5, 50
"""About how many seconds a measurement takes, and the most steps in it."""
COMPARED_LIBRARIES = ("torch", "triton", "lightning", "transformers", "timm", "open-clip-torch")


class OutOfTime(Exception):
    """No round of a case could be measured in time."""


class Budget:
    """The time that is left.

    Args:
        minutes: from now; None is without end.
        clock: seconds.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.end = float("inf") if minutes is None else clock() + 60 * minutes

    def left(self) -> float:
        """Seconds, negative after the end."""
        return self.end - self.clock()


def measure_device(
    what: str,
    rounds: int,
    batch_size: int | None,
    output: str | None,
    device: str,
    minutes: float | None,
    sizes: Sizes | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure the cases one after the other and write the results after each, so that an interruption loses none.

    On a CPU the networks are tiny and not compiled: that shows that the command works, and says nothing about speed.

    Args:
        what: `all`, or the name of some cases.
        rounds: measurements of each side.
        batch_size: instead of the cases' own.
        output: a JSON file; None is `benchmark_<kind of device>.json` in the current folder.
        device: its name.
        minutes: when to stop; what comes later is left out.
        sizes: of the networks; None chooses them for the device.
        clock: seconds.

    Returns:
        what the file holds.

    Raises:
        TrunklineError: if the device cannot be used or lacks bfloat16, if there is no compiler or no such case, or if
            no case could be measured.
    """
    place, budget = find_device(device), Budget(minutes, clock)
    compiled = place.type != "cpu"
    sizes = sizes or (Sizes() if compiled else TINY)
    check_precision("bf16-mixed", place)
    if compiled:
        check_compiler(place)
    cases = chosen_cases(what, sizes)
    file = Path(output or f"benchmark_{place.type}.json")
    results = {**describe(place, sizes, compiled), "minutes": minutes, "cases": [], "left_out": []}
    longest = 0.0
    for case in cases:
        started = clock()
        if budget.left() <= longest:  # preparing it, above all compiling, takes as long as that of another
            row: dict[str, Any] | str = "there was no time left"
        else:
            bench = Bench(sizes, batch_size or case.batch_size, place, compiled)
            row = halving(case, bench, rounds, budget, results["peak_flops"])
        if isinstance(row, str):
            results["left_out"].append({"case": case.name, "reason": row})
        else:
            results["cases"].append(row)
            longest = max(longest, row["preparation_seconds"])
        results["seconds"] = results.get("seconds", 0.0) + clock() - started
        write_json(file, results)
    show_device(results)
    print(f"written to {file}")
    if not results["cases"]:
        raise TrunklineError(f"no case could be measured: {results['left_out'][0]['reason']}")
    return results


def chosen_cases(what: str, sizes: Sizes) -> list[DeviceCase]:
    """The cases of `--what`.

    Raises:
        TrunklineError: if there are none.
    """
    cases = list(device_cases(sizes))
    chosen = [case for case in cases if what in ("all", case.what)]
    if not chosen:
        names = ", ".join(dict.fromkeys(case.what for case in cases))
        raise TrunklineError(f"--what {what} does not go with --device, which measures {names}")
    return chosen


def describe(device: torch.device, sizes: Sizes, compiled: bool) -> dict[str, Any]:
    """Device, versions and settings."""
    versions = {"python": python_version(), "trunkline": __version__, "cuda": torch.version.cuda}
    for name in COMPARED_LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "peak_flops": peak_speed(device, torch.bfloat16),
        "versions": versions,
        "command": shlex.join(["trunkline", *sys.argv[1:]]),
        "precision": "bf16",
        "compiled": compiled,
        "rehearsal": sizes == TINY,
    }


def halving(
    case: DeviceCase, bench: Bench, rounds: int, budget: Budget, peak_flops: float | None
) -> dict[str, Any] | str:
    """Measure a case, with half the batch on both sides as often as the memory is too small; or why that failed."""
    asked = bench.batch_size
    while True:
        try:
            return measure_case(case, bench, rounds, budget, peak_flops) | {"asked_batch_size": asked}
        except torch.OutOfMemoryError:
            pass  # what the traceback holds is freed when this block ends
        except TrunklineError as error:  # a peer that is not installed
            return str(error)
        except OutOfTime:
            return "the time ran out while it was prepared"
        except Exception as error:  # of a peer or a compiler: one case is not worth the others
            failure = compiler_failure(error) or str(error).strip().partition("\n")[0]
            return f"{type(error).__name__}: {failure}"
        finally:
            free_memory(bench.device)
        if bench.batch_size // 2 < case.least:
            return f"not enough memory for a batch of {bench.batch_size}"
        bench = bench._replace(batch_size=bench.batch_size // 2)


def free_memory(device: torch.device) -> None:
    """Forget compiled code, and the networks that it holds, and give back what the allocator keeps."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_case(
    case: DeviceCase, bench: Bench, rounds: int, budget: Budget, peak_flops: float | None
) -> dict[str, Any]:
    """Measure both sides in turn, until the rounds are done or the time is over.

    Raises:
        OutOfTime: before the end of the first round.
    """
    start = budget.clock()
    torch.manual_seed(0)
    ours, flops, our_memory = warmed_up(lambda: case.ours(bench), bench.device)
    theirs, their_flops, their_memory = warmed_up(lambda: case.theirs(bench), bench.device)
    steps = {side: window_steps(seconds_a_step(side, 1, bench.device)) for side in (ours, theirs)}
    preparation, pairs, longest = budget.clock() - start, [], 0.0
    for turn in range(rounds):
        began = budget.clock()
        if budget.left() <= longest:
            break
        order = (theirs, ours) if turn % 2 else (ours, theirs)
        seconds = {side: seconds_a_step(side, steps[side], bench.device) for side in order}
        pairs.append((seconds[ours], seconds[theirs]))
        longest = max(longest, budget.clock() - began)
    if not pairs:
        raise OutOfTime
    units = bench.batch_size * case.units
    ratios = sorted(b / a for a, b in pairs)
    times = [statistics.median(side) for side in zip(*pairs, strict=True)]
    computed = flops, their_flops
    mfu = [count / s / peak_flops if count and peak_flops else None for count, s in zip(computed, times, strict=True)]
    return {
        "case": case.name,
        "peer": case.peer,
        "unit": case.unit,
        "batch_size": bench.batch_size,
        "per_second": units / times[0],
        "peer_per_second": units / times[1],
        "ratio": statistics.median(ratios),
        "range": (ratios[0], ratios[-1]),
        "rounds": len(pairs),
        "steps": (steps[ours], steps[theirs]),
        "flops_per_step": flops or None,
        "peer_flops_per_step": their_flops or None,
        "mfu": mfu[0],
        "peer_mfu": mfu[1],
        "peak_memory_bytes": our_memory,
        "peer_peak_memory_bytes": their_memory,
        "preparation_seconds": preparation,
    }


def window_steps(seconds: float) -> int:
    """How many steps of this length are measured at once."""
    return min(max(round(WINDOW / max(seconds, 1e-9)), 1), MOST_STEPS)


def warmed_up(make: Callable[[], Prepared], device: torch.device) -> tuple[Turn, int, int | None]:
    """A side after its first steps, and the most memory in bytes that it took at a time; None where that is unknown."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)  # of the other side
    step, flops = make()
    for _ in range(WARM_UP):
        seconds_a_step(step, 1, device)
    return step, flops, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def show_device(results: dict[str, Any]) -> None:
    """Print the results, what was left out and why, and what the figures do not say."""
    print(f"{results['device']}, {results['precision']}{', compiled' if results['compiled'] else ''}")
    for row in results["cases"]:
        low, high = row["range"]
        said = [
            f"{row['case']}, batch {row['batch_size']}: {row['per_second']:,.0f} {row['unit']} a second, "
            f"{row['ratio']:.3f} times {row['peer']} ({low:.3f} to {high:.3f})"
        ]
        if row["mfu"] is not None:
            said.append(f"MFU {row['mfu']:.1%} (theirs {row['peer_mfu']:.1%})")
        if row["peak_memory_bytes"] is not None:
            theirs = in_gib(row["peer_peak_memory_bytes"])
            said.append(f"peak memory {in_gib(row['peak_memory_bytes'])} (theirs {theirs})")
        if row["batch_size"] < row["asked_batch_size"]:
            said.append(f"{row['asked_batch_size']} did not fit into memory")
        print("; ".join(said))
    for part in results["left_out"]:
        print(f"left out: {part['case']}: {part['reason']}")
    if results["rehearsal"]:
        print("a rehearsal with tiny networks, not compiled: these figures say nothing about speed")
    elif results["peak_flops"] is None:
        print(f"no MFU: the peak speed of {results['device']} is not known")
