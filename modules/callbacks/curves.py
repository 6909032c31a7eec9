"""Losses and scores of runs over the samples seen, read back from TensorBoard's files and drawn into one picture."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from trunkline import TrunklineError
from trunkline.files import atomic_write
from trunkline.modules.callbacks.drawing import new_figure, tensorboard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES_FILE = "curves.png"
NEITHER = ("lr", "grad_norm", "skipped_steps")
"""Values that are no losses and no scores."""
COLUMNS = 3
"""Panels side by side."""
LINES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 0.8, "alpha": 0.6},
    "val": {"linewidth": 1.6, "marker": "o", "markersize": 3},
}
"""How the lines are drawn."""


class RunCurves(NamedTuple):
    """What a run has logged."""

    unit: str
    """What the x-axis counts: `images`, `tokens`, …, or `steps`."""
    values: dict[str, dict[str, dict[int, float]]]
    """Name, such as `loss` -> stage (`train` or `val`) -> value over the units seen."""


class Curves(Callback):
    """At the end of training, draws losses and scores of training and validation into `curves.png` in the run's folder.

    They are drawn over the units seen that `Throughput` counts; without it, over steps. They come from TensorBoard's
    files, so that a resumed run has all of them; nothing is drawn without TensorBoard.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is None:
            return
        writer.flush()
        recorded = read_curves(read_events(writer.log_dir))
        if not recorded.values:
            return
        try:
            file = Path(trainer.default_root_dir) / CURVES_FILE
            atomic_write(file, [png_of(draw_curves({"": recorded}))], field="run_dir")
        except TrunklineError as error:  # a picture is not worth the run's test
            rank_zero_info(str(error))


def read_events(folder: str | os.PathLike[str]) -> Any:
    """All numbers, and the last picture and text of each tag, as TensorBoard's `EventAccumulator`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(
        str(folder), {"scalars": 0, "images": 1, "tensors": 1, "audio": 1, "histograms": 1}
    ).Reload()


def read_curves(events: Any) -> RunCurves:
    """The losses and scores of a run, from `read_events`; of a step that a resume has repeated, the last value."""
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("by_")]
    unit = tags[0].partition("/")[0].removeprefix("by_") if tags else "steps"
    prefix = f"by_{unit}/" if tags else ""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for tag in tags or events.Tags()["scalars"]:
        stage, _, name = tag.removeprefix(prefix).partition("/")
        if stage in LINES and name not in NEITHER:
            found = {event.step: event.value for event in events.Scalars(tag)}
            values.setdefault(name, {})[stage] = dict(sorted(found.items()))
    # Counts of rows that were cut or left out are 0 in most runs.
    kept = {name: stages for name, stages in values.items() if any(any(line.values()) for line in stages.values())}
    return RunCurves(unit, {name: kept[name] for name in sorted(kept, key=lambda name: (name != "loss", name))})


def draw_curves(runs: Mapping[str, RunCurves]) -> "Figure":
    """Draw a panel for each loss and score, with the lines of all runs.

    Args:
        runs: name of the run -> what it has logged; each has a colour. A single run needs no name: its stages have
            colours instead.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    names = list(dict.fromkeys(name for recorded in runs.values() for name in recorded.values))
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(1 + 3.2 * columns, 0.4 + 2.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, name in zip(panels, names, strict=False):
        for number, (run, recorded) in enumerate(runs.items()):
            for stage, line in recorded.values.get(name, {}).items():
                label = f"{run} {stage}".strip() + f", last {list(line.values())[-1]:.4g}"
                colour = f"C{number if len(runs) > 1 else list(LINES).index(stage)}"
                place.plot(list(line), list(line.values()), color=colour, label=label, **LINES[stage])
        place.set_title(name, fontsize=10)
        place.tick_params(labelsize=8)
        place.set_xlim(left=0)
        place.xaxis.set_major_locator(MaxNLocator(5))
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
        place.grid(alpha=0.3)
        place.legend(fontsize=7)
    for place in panels[len(names) :]:
        place.remove()
    units = dict.fromkeys(recorded.unit.replace("_", " ") for recorded in runs.values())
    figure.supxlabel(" or ".join(units) + ("" if "steps" in units else " seen"), fontsize=9)
    return figure


def png_of(figure: "Figure") -> bytes:
    """The content of a picture."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()
