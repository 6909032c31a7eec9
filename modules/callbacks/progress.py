"""What a run prints while it trains: what it works with, and a progress bar with the time that is left."""

import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

from trunkline.modules.callbacks.throughput import Throughput
from trunkline.modules.objectives.base import TrunklineModule

BAR = 8
"""Characters of the bar."""
UNSHOWN = "v_num"
"""What Lightning counts as a metric: the number of the logger's folder."""


class Overview(Callback):
    """Prints, as training starts, what a user acts on: device, network, sizes of the splits, the run's folder."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, text in overview(trainer, pl_module):
            rank_zero_info(f"{name:<8} {text}")


def overview(trainer: L.Trainer, module: L.LightningModule) -> list[tuple[str, str]]:
    """Names and texts of the lines that `Overview` prints."""
    network: Any = getattr(module, "network", module)
    count = sum(p.numel() for p in network.parameters())
    learning = sum(p.numel() for p in network.parameters() if p.requires_grad)
    some = "" if learning == count else f", {learning:,} of them learn"
    devices = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    lines = [
        ("device", f"{devices}{trainer.strategy.root_device}, precision {trainer.precision}"),
        ("network", f"{type(network).__name__}, {count:,} parameters{some}"),
    ]
    data: Any = getattr(trainer, "datamodule", None)
    splits = getattr(data, "datasets", {})
    sizes = [f"{len(splits[split]):,} {split}" for split in ("train", "val", "test") if split in splits]
    if sizes:
        lines.append(("data", f"{getattr(data, 'source', type(data).__name__)}: {', '.join(sizes)}"))
    if not getattr(trainer, "fast_dev_run", False):  # which keeps nothing
        lines.append(("run", str(shortest(Path(trainer.default_root_dir)))))
    return lines


def shortest(path: Path) -> Path:
    """The path, relative to the current folder if it is below that."""
    return path.absolute().relative_to(Path.cwd()) if path.absolute().is_relative_to(Path.cwd()) else path


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with the time left to the end of training, and units per second.

    The bar has always the same width; values that do not fit into the terminal are left out. The loss is that of the
    last step that was logged, or of the first one: another would have to be fetched from the device.

    Args:
        refresh_rate: number of batches between two updates.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.started, self.first_step = 0.0, 0
        self.loss: dict[str, float] = {}

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = f"{{desc}} |{{bar:{BAR}}}| {{n_fmt}}/{{total_fmt}}{{postfix}}"
        return bar

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_start(trainer, *_)
        self.started, self.first_step = time.monotonic(), trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        bar, total = self.train_progress_bar, self.total_train_batches
        bar.reset(None if total == float("inf") else int(total))
        bar.initial = 0
        epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 and trainer.max_steps == -1 else None
        of = "" if epochs is None else f"/{epochs}"
        self.train_progress_bar.set_description_str(f"Epoch {trainer.current_epoch + 1}{of}", refresh=False)

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        name, interval = "train/loss", trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (not self.loss or trainer.global_step % interval == 0) and name in trainer.callback_metrics:
            self.loss = {name: float(trainer.callback_metrics[name])}
        super().on_train_batch_end(trainer, *rest)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The values that the bar shows, as texts, as many as fit."""
        found = self.loss | dict(super().get_metrics(trainer, pl_module))
        found.pop(UNSHOWN, None)
        shown = {name.removeprefix("train/"): digits(value) for name, value in found.items()}
        left = self.seconds_left(trainer)
        if left is not None:
            shown = {"left": clock(left), **shown}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and callback.per_second:
                shown[f"{pl_module.unit}/s"] = f"{callback.per_second:.0f}"
        bar: Any = self.train_progress_bar
        taken = len(getattr(bar, "desc", "")) + BAR + 2 * len(str(getattr(bar, "total", ""))) + len(" || /")
        # One column stays free: a line that fills the terminal moves the cursor to the next one.
        return fitting(shown, shutil.get_terminal_size().columns - taken - 1)

    def seconds_left(self, trainer: L.Trainer) -> float | None:
        """Time to the end of training at the pace so far; None if there is no pace or no end."""
        done, total = trainer.global_step - self.first_step, trainer.estimated_stepping_batches
        if done < 1 or total == float("inf"):
            return None
        module = trainer.lightning_module
        ahead = module.position.steps_ahead if isinstance(module, TrunklineModule) else 0
        return (time.monotonic() - self.started) / done * max(total - trainer.global_step - ahead, 0)


def digits(value: Any) -> str:
    """A number with four significant digits: 1.876, 0.1278; other values as they are."""
    return f"{value:#.4g}".removesuffix(".") if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fitting(values: dict[str, str], room: int) -> dict[str, str]:
    """The first values of which `, name=value` fits into `room` characters together."""
    kept = {}
    for name, value in values.items():
        room -= len(f", {name}={value}")
        if room < 0:
            break
        kept[name] = value
    return kept
