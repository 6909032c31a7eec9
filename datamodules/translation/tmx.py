"""Reads TMX, the format of translation memories, as a stream."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from trunkline import TrunklineError
from trunkline.datamodules.tables import PIECE, opened

LANGUAGE = ("{http://www.w3.org/XML/1998/namespace}lang", "lang")
"""The attribute with the language of a text: TMX 1.4 and older versions."""
CODES = ("bpt", "ept", "it", "ph", "ut")
"""Elements inside a text whose content is the layout's code, not text."""


class Unit(NamedTuple):
    """A text in several languages."""

    place: str
    """File and number of the unit, from 1, for messages."""
    texts: dict[str, str]
    """Language, as the file writes it -> text, without whitespace at both ends; the first one of each language."""


def read_tmx(file: Path) -> Iterator[Unit]:
    """The units of a TMX file (.tmx, .tmx.gz), in bounded memory.

    Raises:
        TrunklineError: if the file is broken, is not TMX, declares entities or has no unit.
    """
    units = 0
    try:
        refuse_entities(file)
        with opened(file) as stream:
            body = None
            for event, element in ElementTree.iterparse(stream, events=("start", "end")):
                name = plain_tag(element)
                if event == "start":
                    if body is None and name not in ("tmx", "header", "note", "prop", "ude", "map", "body"):
                        raise TrunklineError(f"{file} is not TMX: it has the element <{name}>; give a TMX file")
                    body = element if name == "body" else body
                elif name == "tu" and body is not None:
                    units += 1
                    yield Unit(f"{file}, unit {units}", texts_of(element))
                    body.clear()  # of the units before, nothing stays in memory
    except TrunklineError:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TrunklineError(f"{file} is not a gzip file, or it is broken: {error}; compress it again") from error
    except (ElementTree.ParseError, expat.ExpatError, LookupError, ValueError) as error:  # the last two: encodings
        raise TrunklineError(f"{file} is not XML, or it is broken: {error}; write it again") from error
    if not units:
        raise TrunklineError(f"{file} has no translation unit; give a file with some, or remove it")


def refuse_entities(file: Path) -> None:
    """Check that a file declares no entities, which a few lines can make fill the memory; TMX needs none.

    They can be declared before the first element only.

    Raises:
        TrunklineError: if it declares one.
    """
    begun: list[str] = []

    def refuse(name: str, *_: object) -> None:
        raise TrunklineError(f"{file} declares the entity '{name}', which is not read; write its text instead of it")

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: begun.append(name)
    with opened(file) as stream:
        while not begun and (block := stream.read(PIECE)):
            parser.Parse(block)


def texts_of(unit: ElementTree.Element) -> dict[str, str]:
    """Language -> text of a unit, the first one of each language."""
    texts: dict[str, str] = {}
    for variant in unit:
        if plain_tag(variant) == "tuv":
            language = next((variant.attrib[name] for name in LANGUAGE if name in variant.attrib), "")
            segment = next((child for child in variant if plain_tag(child) == "seg"), None)
            texts.setdefault(language, "" if segment is None else text_of(segment).strip())
    return texts


def text_of(element: ElementTree.Element) -> str:
    """The text in an element, without the layout's codes."""
    parts = [element.text or ""]
    for child in element:
        parts += ["" if plain_tag(child) in CODES else text_of(child), child.tail or ""]
    return "".join(parts)


def plain_tag(element: ElementTree.Element) -> str:
    """Name of an element, without its namespace."""
    return element.tag.rpartition("}")[2]


def find_language(wanted: str, languages: Iterable[str]) -> str | None:
    """The language that is wanted, as a file writes it: the same one, else its first region; None if there is none.

    `en` finds `EN` and `en-GB`, but `en_GB` only finds that region (RFC 4647, basic filtering).
    """
    found = None
    for language in languages:
        name, goal = (text.lower().replace("_", "-") for text in (language, wanted))
        if name == goal:
            return language
        if found is None and name.startswith(f"{goal}-"):
            found = language
    return found
