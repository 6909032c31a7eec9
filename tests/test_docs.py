"""The pages in docs/: the gallery's pictures, and the code that uses a network elsewhere.

Their commands are parsed with those of the README, in test_packaging.py.
"""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS, IMAGES = ROOT / "docs", ROOT / "docs/images"
GALLERY = (DOCS / "gallery.md").read_text(encoding="utf-8")
CHECKPOINTS = Path(__file__).parent / "fixtures/checkpoints"
LARGEST, ALL = 150_000, 1_500_000
"""Bytes of a picture, and of all pictures."""


def gallery_commands(text: str) -> list[list[str]]:
    lines = re.findall(r"^\s*(trunkline .+)$", text, re.M)
    return [shlex.split(line) for line in lines]


def test_the_gallery_shows_what_make_gallery_draws() -> None:
    """The command under each picture is that of the Makefile, and writes this picture."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^gallery:.*\n((?:\t.*\n)+)", makefile, re.M)[1]  # type: ignore[index]
    recipe = recipe.replace("$(DRAW)", "trunkline draw").replace("$(BIN)/", "")
    shown = re.findall(r"^!\[.+\]\(images/(.+)\)\n\n```sh\n(trunkline .+)\n```$", GALLERY, re.M)
    drawn = gallery_commands(recipe)
    assert gallery_commands(GALLERY) == drawn
    outputs = [command[command.index("--output") + 1] for command in drawn]
    assert [f"docs/images/{name}" for name, _ in shown] == [name for name in outputs if name.endswith(".png")]
    for name, command in shown:
        assert command.endswith(f"--output docs/images/{name}")
    assert {f"docs/images/{file.name}" for file in IMAGES.iterdir()} == set(outputs)


def test_pictures_are_small() -> None:
    sizes = {file.name: file.stat().st_size for file in IMAGES.iterdir()}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > LARGEST} == {}
    assert sum(sizes.values()) <= ALL
    for name in (name for name in sizes if name.endswith(".png")):
        with Image.open(IMAGES / name) as picture:
            picture.load()
            assert min(picture.size) >= 200


def test_the_text_in_the_gallery_was_written_by_the_network() -> None:
    (quoted,) = re.findall(r"^```text\n(.+?)^```", GALLERY, re.M | re.S)
    assert quoted in (IMAGES / "gpt_samples.md").read_text(encoding="utf-8")


def test_the_readme_shows_two_pictures() -> None:
    shown = re.findall(r"^!\[.+\]\((docs/images/.+\.png)\)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(set(shown)) == 2
    assert all((ROOT / name).is_file() for name in shown)


def test_a_page_is_one_screen() -> None:
    for file in DOCS.glob("*.md"):
        if file.name != "gallery.md":
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 80, file


WITHOUT_CODE = ("gallery", "cluster", "reuse", "finetuning", "measured")
"""Pages that deploy nothing."""
FITTED: dict[str, tuple[str, dict[str, str]]] = {
    "images": ("ImageClassifier", {"torch.zeros(1, 3, 32, 32)": "torch.zeros(1, 1, 8, 8)"}),
    "text": ("CausalLM", {"In the beginning": "a"}),
    "pairs": ("ContrastiveImageText", {"torch.zeros(1, 3, 32, 32)": "torch.zeros(1, 1, 8, 8)"}),
    "translation": ("Seq2Seq", {"<|endoftext|>": "[SEP]", "max_new_tokens=100": "max_new_tokens=20"}),
    "sound": (
        "SpeechRecognizer",
        {
            'num_mels=40, per_clip="mean_std", range_db=50, max_seconds=5.0': "num_mels=8, max_seconds=1.0",
            "22050": "8000",
        },
    ),
}
"""Page -> the checkpoint in the fixtures that its code gets, and what in the code is of the page's own network."""


@pytest.mark.parametrize("page", sorted(file.stem for file in DOCS.glob("*.md") if file.stem not in WITHOUT_CODE))
def test_deployment(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of each page runs, from a checkpoint to what the network says."""
    monkeypatch.chdir(tmp_path)
    kind, own = FITTED[page]
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)
    code, count = re.subn(r'"(best|last)\.ckpt"', repr(str(CHECKPOINTS / f"{kind}.ckpt")), "\n".join(blocks))
    assert count == 1
    for theirs, ours in own.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    found: dict[str, object] = {}
    exec(code, found)
    assert type(found["network"]).__module__.startswith("trunkline.modules.networks")
