"""Writes docs/pictures: the drawings of docs/matching.md, made from the graph of the example on that page.

    python docs/pictures.py

Whatever a picture shows is computed here: graphs are traced, places followed and values sampled by the plugin itself.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from fusion_passes import cone, drawing, explain, probe, sketches
from fusion_passes.access import trace_access
from fusion_passes.evaluate import hashed
from fusion_passes.explanation import tracing_backend
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns import _gate
from fusion_passes.sizes import Sizes, assignments
from fusion_passes.sketches import Sketch

FOLDER = Path(__file__).resolve().parent / "pictures"

# GitHub shows pictures on a light or a dark page: each brings its own ground.
STYLE = """
text{font:11px system-ui,sans-serif;text-anchor:middle;fill:#1f2328}
.title{font-weight:600} .left{text-anchor:start} .right{text-anchor:end} .faint{fill:#59636e}
.name{font:600 12px ui-monospace,monospace} .head2{font-size:13px;font-weight:600}
.ground{fill:#fff;stroke:#d1d9e0} rect{fill:#fff;stroke:#d1d9e0}
.input rect,.result rect,.constant rect{fill:#ddf4ff;stroke:#0969da} .constant rect{stroke-dasharray:2 2}
.fused rect{fill:#dafbe1;stroke:#1a7f37;stroke-width:2}
.anchor rect{fill:#fff1c2;stroke:#9a6700;stroke-width:2} .inside rect{fill:#fff8e1;stroke:#bf8700}
.leaf rect{fill:#ddf4ff;stroke:#0969da;stroke-width:2} .outside{opacity:.45}
.edge{fill:none;stroke:#59636e;opacity:.6} .head{fill:#59636e}
.cell{stroke:#d1d9e0;fill:#fff} .hit{fill:#bf8700;stroke:#9a6700} .row{fill:#fff1c2;stroke:#d1d9e0}
.axis{stroke:#8c959f;fill:none} .curve{stroke:#0969da;fill:none;stroke-width:1.5}
.dot{fill:#1a7f37;stroke:none} .off{fill:#cf222e;stroke:none} .state{stroke:#9a6700;stroke-width:2;fill:none}
"""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pictures() -> dict[str, str]:
    """Every picture by the name of its file."""
    example = Example.traced()
    return {
        "graph.svg": _graph(example),
        "cone.svg": _cone(example),
        "places.svg": _places(example),
        "values.svg": _values(example),
        "rewrite.svg": _rewrite(),
        "chunks.svg": _chunks(),
    }


# --- the example of the page -----------------------------------------------------------------------------------------


def gate(raw: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    log_decay = -a_log.exp()[:, None] * F.softplus(raw + bias)
    return log_decay.unflatten(1, (-1, 64)).cumsum(2)


def block(x: torch.Tensor, weight: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return gate((x @ weight).unflatten(-1, bias.shape), a_log, bias).exp()


def lookalike(x: torch.Tensor, weight: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    raw = (x @ weight).unflatten(-1, bias.shape)
    log_decay = -a_log.exp()[:, None] * F.softplus(raw + bias).clamp(max=15)
    return log_decay.unflatten(1, (-1, 64)).cumsum(2).exp()


NAMES = ("x", "weight", "a_log", "bias")


def arguments() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 256, 16), (16, 64), (2,), (2, 32))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@dataclasses.dataclass(frozen=True)
class Example:
    """The traced graph, and the nodes of which the page speaks."""

    graph: Graph
    sizes: Sizes
    anchor: Node
    raw: Node
    a_log: Node
    bias: Node

    @classmethod
    def traced(cls, f: Callable[..., torch.Tensor] = block) -> Example:
        graphs: list[Graph] = []
        look: Any = graphs.append  # stands where the pass stands, and sees what it sees
        torch._dynamo.reset()
        torch.compile(f, backend=tracing_backend(look))(*arguments())
        torch._dynamo.reset()
        (graph,) = graphs
        by_shape = {tuple(n.meta["val"].shape): n for n in graph.nodes if n.op == "placeholder"}
        (anchor,) = graph.find_nodes(op="call_function", target=torch.ops.aten.cumsum.default)
        (product,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        raw = cone.last_alias(product, cone.backward(anchor.args[0]).interior)
        return cls(graph, assignments(graph)[0], anchor, raw, by_shape[2,], by_shape[2, 32])

    @property
    def root(self) -> Node:
        root = self.anchor.args[0]
        assert isinstance(root, Node)
        return root

    @property
    def leaves(self) -> list[Node]:
        return [self.raw, self.a_log, self.bias]

    def sketch(self) -> Sketch:
        """The whole graph, one box for each node."""
        operators = [node for node in self.graph.nodes if node.op == "call_function"]
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        by_shape = {tuple(argument.shape): name for argument, name in zip(arguments(), NAMES)}
        names = {node: by_shape[tuple(node.meta["val"].shape)] for node in inputs}
        return sketches.sketch(operators, self.graph.output_node().all_input_nodes, names)


# --- graphs ----------------------------------------------------------------------------------------------------------


def _graph(example: Example) -> str:
    picture, width, height = _drawn(example.sketch(), "The graph of the example")
    return _svg("The graph of the example: boxes are operators, arrows are tensors", width, height, picture)


def _cone(example: Example) -> str:
    """The graph again, with the anchor, what is walked back through, and the leaves."""
    interior = cone.backward(example.root, stop=example.leaves).interior
    kinds = {example.anchor.name: "anchor", **{node.name: "inside" for node in interior}}
    kinds |= {node.name: "leaf" for node in example.leaves}
    sketch = example.sketch()
    named = [dataclasses.replace(b, title="raw") if _node_of(b.tip) == example.raw.name else b for b in sketch.boxes]
    whole = dataclasses.replace(sketch, boxes=tuple(named))
    picture, width, height = _drawn(whole, "The cone of the cumulative sum", kinds)
    legend = (("anchor", "the anchor", 10), ("inside", "walked back through", 110), ("leaf", "leaves", 260))
    keys = "".join(
        f'<g class="{kind}"><rect x="{x}" y="{height + 8:.0f}" width="14" height="14" rx="3"/>'
        f'<text class="left" x="{x + 20}" y="{height + 19:.0f}">{text}</text></g>'
        for kind, text, x in legend
    )
    return _svg("From the anchor the search walks back to the leaves", width, height + 32, picture + keys)


def _rewrite() -> str:
    """Before and after, as the report draws them."""
    report = explain(block, *arguments())
    (record,) = report.fused
    found = report.drawings[record]
    assert found.after is not None
    parts, left, tallest = [], 0.0, 0.0
    for name, sketch in (("before", found.before), ("after", found.after)):
        picture, width, height = _drawn(sketch, name)
        parts.append(f'<text class="head2 left" x="{left + 10:.0f}" y="20">{name}</text>')
        parts.append(f'<g transform="translate({left:.0f} 24)">{picture}</g>')
        left, tallest = left + width + 30, max(tallest, height + 24)
    return _svg("The site before and after the rewrite", left - 30, tallest, "".join(parts))


def _drawn(sketch: Sketch, title: str, kinds: Mapping[str, str] | None = None) -> tuple[str, float, float]:
    """The inside of a drawing, and its size. With `kinds`, boxes take those of their nodes, and others step back."""
    if kinds is not None:
        classes: list[Any] = [kinds.get(_node_of(box.tip), f"outside {box.kind}") for box in sketch.boxes]
        boxes = [dataclasses.replace(box, kind=kind) for box, kind in zip(sketch.boxes, classes)]
        sketch = dataclasses.replace(sketch, boxes=tuple(boxes))
    text = drawing.svg(sketch, title)
    size = re.search(r'width="(\d+)" height="(\d+)"', text)
    assert size is not None
    inner = re.sub(r"^<svg[^>]*><title>[^<]*</title>|</svg>$", "", text)
    return inner, float(size[1]), float(size[2])


def _node_of(tip: str) -> str:
    """The name of the graph's node in the tip of its box."""
    return tip.rpartition(": ")[2].partition(",")[0]


# --- places ----------------------------------------------------------------------------------------------------------

SHOWN = ((0, 1, 3, 1, 4), (0, 0, 6, 0, 9))


def _places(example: Example) -> str:
    """Which element of each leaf an element of the result reads, followed through the graph."""
    coords = [torch.tensor(axis) for axis in zip(*SHOWN)]
    root = example.root
    leaves = (("raw", example.raw), ("a_log", example.a_log), ("bias", example.bias))
    reads = {n: trace_access(root, n, coords, example.sizes, stop=example.leaves).coords for _, n in leaves}
    heads = ("an element of the sum's input", *(f"reads {name}" for name, _ in leaves))
    axes = ("[chunk, position, head, channel]", "[token, head, channel]", "[head]", "[head, channel]")
    rows: list[tuple[str, ...]] = [axes]
    for i, place in enumerate(SHOWN):
        found = [[int(axis[i]) for axis in reads[node]] for _, node in leaves]
        shown = [place[1:], found[0][1:], *found[1:]]
        rows.append(tuple(f"[{', '.join(map(str, numbers))}]" for numbers in shown))
    edges, parts = (10, 240, 430, 560), []
    for x, head in zip(edges, heads):
        parts.append(f'<text class="left title" x="{x}" y="22">{head}</text>')
    for i, row in enumerate(rows):
        for x, text in zip(edges, row):
            kind = "left faint" if i == 0 else "left name"
            parts.append(f'<text class="{kind}" x="{x}" y="{42 + 22 * i}">{text}</text>')
    parts.append(_tokens(example, coords, reads[example.raw], top=110))
    return _svg("Where the elements of the leaves end up", 690, 268, "".join(parts))


def _tokens(example: Example, coords: Sequence[torch.Tensor], raw: Sequence[torch.Tensor], top: int) -> str:
    """Chunks of the result and the tokens of raw, the first positions of each, and the places in both."""
    parts, cell, chunks, length, columns = [], 14, 4, 64, 9
    parts.append(f'<text class="left title" x="10" y="{top}">result, by chunk and position</text>')
    parts.append(f'<text class="left title" x="10" y="{top + 106}">raw, by token</text>')
    hits = {(int(n), int(c)): int(t) for n, c, t in zip(coords[1], coords[2], raw[1])}
    for chunk in range(chunks):
        for position in range(columns):
            x, y = 60 + chunk * (columns + 2) * cell + position * cell, top + 12
            hit = (chunk, position) in hits
            kind = "hit" if hit else "cell"
            parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{cell}" height="{cell}"/>')
            parts.append(f'<rect class="{kind}" x="{x}" y="{y + 106}" width="{cell}" height="{cell}"/>')
            if hit:
                token = hits[chunk, position]
                assert token == chunk * length + position
                middle = x + cell / 2
                parts.append(_arrow(middle, y + 106, middle, y + cell + 2))
                parts.append(f'<text class="left" x="{middle + 6}" y="{y + 64}">token {token}</text>')
        x = 60 + chunk * (columns + 2) * cell
        parts.append(f'<text class="left faint" x="{x}" y="{top + 42}">chunk {chunk}</text>')
        parts.append(f'<text class="left faint" x="{x}" y="{top + 148}">tokens {chunk * length} on …</text>')
    return "".join(parts)


def _arrow(x1: float, y1: float, x2: float, y2: float, kind: str = "edge") -> str:
    """A straight arrow, with its head at the end."""
    angle = math.atan2(y2 - y1, x2 - x1)
    back, side = 8, 4
    bx, by = x2 - back * math.cos(angle), y2 - back * math.sin(angle)
    dx, dy = side * math.sin(angle), side * math.cos(angle)
    head = f"M{x2:.0f} {y2:.0f}L{bx - dx:.0f} {by + dy:.0f}L{bx + dx:.0f} {by - dy:.0f}z"
    return f'<path class="{kind}" d="M{x1:.0f} {y1:.0f}L{bx:.0f} {by:.0f}"/><path class="head" d="{head}"/>'


# --- values ----------------------------------------------------------------------------------------------------------


def _values(example: Example) -> str:
    """Sampled values beside the formula: those of the gate, and those of one that looks alike."""
    other = Example.traced(lookalike)
    verdict = "all agree: it is the gate"
    parts = [_plot(example, 0, "the example", verdict)]
    try:
        _gate.identify(other.root, other.raw, [other.a_log, other.bias], _interior(other), other.sizes)
    except NearMiss:
        parts.append(_plot(other, 345, "softplus(…).clamp(max=15)", "some differ: a near miss"))
    found = _gate.identify(example.root, example.raw, example.leaves[1:], _interior(example), example.sizes)
    assert found.scale == 1.0 and found.lower_bound is None and len(parts) == 2
    return _svg("Sampled values and the formula", 690, 300, "".join(parts))


def _interior(example: Example) -> set[Node]:
    return cone.backward(example.root, stop=example.leaves).interior


def _plot(example: Example, left: float, title: str, verdict: str) -> str:
    draws = {example.raw: hashed(1, -30.0, 30.0), example.a_log: hashed(100, -1.5, 1.5)}
    draws |= {example.bias: hashed(101, -1.5, 1.5)}
    run = probe.sample(example.root, draws, example.sizes, count=90, seed=1)
    z = run.leaves[example.raw] + run.leaves[example.bias]
    values = -run.values / run.leaves[example.a_log].exp()
    wanted = F.softplus(z)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + 50 + (x + 32) / 64 * 280, 250 - y / 32 * 200

    agree = (values - wanted).abs() <= probe.RELATIVE * wanted.abs() + 1e-12
    parts = [f'<text class="head2" x="{left + 190}" y="22">{title}</text>']
    (x0, y0), (x1, _), (_, y1) = at(-32, 0), at(32, 0), at(0, 32)
    parts.append(f'<path class="axis" d="M{x0:.0f} {y0:.0f}H{x1:.0f}M{x0:.0f} {y0:.0f}V{y1:.0f}"/>')
    for tick in (-30, -15, 0, 15, 30):
        x, _ = at(tick, 0)
        parts.append(f'<text class="faint" x="{x:.0f}" y="{y0 + 15:.0f}">{tick}</text>')
    for tick in (0, 15, 30):
        _, y = at(0, tick)
        parts.append(f'<text class="faint right" x="{x0 - 6:.0f}" y="{y + 4:.0f}">{tick}</text>')
    parts.append(f'<text class="faint" x="{left + 190}" y="{y0 + 30:.0f}">raw + bias, drawn at random</text>')
    parts.append(f'<text class="faint left" x="{x0 + 6:.0f}" y="{y1 + 8:.0f}">value of the graph / -exp(a_log)</text>')
    line = [at(x / 4, float(F.softplus(torch.tensor(x / 4)))) for x in range(-128, 125)]
    parts.append(f'<path class="curve" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in line)}"/>')
    for a, b, same in zip(z.tolist(), values.tolist(), agree.tolist()):
        x, y = at(a, b)
        parts.append(f'<circle class="{"dot" if same else "off"}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    assert bool(agree.all()) == verdict.startswith("all agree")
    colour = "#1a7f37" if bool(agree.all()) else "#cf222e"
    parts.append(f'<text class="left" style="fill:{colour}" x="{x0 + 6:.0f}" y="{y1 + 26:.0f}">{verdict}</text>')
    return "".join(parts)


# --- the loop over chunks --------------------------------------------------------------------------------------------


def _chunks() -> str:
    """An unrolled loop over four chunks, and the one step that it is rolled up to."""
    parts, wide, step = [], 130, 150
    for i in range(4):
        x = 20 + step * i
        parts.append(_box(x, 40, wide, f"rows of chunk {i}", ("q, k, v, decay, beta",), "input"))
        parts.append(_arrow(x + wide / 2, 84, x + wide / 2, 110))
        parts.append(_box(x, 110, wide, f"step {i}", ("about 40 operators", "per head, per channel 55"), "inside"))
        parts.append(_arrow(x + wide / 2, 168, x + wide / 2, 194))
        parts.append(_box(x, 194, wide, f"results of chunk {i}", (), "result"))
        if i:
            parts.append(_arrow(x - step + wide, 139, x, 139))
            parts.append(f'<text class="faint" x="{x - (step - wide) / 2}" y="132">S</text>')
    parts.append('<text class="left head2" x="20" y="24">the graph: a loop that was unrolled</text>')
    parts.append('<text class="left head2" x="20" y="262">what is proved of it</text>')
    rows = (
        ("1", "each step reads rows of its own chunk, and of the chunks before it one tensor: the state S"),
        ("2", "step i + 1 is the graph of step i, operator by operator, with the number of the chunk moved by one"),
        ("3", "a step of each kind, on random rows and a random state, gives the rows and the state of the formula"),
    )
    for i, (number, text) in enumerate(rows):
        y = 286 + 22 * i
        parts.append(f'<text class="left name" x="20" y="{y}">{number}</text>')
        parts.append(f'<text class="left" x="38" y="{y}">{text}</text>')
    return _svg("The unrolled loop of a delta rule, rolled up again", 620, 346, "".join(parts))


def _box(x: float, y: float, width: float, title: str, lines: Collection[str], kind: str) -> str:
    height = 18 + 13 * (1 + len(lines))
    middle = x + width / 2
    texts = "".join(
        f'<text class="{"faint" if i else "title"}" x="{middle}" y="{y + 18 + 14 * i}">{html.escape(text)}</text>'
        for i, text in enumerate((title, *lines))
    )
    return f'<g class="{kind}"><rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>{texts}</g>'


def _svg(title: str, width: float, height: float, inner: str) -> str:
    """A picture that can be shown on its own, one element in a line so that differences can be read."""
    w, h = f"{width + 20:.0f}", f"{height + 20:.0f}"
    size = f'width="{w}" height="{h}" viewBox="-10 -10 {w} {h}"'
    ground = f'<rect class="ground" x="-9.5" y="-9.5" width="{width + 19:.0f}" height="{height + 19:.0f}" rx="6"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><title>{html.escape(title)}</title>'
    body = re.sub(r"(?<=>)(?=<(?:g|path|rect|circle|text)\b)", "\n", inner)
    return f"{head}<style>{STYLE}</style>\n{ground}\n{body}\n</svg>\n"


if __name__ == "__main__":
    main()
