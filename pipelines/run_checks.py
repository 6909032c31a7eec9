"""Checks of a recipe before its first step: settings of the trainer, seed, objective and data, monitored metrics."""

import re
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from trunkline import TrunklineError
from trunkline.modules.networks.base import refuse_nan
from trunkline.modules.training.sharding import NO_MODEL_PARALLEL
from trunkline.pipelines.errors import flags, plain
from trunkline.pipelines.objectives import KINDS, PROBES, short
from trunkline.ranges import check_ranges

TRAINER = {
    "max_epochs": "[-1, inf)",
    "min_epochs": "[0, inf)",
    "max_steps": "[-1, inf)",
    "min_steps": "[0, inf)",
    "num_nodes": "[1, inf)",
    "accumulate_grad_batches": "[1, inf)",
    "gradient_clip_val": "[0, inf)",
    "log_every_n_steps": "[0, inf)",
    "check_val_every_n_epoch": "[1, inf)",
    "val_check_interval": "[0, inf)",
    "limit_train_batches": "[0, inf)",
    "limit_val_batches": "[0, inf)",
    "limit_test_batches": "[0, inf)",
}
"""Ranges of the trainer's options. Lightning checks some of them, late and in other words."""
LARGEST_SEED = 2**32 - 1


def check_run(config: Namespace) -> None:
    """Check a recipe.

    Raises:
        TrunklineError: for a value out of its range, a strategy that cannot be used, or an
            objective and data that do not fit each other.
    """
    for flag, _ in flags():
        if plain(flag) in ("data.seed", "model.seed"):
            raise TrunklineError(f"{plain(flag)} is always that of the run; set seed_everything", plain(flag))
    check_ranges("", config, threads="[1, inf)")
    trainer = config.trainer.as_dict()
    given = {name: value for name in TRAINER if isinstance(value := trainer.get(name), int | float)}
    check_ranges("trainer", given, **{name: TRAINER[name] for name in given})
    strategy = config.trainer.get("strategy")
    path = class_path_of(strategy) if isinstance(strategy, Namespace) else str(strategy)
    if short(path) == "ModelParallelStrategy":
        raise TrunklineError(NO_MODEL_PARALLEL, "trainer.strategy")
    check_partners(class_path_of(config.get("model")), class_path_of(config.get("data")))


def class_path_of(part: Any) -> str:
    """Class path of a part of a config; empty if it has none."""
    return str(part.get("class_path") or "") if part else ""


def check_partners(objective: str, data: str) -> None:
    """Check that one of our objectives is not given the data of another.

    Args:
        objective: class path.
        data: class path.

    Raises:
        TrunklineError: with the class of the objective's usual data.
    """
    kind = KINDS.get(short(objective))
    others = {short(other.data): other for other in KINDS.values()}
    own = objective.startswith("trunkline.") and data.startswith("trunkline.")
    if kind is None or not own or short(data) not in others or short(data) == short(kind.data):
        return
    fitting = " or ".join(name for name, other in KINDS.items() if short(other.data) == short(data))
    raise TrunklineError(
        f"{short(objective)} learns from {short(kind.data)}, not from {short(data)}, which is for {fitting}; start "
        "from a recipe of the one that you want",
        "data",
    )


class KnownMetrics(Callback):
    """Refuses a callback that waits for a metric of the validation that is never logged, before the first step."""

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare with what Lightning's trial validation has logged.

        Raises:
            TrunklineError: naming callback, metric, and the metrics that there are.
        """
        known = {name for name in trainer.callback_metrics if name.startswith("val/")}
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # A score of generated texts, and a callback's own metric, are not there in the trial.
        paths = [f"{type(callback).__module__}.{type(callback).__name__}" for callback in callbacks]
        own = all(path.startswith(("trunkline.", "lightning.")) and path != PROBES for path in paths)
        if getattr(pl_module, "scores", None) or not own:
            return
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None) or ""
            if monitor.startswith("val/") and monitor not in known:
                raise TrunklineError(
                    f"{type(callback).__name__} waits for {monitor}, but there is no such metric; choose among "
                    f"{', '.join(sorted(known))}",
                    "trainer.callbacks.monitor",
                )


class FiniteWeights(Callback):
    """Refuses to evaluate weights that are not finite numbers."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the weights, which are those of the checkpoint now.

        Raises:
            TrunklineError: as `refuse_nan`.
        """
        refuse_nan(pl_module, trainer.ckpt_path or "this network")

    on_validation_start = on_test_start


def check_seed(seed: Any) -> None:
    """Check `seed_everything`.

    Raises:
        TrunklineError: if it is not a whole number, or out of range.
    """
    if isinstance(seed, bool):
        raise TrunklineError(f"seed_everything must be a whole number, not {str(seed).lower()}", "seed_everything")
    check_ranges("", {"seed_everything": seed}, seed_everything=f"[0, {LARGEST_SEED}]")


def trainer_error(error: Exception, place: str = "") -> TrunklineError:
    """The message for options that Lightning's Trainer refuses.

    Args:
        error: what the Trainer raised.
        place: what stands before an option's name in a flag.
    """
    reason = str(error).partition("\n")[0].strip() or type(error).__name__
    named = re.search("precision|accelerator|devices|strategy|num_nodes|backend|torch_xla|duration", reason)
    others = {"backend": "accelerator", "torch_xla": "accelerator", "duration": "max_time"}
    option = others.get(named[0], named[0]) if named else None
    if reason.startswith("No supported gpu backend"):
        files = "trainer/cpu or trainer/ddp_cpu, or " if place else ""
        reason += f" Choose {files}--{place}accelerator cpu"
    return TrunklineError(f"--trainer: {reason}" if place else reason, f"{place}{option}" if option else None)
