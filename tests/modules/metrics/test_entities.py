"""Entities in tags, and their F1, against hand-made cases."""

import pytest

from trunkline.modules.metrics.entities import EntityF1, entities


@pytest.mark.parametrize(
    ("tags", "want"),
    [
        ("", []),
        ("O O", []),
        ("B-A", [("A", 0, 1)]),
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),  # another type begins another entity
        ("O I-A I-A O I-A", [("A", 1, 3), ("A", 4, 5)]),  # IOB1
        ("I-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("B-A O I-A", [("A", 0, 1), ("A", 2, 3)]),
        ("B-X-Y I-X-Y I-X", [("X-Y", 0, 2), ("X", 2, 3)]),
        ("O B-A I-A", [("A", 1, 3)]),
    ],
)
def test_entities(tags: str, want: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == set(want)


def test_entity_f1() -> None:
    metric = EntityF1()
    assert metric.compute() == 0
    true = ["B-PER", "I-PER", "O", "B-LOC", "O", "B-PER", "O"]
    metric.update(["B-PER", "I-PER", "O", "B-PER", "O", "O", "B-LOC"], true)  # 1 right of 3 predicted and 3 true
    assert metric.compute().item() == pytest.approx(2 / 6)
    metric.update(["B-LOC", "I-LOC"], ["B-LOC", "O"])  # a wrong border is wrong
    assert metric.compute().item() == pytest.approx(2 / 8)
    metric.update(["I-LOC"], ["B-LOC"])
    assert metric.compute().item() == pytest.approx(4 / 10)
