"""`trunkline check`: prove on this machine that a recipe can be trained, before GPU-hours are spent on it."""

import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from trunkline import TrunklineError
from trunkline.pipelines.checks.agreement import TOLERANCE, explain_difference, run_agreement, step_trial
from trunkline.pipelines.checks.estimates import cost_trial, estimate_rows
from trunkline.pipelines.checks.overfit import explain_standstill, learnt, overfit_figures, overfit_trial
from trunkline.pipelines.checks.parameters import parameter_faults, parameter_figures
from trunkline.pipelines.checks.resume import END, KILLED, explain_resume, run_resume
from trunkline.pipelines.checks.trials import TrialFailed, Workbench
from trunkline.pipelines.configs import nearest, resolve_configs
from trunkline.pipelines.errors import options_given, place_of

CHECKS = ("agreement", "parameters", "overfit", "resume", "estimates")
OWN_FLAGS = ("--processes", "--only")
PARSER_FLAGS = ("-h", "--help", "--print_config", "--data.help", "--model.help")
"""Flags that the parser of `fit` answers."""
MOST_PROCESSES = 64
TABLE_WIDTH = 110
"""Least columns of the table, also in a narrow terminal or a file."""


class Finding(NamedTuple):
    """A line of the closing table."""

    check: str
    what: str
    passed: bool | None
    """None for an estimate."""
    figures: str
    advice: str = ""
    """If it failed: what is wrong, and what to do."""


def run_check(arguments: list[str]) -> None:
    """Check a recipe, and print a table of what passed.

    Args:
        arguments: the command, and options as for `trunkline fit`, with `--processes` and `--only` besides.

    Raises:
        TrunklineError: for bad input.
        SystemExit: with code 1 if a check fails.
    """
    rest, own = split_own(arguments[1:])
    if {argument.partition("=")[0] for argument in rest} & set(PARSER_FLAGS):
        from trunkline.pipelines.training import run_training

        run_training(["fit", *rest])
        return
    chosen, processes = chosen_checks(own.get("--only")), count_of_processes(own.get("--processes"))
    resolved, recipe = resolve_configs(["fit", *rest])
    if not any(name in ("--config", "-c", "--model", "--model.class_path") for name, _ in options_given(resolved)):
        raise TrunklineError("trunkline check needs a recipe, such as --config vit/digits")
    sys.argv[1:] = resolved  # messages look for flags and configs here
    folder, start = Path(mkdtemp(prefix="trunkline-check-")), time.perf_counter()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the trials too
    try:
        rows = check_recipe(Workbench(resolved, recipe, folder), chosen, processes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    show_findings(rows, recipe or "recipe", time.perf_counter() - start)
    if any(row.passed is False for row in rows):
        raise SystemExit(1)


def split_own(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line without the flags that only this command has, and those with their values."""
    rest, own, name = [], {}, ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if name:
            own[name], name = argument, ""
        elif flag in OWN_FLAGS:
            own[flag], name = value, "" if equals else flag
        else:
            rest.append(argument)
    if name:
        raise TrunklineError(f"{name} is the last word; write its value after it")
    return rest, own


def chosen_checks(text: str | None) -> list[str]:
    """The checks that `--only` names, in our order; all without it.

    Raises:
        TrunklineError: for a name that there is not.
    """
    names = list(CHECKS) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CHECKS:
            hint = nearest(name, CHECKS) or ";"
            raise TrunklineError(f"--only: there is no check '{name}'{hint} there are {', '.join(CHECKS)}")
    return [name for name in CHECKS if name in names]


def count_of_processes(text: str | None) -> int | None:
    """The number that `--processes` gives; None without it.

    Raises:
        TrunklineError: if it is no number, or out of range.
    """
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST_PROCESSES:
        raise TrunklineError(f"--processes must be a whole number from 1 to {MOST_PROCESSES}, not '{text}'")
    return int(text)


def check_recipe(bench: Workbench, chosen: list[str], processes: int | None) -> list[Finding]:
    """Run the checks of these names.

    Raises:
        TrunklineError: if the recipe cannot make a step at all.
    """
    print("check: the first step", file=sys.stderr)
    try:
        (alone,) = bench.run(step_trial())  # all flags, files and classes are read here
    except TrialFailed as failed:
        sys.stderr.write(failed.log)
        message = f"the recipe cannot make its first step: {failed}" if failed.log else str(failed)
        raise TrunklineError(message, failed.field) from None
    count = processes or alone["devices"]
    if alone["device"] != "cpu" and count > alone["devices"]:
        raise TrunklineError(f"--processes {count}: there are only {alone['devices']} devices here")
    rows: list[Finding] = []
    for name in chosen:
        print(f"check: {name}", file=sys.stderr, flush=True)
        try:
            rows += RUNNERS[name](bench, alone, count)
        except TrialFailed as failed:
            sys.stderr.write(failed.log)
            place = place_of(failed.field) if failed.field else None
            rows.append(
                Finding(name, "ends before its last step", False, "", f"{failed}" + (f" ({place})" if place else ""))
            )
    return rows


def check_agreement(bench: Workbench, alone: Mapping[str, Any], processes: int) -> list[Finding]:
    """One process, accumulated gradients and several processes: the same loss and gradients."""
    rows = []
    for kind, found in run_agreement(bench, alone, processes).items():
        loss = "not compared" if found.loss is None else f"{found.loss:.1e}"
        figures = f"loss {loss}, gradients {found.gradient:.1e} apart (at most {TOLERANCE:.0e})"
        advice = "" if found.passed else explain_difference(found, kind, alone)
        rows.append(Finding("agreement", f"{kind} as one process", found.passed, figures, advice))
    return rows


def check_parameters(bench: Workbench, alone: Mapping[str, Any], processes: int) -> list[Finding]:
    """Gradients and groups of the optimiser."""
    faults = parameter_faults(alone)
    what = "each has a gradient and an optimiser"
    return [Finding("parameters", what, not faults, parameter_figures(alone), "; ".join(faults))]


def check_overfit(bench: Workbench, alone: Mapping[str, Any], processes: int) -> list[Finding]:
    """One batch, again and again."""
    (found,) = bench.run(overfit_trial())
    passed = learnt(found["first"], found["last"])
    advice = "" if passed else explain_standstill(found)
    what = f"the loss of {found['rows']} rows falls"
    return [Finding("overfit", what, passed, overfit_figures(found), advice)]


def check_resume(bench: Workbench, alone: Mapping[str, Any], processes: int) -> list[Finding]:
    """SIGKILL and resume."""
    found = run_resume(bench, processes, alone["device"])
    passed = not found.differences and found.other_rows is None
    places = "" if processes == 1 else f", {processes} processes"
    figures = f"SIGKILL after step {KILLED} of {END}{places}: {len(found.differences)} differences"
    advice = "" if passed else explain_resume(found)
    return [Finding("resume", "the same checkpoint, bit for bit", passed, figures, advice)]


def check_costs(bench: Workbench, alone: Mapping[str, Any], processes: int) -> list[Finding]:
    """Memory, disk and time."""
    (found, *_) = bench.run(cost_trial(processes))
    return [Finding("estimates", what, None, figures) for what, figures in estimate_rows(found).items()]


RUNNERS = {
    "agreement": check_agreement,
    "parameters": check_parameters,
    "overfit": check_overfit,
    "resume": check_resume,
    "estimates": check_costs,
}


def show_findings(rows: list[Finding], recipe: str, seconds: float) -> None:
    """Print the table, below it what is wrong, and what the checks left out."""
    table = Table(title=f"check of {recipe}", title_justify="left")
    for heading in ("check", "what", "result", "figures"):
        table.add_column(heading)
    for row in rows:
        result = {True: "pass", False: "FAIL", None: "estimate"}[row.passed]
        table.add_row(row.check, row.what, result, row.figures)
    Console(width=max(TABLE_WIDTH, shutil.get_terminal_size().columns)).print(table)
    for row in rows:
        if row.passed is False:
            print(f"FAIL {row.check}: {row.advice}")
    if {row.check for row in rows} & {"agreement", "parameters", "overfit"}:
        print(
            "Agreement, parameters: in float32, new weights with a little noise; these and overfit: on few rows, in "
            "evaluation\nmode (but batch norms), so without dropout and drop path; without mixup, label smoothing and "
            "the recipe's callbacks.\nResume: as in the recipe, without loggers."
        )
    failed = sum(row.passed is False for row in rows)
    verdict = f"{failed} of {sum(row.passed is not None for row in rows)} failed" if failed else "all passed"
    print(f"{verdict} in {seconds:.0f} s")
