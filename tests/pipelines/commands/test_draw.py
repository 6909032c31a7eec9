"""`trunkline draw`: what TensorBoard shows of runs, as files."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard_run import logged_picture
from torch.utils.tensorboard import SummaryWriter
from written_run import CLASSES, add_embeddings, opened, write_pictures, write_scalars

from trunkline.modules.callbacks.curves import draw_curves, png_of, read_curves, read_events
from trunkline.pipelines.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one thing of each kind."""
    folder = tmp_path / "runs/vit/digits/2026-01-02"
    write_scalars(folder, {"by_images/train/loss": {8: 3.0}, "by_images/val/loss": {8: 2.0}})
    write_pictures(folder, "val/attention", (9, 9, 9), (90, 0, 0))
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("val/samples", "In the beginning", 1)
        writer.add_text("val/samples", "In the end: ö", 2)
        add_embeddings(writer, "val/features")
    return folder


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["draw", *arguments])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_everything_that_a_run_shows(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pictures"
    main(["draw", str(run), "--output", str(output)])
    written = {"curves": ".png", "val/attention": ".png", "val/features": ".png", "val/samples": ".md"}
    files = {name: output / f"{name.replace('/', '_')}{suffix}" for name, suffix in written.items()}
    assert capsys.readouterr().out.splitlines() == [f"wrote {name} to {file}" for name, file in files.items()]
    assert set(output.iterdir()) == set(files.values())
    events = read_events(run)
    assert files["curves"].read_bytes() == png_of(draw_curves({"": read_curves(events)}))
    assert (opened(files["val/attention"]) == logged_picture(events, "val/attention")).all()
    assert (opened(files["val/attention"]) == (90, 0, 0)).all()  # the last one
    assert files["val/samples"].read_text(encoding="utf-8") == "In the end: ö\n"
    shown = opened(files["val/features"])
    for colour in CLASSES.values():
        assert (np.abs(shown.astype(int) - colour).max(axis=2) <= 1).sum() > 8 * 10 * 10


def test_one_of_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder with several runs, the one that was started last, whatever their names and dates of change."""
    for number, name in ((1, "zzz"), (2, "aaa")):
        write_pictures(run.parent / name, "val/attention", (number, 0, 0))
        (file,) = (run.parent / name).iterdir()
        file.rename(file.with_name(f"events.out.tfevents.999999999{number}.host"))
    (run.parent / "zzz/note").write_text("changed later")
    output = tmp_path / "attention.png"
    main(["draw", str(run.parent), "--only", "val/attention", "--output", str(output)])
    assert (opened(output) == (2, 0, 0)).all()
    main(["draw", "--runs", str(run), "--only", "val/samples", "--output", str(tmp_path / "samples.md")])
    assert (tmp_path / "samples.md").read_text() == "In the end: ö\n"


def test_several_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.parents[1] / "baseline"
    write_scalars(other, {"by_images/val/loss": {8: 4.0}})
    output = tmp_path / "both.png"
    main(["draw", str(run.parent), str(other), "--output", str(output)])
    recorded = {name: read_curves(read_events(folder)) for name, folder in (("digits", run), ("baseline", other))}
    assert output.read_bytes() == png_of(draw_curves(recorded))
    message = failure(capsys, str(run), str(run), "--output", str(output))
    assert "a run is given twice" in message
    message = failure(capsys, str(run), str(other), "--only", "val/attention", "--output", str(output))
    assert "of several runs only the curves can be drawn, not val/attention; give one run (--only)" in message


def test_what_cannot_be_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, png = set(tmp_path.rglob("*")), str(tmp_path / "x.png")
    message = failure(capsys, str(run), "--only", "val/atention", "--output", png)
    assert "has no 'val/atention', but curves, val/attention, val/features, val/samples" in message
    assert message.endswith("did you mean 'val/attention'? (--only)")
    message = failure(capsys, str(run), "--only", "val/samples", "--output", png)
    assert f"--output {png} must be a .md file in a folder that exists" in message
    assert "must be a folder for all files; choose one of them with --only" in failure(
        capsys, str(run), "--output", png
    )
    assert f"{tmp_path} holds no run" in failure(capsys, str(tmp_path))
    assert "missing holds no run" in failure(capsys, str(tmp_path / "missing"))
    assert set(tmp_path.rglob("*")) == before
    folder = tmp_path / "epoch"
    for empty in (folder, tmp_path / "other"):
        write_scalars(empty, {"epoch": {1: 1.0}})
    for runs in ([str(folder)], [str(folder), str(tmp_path / "other"), "--output", png]):
        assert f"{folder} has nothing to draw yet" in failure(capsys, *runs)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "events.out.tfevents.1.host").write_bytes(b"no events at all, but some bytes")
    assert f"{broken} has nothing to draw yet" in failure(capsys, str(broken))
    (tmp_path / "full").write_text("a file")
    message = failure(capsys, str(run), "--output", str(tmp_path / "full"))
    assert f"cannot write {tmp_path / 'full/curves.png'}" in message
    assert message.endswith("(--output)")


def test_the_file_of_a_projection_is_small(run: Path, tmp_path: Path) -> None:
    main(["draw", str(run), "--only", "val/features", "--output", str(tmp_path / "x.png")])
    content = (tmp_path / "x.png").read_bytes()
    assert Image.open(io.BytesIO(content)).mode == "P"
    assert len(content) < 50_000
