"""The layout of drawings: boxes apart, edges downwards, everything within the picture."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fusion_passes import drawing
from fusion_passes.sketches import Box, Sketch


def random_sketch(seed: int) -> Sketch:
    """Up to 25 boxes, each of which but the first reads up to three before it."""
    draw = random.Random(seed)
    count = draw.randint(1, 25)
    edges = {(draw.randrange(i), i) for i in range(1, count) for _ in range(draw.randint(0, 3))}
    boxes = tuple(Box("step", "x" * draw.randint(1, 60), ("y",) * draw.randint(0, 4), f"box {i}") for i in range(count))
    return Sketch(boxes, tuple(sorted(edges)), count, 0)


def placed(sketch: Sketch) -> tuple[ElementTree.Element, dict[str, tuple[float, float, float, float]]]:
    """The picture, and left, top, right and bottom of each box by its tip."""
    root = ElementTree.fromstring(drawing.svg(sketch, "A <title>"))
    boxes = {}
    for group in root.iter("g"):
        rect, tip = group.find("rect"), group.find("title")
        assert rect is not None and tip is not None and tip.text
        x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        boxes[tip.text] = (x, y, x + width, y + height)
    return root, boxes


@pytest.mark.parametrize("seed", range(25))
def test_boxes_are_apart_and_read_from_above(seed: int) -> None:
    sketch = random_sketch(seed)
    root, boxes = placed(sketch)
    assert len(boxes) == len(sketch.boxes)
    places = list(boxes.values())
    for i, (left, top, right, bottom) in enumerate(places):
        for other in places[:i]:
            assert right < other[0] or left > other[2] or bottom < other[1] or top > other[3]
        assert 0 <= left and right <= float(root.attrib["width"])
        assert 0 <= top and bottom <= float(root.attrib["height"])
    for source, reader in sketch.edges:
        assert boxes[f"box {source}"][3] < boxes[f"box {reader}"][1]
    heads = [path for path in root.iter("path") if path.attrib["class"] == "head"]
    assert len(heads) == len(sketch.edges)


def test_an_input_is_just_above_its_reader() -> None:
    chain = tuple(Box("step", f"{i}", (), f"box {i}") for i in range(4))
    sketch = Sketch((*chain, Box("input", "late", (), "late")), ((0, 1), (1, 2), (2, 3), (4, 3)), 4, 0)
    _, boxes = placed(sketch)
    assert boxes["late"][1] == boxes["box 2"][1]


def test_an_edge_passes_the_boxes_that_it_skips() -> None:
    sketch = Sketch(tuple(Box("step", "same", (), f"box {i}") for i in range(3)), ((0, 1), (1, 2), (0, 2)), 3, 0)
    root, boxes = placed(sketch)
    left, top, right, bottom = boxes["box 1"]
    (through,) = [p.attrib["d"] for p in root.iter("path") if re.search(r"v\d+$", p.attrib["d"])]
    x, y, down = map(float, re.findall(r"(\S+) (\S+?)v(\d+)$", through)[0])
    assert (x < left or x > right) and y <= top and y + down >= bottom


def test_long_lines_are_cut_and_the_tip_is_whole() -> None:
    box = Box("step", "a title that is too long to be shown " * 2, ("1 & 2",), "the <whole>")
    root, _ = placed(Sketch((box,), (), 1, 0))
    title, line = [text.text for text in root.iter("text")]
    assert title is not None and title.endswith("…") and box.title.startswith(title[:-1]) and line == "1 & 2"
    assert [t.text for t in root.iter("title")] == ["A <title>", "the <whole>"]


def test_nothing_to_draw_is_an_empty_picture() -> None:
    root, boxes = placed(Sketch((), (), 0, 0))
    assert not boxes and root.attrib["role"] == "img"
