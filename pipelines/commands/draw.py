"""`trunkline draw`: what TensorBoard shows of runs, as files."""

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from trunkline import TrunklineError
from trunkline.files import atomic_write
from trunkline.modules.callbacks.curves import RunCurves, draw_curves, png_of, read_curves, read_events
from trunkline.modules.callbacks.projection import Projected, draw_projection, in_plane, read_projections
from trunkline.pipelines.commands.output import check_output
from trunkline.pipelines.configs import nearest

EVENTS = "events.out.tfevents."
CURVES = "curves"
TEXT = "/text_summary"
"""TensorBoard's end of the tag of a text."""
COLOURS = 64
"""Of a picture with many thumbnails, which makes its file small."""


class Drawing(NamedTuple):
    """A file that can be written."""

    suffix: str
    content: Callable[[], bytes]


def draw_runs(runs: list[str] | str, output: str = "pictures", only: str | None = None) -> None:
    """Write what TensorBoard shows of runs as files (`trunkline draw runs/vit/digits --output pictures`).

    Of one run: its curves, the last picture and text of each kind, and its embeddings, placed in a plane by t-SNE. Of
    several runs: their curves in one picture.

    Args:
        runs: a run's folder, or a folder with several, of which the last that was started counts; several of either
            kind for their curves. They can also follow the command without the flag.
        output: a folder for all files; with `only`, and for several runs, a .png file (.md for a text).
        only: what to draw: `curves`, or a tag of TensorBoard's, such as `val/attention`.

    Raises:
        TrunklineError: if a folder holds no run, there is nothing of that name, or the output cannot be written.
    """
    given = [runs] if isinstance(runs, str) else runs
    folders = [newest_run(Path(run)) for run in given]
    if len(folders) == 1:
        drawings = drawings_of(folders[0])
    elif only in (None, CURVES):
        only, drawings = CURVES, compared_runs(given, folders)
    else:
        raise TrunklineError(f"of several runs only the curves can be drawn, not {only}; give one run", "only")
    if not drawings:
        raise TrunklineError(f"{folders[0]} has nothing to draw yet: its training has logged nothing", "runs")
    if only is None:
        if Path(output).suffix:
            raise TrunklineError(f"--output {output} must be a folder for all files; choose one of them with --only")
        written = [(Path(output) / (name.replace("/", "_") + drawings[name].suffix), name) for name in drawings]
    elif only in drawings:
        check_output(output, (drawings[only].suffix,))
        written = [(Path(output), only)]
    else:
        known = ", ".join(drawings)
        raise TrunklineError(f"{folders[0]} has no '{only}', but {known}{nearest(only, drawings)}", "only")
    for file, name in written:
        atomic_write(file, [drawings[name].content()], field="output")
        print(f"wrote {name} to {file}")


def newest_run(folder: Path) -> Path:
    """The folder itself if it is a run's, else the run in it that was started last, by the time in its files' names.

    Raises:
        TrunklineError: if there is no run.
    """
    for pattern in (f"{EVENTS}*", f"*/{EVENTS}*"):
        files = list(folder.glob(pattern))
        if files:
            return max(files, key=lambda file: file.name).parent
    raise TrunklineError(
        f"{folder} holds no run that was logged to TensorBoard; give a folder that `trunkline fit` made, such as "
        "runs/vit/digits/TIME",
        "runs",
    )


def compared_runs(given: list[str], folders: list[Path]) -> dict[str, Drawing]:
    """The curves of several runs, which are named by what their paths do not share."""
    shared = os.path.commonpath([str(Path(run).parent) for run in given])
    recorded: dict[str, RunCurves] = {}
    for run, folder in zip(given, folders, strict=True):
        recorded[os.path.relpath(run, shared or ".")] = read_curves(read_events(folder))
    if len(recorded) < len(folders):
        raise TrunklineError(f"a run is given twice: {' '.join(given)}; give each once", "runs")
    return curves_of(recorded)


def curves_of(recorded: dict[str, RunCurves]) -> dict[str, Drawing]:
    """The curves of runs, by their name; empty if no run has logged any."""
    shown = any(run.values for run in recorded.values())
    return {CURVES: Drawing(".png", lambda: png_of(draw_curves(recorded)))} if shown else {}


def drawings_of(folder: Path) -> dict[str, Drawing]:
    """All that can be drawn of a run."""
    events = read_events(folder)
    found = curves_of({"": read_curves(events)})
    for tag in events.Tags()["images"]:
        found[tag] = Drawing(".png", partial(bytes, events.Images(tag)[-1].encoded_image_string))
    for tag in events.Tags()["tensors"]:
        if tag.endswith(TEXT):
            text = events.Tensors(tag)[-1].tensor_proto.string_val[0]
            found[tag.removesuffix(TEXT)] = Drawing(".md", partial(bytes, text + b"\n"))
    for tag, embeddings in read_projections(folder).items():
        found[tag] = Drawing(".png", partial(png_of_projection, embeddings))
    return dict(sorted(found.items()))


def png_of_projection(embeddings: Projected) -> bytes:
    """The content of a picture of embeddings."""
    picture = draw_projection(in_plane(embeddings.vectors), embeddings.labels, embeddings.thumbnails)
    stream = io.BytesIO()
    picture.quantize(COLOURS).save(stream, "PNG", optimize=True)
    return stream.getvalue()
