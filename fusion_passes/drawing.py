"""Draws a sketch as SVG: layers from top to bottom, inputs just above their first reader.

The layout follows Sugiyama: every box gets a layer below all that it reads, edges over several layers get a bend in
each of them, the boxes of a layer are sorted by the mean place of their neighbours and moved towards it. Lengths are
pixels.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Iterable, Sequence

from fusion_passes.sketches import Box, Sketch

LINE, PAD, CHARACTER, BOLD = 14, 8, 6.1, 6.8
NARROWEST, WIDEST, BEND = 84, 240, 14
BETWEEN, BELOW, MARGIN = 16, 28, 6
SWEEPS = 6

# Curved corners tell inputs and results from operators, without colours.
_RADIUS = {"input": 14, "constant": 14, "result": 14}


@dataclasses.dataclass
class _Place:
    """A box (or, without one, an edge on its way) in its layer; x is that of its centre, y that of its top."""

    box: Box | None
    layer: int
    height: float = 0
    above: list[_Place] = dataclasses.field(default_factory=list, repr=False)
    below: list[_Place] = dataclasses.field(default_factory=list, repr=False)
    x: float = 0
    y: float = 0

    @property
    def width(self) -> float:
        if self.box is None:
            return BEND
        longest = max(BOLD * len(self.box.title), *(CHARACTER * len(line) for line in self.box.lines), 0)
        return min(max(longest + 2 * PAD, NARROWEST), WIDEST)


def svg(sketch: Sketch, title: str) -> str:
    """The drawing as an `<svg>` element whose colours are those of the classes of the page around it.

    Args:
        sketch: what to draw; its edges form no cycle.
        title: what readers of the screen hear of the whole.
    """
    rows = _rows(sketch)
    _arrange(rows)
    places = list(itertools.chain.from_iterable(rows))
    width = max((p.x + p.width / 2 for p in places), default=0) + MARGIN
    height = max((p.y + p.height for p in places), default=0) + MARGIN
    edges = "".join(_edge(p, q) for p in places for q in p.below)
    boxes = "".join(_box(p, p.box) for p in places if p.box is not None)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg role="img" {size}><title>{html.escape(title)}</title>{edges}{boxes}</svg>'


def _layers(sketch: Sketch) -> list[int]:
    """The layer of each box: one below all that it reads; for what reads nothing, just above its first reader."""
    count = len(sketch.boxes)
    sources: list[list[int]] = [[] for _ in range(count)]
    readers: list[list[int]] = [[] for _ in range(count)]
    for source, reader in sketch.edges:
        sources[reader].append(source)
        readers[source].append(reader)
    layers, missing = [0] * count, [len(s) for s in sources]
    ready = [i for i in range(count) if not missing[i]]
    for i in ready:
        for reader in readers[i]:
            layers[reader] = max(layers[reader], layers[i] + 1)
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)
    for i in range(count):
        if not sources[i] and readers[i]:
            layers[i] = min(layers[reader] for reader in readers[i]) - 1
    return layers


def _rows(sketch: Sketch) -> list[list[_Place]]:
    """The boxes of every layer, and the edges that pass it."""
    layers = _layers(sketch)
    rows: list[list[_Place]] = [[] for _ in range(max(layers, default=-1) + 1)]
    places = [_Place(box, layer, LINE * (1 + len(box.lines)) + PAD) for box, layer in zip(sketch.boxes, layers)]
    for place in places:
        rows[place.layer].append(place)
    for source, reader in sketch.edges:
        upper = places[source]
        for layer in range(layers[source] + 1, layers[reader]):
            bend = _Place(None, layer)
            rows[layer].append(bend)
            _connect(upper, bend)
            upper = bend
        _connect(upper, places[reader])
    return rows


def _connect(upper: _Place, lower: _Place) -> None:
    upper.below.append(lower)
    lower.above.append(upper)


def _arrange(rows: Sequence[list[_Place]]) -> None:
    """Order and coordinates of all places."""
    for row in rows:
        _spread(row, [0.0] * len(row))
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {id(p): _mean((q.x for q in (p.above if sweep % 2 == 0 else p.below)), p.x) for p in row}
            row.sort(key=lambda p: wanted[id(p)])
            _spread(row, [wanted[id(p)] for p in row])
    for row in rows:
        _spread(row, [_mean((q.x for q in (*p.above, *p.below)), p.x) for p in row])
    left = min((p.x - p.width / 2 for row in rows for p in row), default=0) - MARGIN
    top = float(MARGIN)
    for row in rows:
        tallest = max(p.height for p in row)
        for place in row:
            place.x -= left
            place.height = place.height or tallest  # edges pass the boxes beside them straight down
            place.y = top + (tallest - place.height) / 2
        top += tallest + BELOW


def _spread(row: Sequence[_Place], wanted: Sequence[float]) -> None:
    """Put the places of a row, in this order, close to where they are wanted and apart from each other.

    Places that would overlap form a block, which as a whole lies at the mean of what its members want.
    """
    offsets = [0.0]
    for left, right in zip(row, row[1:]):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + BETWEEN)
    blocks: list[list[float]] = []  # what members want, less their offsets
    for want, offset in zip(wanted, offsets):
        blocks.append([want - offset])
        while len(blocks) > 1 and _mean(blocks[-2], 0) > _mean(blocks[-1], 0):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    starts = [_mean(block, 0) for block in blocks for _ in block]
    for place, start, offset in zip(row, starts, offsets):
        place.x = start + offset


def _mean(values: Iterable[float], default: float) -> float:
    found = list(values)
    return sum(found) / len(found) if found else default


def _edge(upper: _Place, lower: _Place) -> str:
    """A curve, straight down at both ends; then an arrow where a box is reached, or else straight through the layer."""
    start, end = upper.y + upper.height, lower.y - (5 if lower.box is not None else 0)
    middle = (start + end) / 2
    path = f"M{upper.x:.0f} {start:.0f}C{upper.x:.0f} {middle:.0f} {lower.x:.0f} {middle:.0f} {lower.x:.0f} {end:.0f}"
    if lower.box is None:
        return f'<path class="edge" d="{path}v{lower.height:.0f}"/>'
    return f'<path class="edge" d="{path}"/><path class="head" d="M{lower.x:.0f} {lower.y:.0f}l-4-7h8z"/>'


def _box(place: _Place, box: Box) -> str:
    left, width = place.x - place.width / 2, place.width
    most = int((width - PAD) / CHARACTER)
    shape = f'<rect x="{left:.0f}" y="{place.y:.0f}" width="{width:.0f}" height="{place.height:.0f}"'
    text = "".join(
        f'<text class="{"line" if i else "title"}" x="{place.x:.0f}" y="{place.y + PAD / 2 + LINE * (i + 0.75):.0f}">'
        f"{html.escape(line if len(line) <= most else line[: most - 1] + '…')}</text>"
        for i, line in enumerate((box.title, *box.lines))
    )
    tip = f"<title>{html.escape(box.tip)}</title>"
    return f'<g class="{box.kind}">{tip}{shape} rx="{_RADIUS.get(box.kind, 3)}"/>{text}</g>'
