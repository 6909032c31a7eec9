"""TMX files, written by hand: languages, codes in texts, encodings, memory, and what a broken one says."""

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pair_files import fault, read, write

from trunkline.datamodules.translation.text_pairs import Pair
from trunkline.datamodules.translation.tmx import find_language, read_tmx

HEADER = '<header srclang="en" datatype="plaintext"><note>x</note><prop type="a">y</prop></header>'


def tmx(*units: str, before: str = "", lang: str = "xml:lang") -> str:
    """A file; a unit is written as `en=one|de=eins`."""
    body = ""
    for unit in units:
        pairs = (variant.partition("=") for variant in unit.split("|"))
        variants = "".join(
            f'<tuv {lang}="{name}"><prop type="z">p</prop><seg>{seg}</seg></tuv>' for name, _, seg in pairs
        )
        body += f"\n<tu><note>n</note>{variants}</tu>\n"
    return f'<?xml version="1.0"?>{before}<tmx version="1.4">{HEADER}<body>{body}</body></tmx>'


def test_pairs_of_units(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tmx", tmx("en=one|de= eins ", "de=zwei|en=two", "en-GB=th&amp;ree|DE=drei"))
    pairs = read(path, pairs=["en-de"])
    assert pairs == [
        Pair(0, f"{path}, unit 1", "one", "eins", "de"),
        Pair(1, f"{path}, unit 2", "two", "zwei", "de"),
        Pair(2, f"{path}, unit 3", "th&ree", "drei", "de"),
    ]
    assert read(path, source="en", target="de") == pairs
    both = read(path, pairs=["de-en", "en-de"])
    assert [(pair.number, pair.source, pair.language) for pair in both[:3]] == [
        (0, "eins", "en"),
        (0, "one", "de"),
        (1, "zwei", "en"),
    ]


def test_units_without_a_language_have_no_pair(tmp_path: Path) -> None:
    """A row keeps its number, and with it its split, whichever directions are read."""
    path = write(tmp_path / "in.tmx", tmx("en=one|fr=un", "en=two|de=zwei|fr=deux", "de=drei"))
    assert [(pair.number, pair.target) for pair in read(path, pairs=["en-de"])] == [(1, "zwei")]
    pairs = read(path, pairs=["en-de", "en-fr"])
    assert [(pair.number, pair.target) for pair in pairs] == [(0, "un"), (1, "zwei"), (1, "deux")]


def test_a_folder_of_files(tmp_path: Path) -> None:
    """Each direction must be in one of them."""
    write(tmp_path / "in/a.tmx", tmx("en=one|de=eins"))
    write(tmp_path / "in/b.tmx.gz", gzip.compress(tmx("en=two|fr=deux").encode()))
    pairs = read(tmp_path / "in", pairs=["en-de", "en-fr"])
    assert [(pair.number, pair.target) for pair in pairs] == [(0, "eins"), (1, "deux")]
    error = fault(tmp_path / "in", pairs=["en-de", "de-fr"])
    assert f"{tmp_path / 'in'}: no unit has both languages 'de' and 'fr'; the languages are en, de, fr;" in str(error)


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"pairs": ["en-fr"]}, "in.tmx: no unit has both languages 'en' and 'fr'; the languages are en_GB, de-AT;"),
        ({"pairs": None}, "no unit has both languages 'source' and 'target'; the languages are en_GB, de-AT;"),
        ({"pairs": ["en_US-de"]}, "no unit has both languages 'en_US' and 'de'"),
    ],
)
def test_languages_that_are_not_there(columns: dict[str, Any], part: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.tmx", tmx("en_GB=one|de-AT=eins"))
    assert len(read(path, pairs=["en_gb-de"])) == 1
    error = fault(path, **columns)
    assert part in str(error)
    assert "name the direction with pairs, such as en-de" in str(error)
    assert error.field == "data.pairs"


def test_find_language() -> None:
    names = ["fr", "en-US", "EN_gb", "pt-BR", "pt"]
    wanted = {"en": "en-US", "en_GB": "EN_gb", "EN-us": "en-US", "pt": "pt", "FR": "fr", "f": None, "fr-CA": None}
    assert {name: find_language(name, names) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("segment", "text"),
    [
        ('a <bpt i="1">&lt;b></bpt>bold<ept i="1">&lt;/b></ept> end', "a bold end"),
        ("line<ph>{n <sub>x</sub>}</ph>s<it pos='begin'>&lt;i></it> and <ut>{\\f}</ut>more", "lines and more"),
        ("a <hi>b <hi>c</hi> d</hi> e", "a b c d e"),
        ("&#x732B; &lt;b&gt; <![CDATA[<x> & y]]>", "猫 <b> <x> & y"),
        ("\n  two\n  lines\n", "two\n  lines"),
    ],
)
def test_codes_of_the_layout_are_no_text(segment: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.tmx", tmx(f"en={segment}|de=x"))
    assert read(path, pairs=["en-de"])[0].source == text


def test_other_ways_to_write_tmx(tmp_path: Path) -> None:
    doctype = '<!DOCTYPE tmx SYSTEM "tmx14.dtd">'
    spaced = tmx("en=one|de=eins").replace("<tmx ", '<tmx xmlns="http://www.lisa.org/tmx14" ')
    files = {
        "doctype": tmx("en=one|de=eins", before=doctype),
        "namespace": spaced,
        "old": tmx("en=one|de=eins", lang="lang"),
        "utf16": tmx("en=one|de=eins").encode("utf-16"),
        "latin": tmx("en=one|de=ein\u00df").replace("?>", ' encoding="iso-8859-1"?>', 1).encode("latin-1"),
        "twice": tmx("en=one|en=two|de=eins|de=zwei"),
    }
    for name, content in files.items():
        pairs = read(write(tmp_path / f"{name}.tmx", content), pairs=["en-de"])
        assert [pair.source for pair in pairs] == ["one"], name
        assert pairs[0].target == ("ein\u00df" if name == "latin" else "eins")


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    text = "word " * 200
    path = write(tmp_path / "in.tmx", tmx(*[f"en={text}{n}|de={n}" for n in range(5000)]))
    assert path.stat().st_size > 5_000_000
    next(read_tmx(path))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_tmx(path)) == 5000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "declared", ['<!ENTITY a "aaaa">', '<!ENTITY a SYSTEM "file:///etc/passwd">', "<!ENTITY % a 'b'>"]
)
def test_entities_are_refused(declared: str, tmp_path: Path) -> None:
    content = tmx("en=&a;|de=eins", before=f"<!DOCTYPE tmx [\n{declared}\n]>")
    for path in (
        write(tmp_path / "in.tmx", content),
        write(tmp_path / "16.tmx", content.encode("utf-16")),
        write(tmp_path / "late.tmx", content.replace("<!DOCTYPE", f"<!--{'-x' * 100_000}--><!DOCTYPE")),
    ):
        assert f"{path} declares the entity 'a', which is not read" in str(fault(path, pairs=["en-de"]))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("no xml", "in.tmx is not XML, or it is broken: syntax error: line 1"),
        ("", "in.tmx is not XML, or it is broken: no element found"),
        (tmx("en=one|de=eins", "en=two|de=zwei")[:-40], "in.tmx is not XML, or it is broken: no element found: line 4"),
        (tmx("en=a & b|de=eins"), "in.tmx is not XML, or it is broken: not well-formed"),
        (tmx("en=a &nbsp; b|de=eins"), "undefined entity"),
        (
            tmx("en=one|de=eins").encode() + b"\xff",
            "in.tmx is not XML, or it is broken: not well-formed (invalid token): line 3",
        ),
        (tmx("en=a|de=b").replace("?>", ' encoding="klingon"?>', 1), "in.tmx is not XML, or it is broken"),
        ("<html><body><p>x</p></body></html>", "in.tmx is not TMX: it has the element <html>"),
        (tmx(), "in.tmx has no translation unit"),
        (tmx("en=one|de=eins", "en=two|de= "), "in.tmx, unit 2: 'de' is empty"),
        (tmx("en-GB=|de=zwei"), "in.tmx, unit 1: 'en-GB' is empty"),
        (tmx("en=one|de=eins").replace("<seg>eins</seg>", ""), "in.tmx, unit 1: 'de' is empty"),
    ],
)
def test_broken_files(content: str | bytes, part: str, tmp_path: Path) -> None:
    assert part in str(fault(write(tmp_path / "in.tmx", content), pairs=["en-de"]))


def test_broken_packed_files(tmp_path: Path) -> None:
    assert "a.tmx.gz is not a gzip file" in str(fault(write(tmp_path / "a.tmx.gz", tmx("en=a|de=b"))))
    cut = gzip.compress(tmx("en=one|de=eins").encode())[:-9]
    assert "b.tmx.gz is not a gzip file, or it is broken" in str(fault(write(tmp_path / "b.tmx.gz", cut)))
