"""What a report draws: the part of a graph that a fusion looked at, in words and without FX.

A sketch is taken from the graph while the pass runs, before and after the rewrite, and only for `explain`. It holds
text alone, so that it outlives the graph. Large parts are folded (`fusion_passes.folding`) to what can be taken in.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

from fusion_passes import aten, cone, estimates
from fusion_passes.estimates import constants, has_tensor
from fusion_passes.folding import Group, fold, is_view
from fusion_passes.fusion import Site, dtype_name
from fusion_passes.sizes import Sizes

Kind = Literal["input", "constant", "step", "fold", "fused", "result"]

# Nodes drawn around an anchor that led to nothing.
_NEIGHBOURHOOD = 12

_WORDS = {
    "mm": "matrix product", "bmm": "matrix products", "addmm": "matrix product and sum",
    "baddbmm": "matrix products and sum", "mul": "multiply", "add": "add", "sub": "subtract", "div": "divide",
    "neg": "negate", "exp": "exponential", "log": "logarithm", "log1p": "logarithm of 1 + x",
    "expm1": "exponential - 1", "sqrt": "square root", "rsqrt": "1 / square root", "pow": "power",
    "reciprocal": "1 / x", "abs": "absolute value", "where": "choose by mask", "gt": "is greater than",
    "ge": "is at least", "lt": "is less than", "le": "is at most", "eq": "equals", "ne": "differs from",
    "bitwise_and": "and", "bitwise_or": "or", "bitwise_not": "not", "logical_and": "and", "logical_or": "or",
    "logical_not": "not", "sum": "sum", "mean": "mean", "cumsum": "cumulative sum", "amax": "maximum",
    "amin": "minimum", "topk": "largest entries", "sort": "sort", "select": "take one index", "slice": "slice",
    "permute": "reorder axes", "transpose": "swap axes", "t": "transpose", "unsqueeze": "new axis",
    "squeeze": "drop axis", "expand": "repeat as a view", "repeat": "repeat", "view": "reshape", "reshape": "reshape",
    "_unsafe_view": "reshape", "clone": "copy", "cat": "concatenate", "stack": "stack", "constant_pad_nd": "pad",
    "tril": "lower triangle", "triu": "upper triangle", "slice_scatter": "write a slice",
    "select_scatter": "write at an index", "copy": "overwrite", "copy_": "write in place", "iota": "positions",
    "arange": "positions", "full": "constant", "full_like": "constant", "empty": "empty tensor", "split": "split",
    "split_with_sizes": "split", "unbind": "split", "index": "look up", "as_strided": "strided view",
    "linalg_solve_triangular": "triangular solve", "triangular_solve": "triangular solve",
    "as_strided_scatter": "write a strided view", "clamp": "clamp", "clamp_min": "clamp from below",
    "clamp_max": "clamp from above", "logical_xor": "exclusive or", "zeros": "zeros", "ones": "ones",
    "gather": "look up", "embedding": "look up rows", "convolution": "convolution", "_softmax": "softmax",
    "index_put": "write at indices",
}  # fmt: skip

# Between the word and a number: "multiply by 2", "is greater than 20".
_JOINED = {"mul": " by ", "div": " by ", "clamp_min": " at ", "clamp_max": " at "}


@dataclasses.dataclass(frozen=True)
class Box:
    """One box of a drawing.

    Attributes:
        kind: what the box stands for.
        title: its first line, such as the name of an operator in words.
        lines: further lines, such as shape and dtype.
        tip: the whole in a sentence, with the names that the graph uses.
    """

    kind: Kind
    title: str
    lines: tuple[str, ...]
    tip: str = dataclasses.field(compare=False)  # equal layers are drawn once, whatever their nodes are called


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A part of a graph.

    Attributes:
        boxes: what is drawn.
        edges: pairs of positions in `boxes`: the second reads the first.
        operators: how many operators the boxes stand for, beside views.
        views: how many views they stand for: operators that move no value.
    """

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]
    operators: int
    views: int


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A site as the model has it, and as it is compiled.

    Attributes:
        before: the operators between leaves and results, or those around the anchor of a near miss.
        after: what took their place; None where nothing was replaced.
        held: bytes that intermediates hold at once in `before`, counting the results of operators that Inductor always
            writes to memory, such as products, sums and scans. None where there are none.
    """

    before: Sketch
    after: Sketch | None = None
    held: int | None = None


def of_site(site: Site, sizes: Sizes) -> Drawing:
    """A matched site, before anything is replaced."""
    nodes = estimates.between(site)
    names = {leaf: name for name, leaf in site.leaves.items()}
    return Drawing(sketch(nodes, site.outputs, names), held=estimates.held(nodes, site, sizes))


def rewritten(drawing: Drawing, site: Site, graph: Graph, before: Collection[Node]) -> Drawing:
    """The drawing with what is in the graph now and was not `before`."""
    names = {leaf: name for name, leaf in site.leaves.items()}
    new = {node: None for node in graph.nodes if node not in before and (node.users or node.is_impure())}
    results = [node for node in new if not node.users or any(user not in new for user in node.users)]
    return dataclasses.replace(drawing, after=sketch(list(new), results or list(names), names))


def around(anchor: Node) -> Drawing:
    """The operators that lead to an anchor, breadth first."""
    nodes, queue = {anchor}, [anchor]
    for node in queue:
        for source in node.all_input_nodes:
            if len(nodes) < _NEIGHBOURHOOD and source not in nodes and cone.is_transparent(source):
                nodes.add(source)
                queue.append(source)
    return Drawing(sketch(sorted(nodes), [anchor], {}))


def sketch(nodes: Sequence[Node], results: Sequence[Node], names: Mapping[Node, str]) -> Sketch:
    """The boxes for `nodes`, which are in graph order, with what they read and the results they give.

    Args:
        nodes: operators to draw.
        results: which of them are needed elsewhere; a result may also be an input.
        names: inputs that have a name of their own.

    Constants are drawn where a single operator reads them, unless they are plain numbers.
    """
    tensors = [node for node in nodes if has_tensor(node) and node not in names]
    constant = constants(tensors)
    if not constant.isdisjoint(results):
        constant = set()  # they are what is to be seen
    inside = set(tensors)
    groups = fold([node for node in tensors if node not in constant])
    boxes: list[Box] = [_group_box(group) for group in groups]
    place = {node: i for i, group in enumerate(groups) for node in group.nodes}
    hidden = inside - constant - set(place)
    edges: dict[tuple[int, int], None] = {}

    def position(node: Node, folded: bool = False) -> int | None:
        while node in hidden:
            node = node.all_input_nodes[0]
        if node not in place:
            if not has_tensor(node) or (node in constant and (folded or node.meta["val"].dim() == 0)):
                return None
            place[node] = len(boxes)
            boxes.append(_constant_box(node) if node in constant else _input_box(node, names.get(node)))
        return place[node]

    for i, group in enumerate(groups):
        for source in (source for node in group.nodes for source in node.all_input_nodes):
            at = position(source, folded=len(group.nodes) > 1)
            if at is not None and at != i:
                edges[at, i] = None
    for number, node in enumerate(results):
        at = position(node)
        if at is not None:
            edges[at, len(boxes)] = None
            title = "result" if len(results) == 1 else f"result {number + 1}"
            tip = f"{title}, {', '.join(_value(node))}: {node.name}, which the rest of the graph reads"
            boxes.append(Box("result", title, _value(node), tip))
    views = sum(is_view(node) for node in inside - constant)
    return Sketch(tuple(boxes), tuple(edges), len(inside - constant) - views, views)


def word(node: Node) -> str:
    """An operator in words, with the number it is applied to, if there is one."""
    if node.op == "placeholder":
        return "input of the graph"
    if node.op == "get_attr":
        return "constant of the model"
    if node.target is operator.getitem:
        return f"output {int(str(node.args[1])) + 1}"
    if node.target in aten.CASTS:
        return f"cast to {dtype_name(node.meta['val'].dtype)}"
    base = _base(node)
    text = _WORDS.get(base, base.strip("_").replace("_", " "))
    if node.target in aten.POINTWISE and len(node.args) > 1 and isinstance(node.args[1], (int, float)):
        text += f"{_JOINED.get(base, ' ')}{node.args[1]:.4g}"
    return text


def _base(node: Node) -> str:
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def _is_fused(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "fusion_passes"


def _group_box(group: Group) -> Box:
    first = group.nodes[0]
    if len(group.nodes) == 1 and not group.repeats:
        if _is_fused(first):
            return Box("fused", _base(first), ("one fused op",), f"the fused op {_base(first)}: {first.name}")
        return Box("step", word(first), _value(first), f"{word(first)}, gives {', '.join(_value(first))}: {first.name}")
    names = [word(node) for node in group.nodes]
    counts = {name: names.count(name) for name in names}
    if group.repeats:
        title = f"repeated {group.repeats} times"
        lines = _wrapped(names[: len(names) // group.repeats], " → ")
    elif group.in_a_row:
        title, lines = f"{len(names)} operators in a row", _wrapped(names, " → ")
    else:
        title = f"… {len(names)} more operators"
        often = sorted(counts, key=lambda name: -counts[name])
        lines = _wrapped([f"{counts[name]} × {name}" for name in often], ", ")
    whole = ", ".join(f"{count} × {name}" for name, count in counts.items())
    return Box("fold", title, tuple(lines), f"{title}: {whole}; {first.name} to {group.nodes[-1].name}")


def _wrapped(names: Sequence[str], joint: str, width: int = 34, most: int = 4) -> list[str]:
    """The names in lines of about `width` characters; what does not fit into `most` lines is left out."""
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) > width:
            if len(lines) == most:
                lines[-1] += "…"
                break
            lines.append("")
        lines[-1] += name + joint
    return [line.removesuffix(joint) if i == len(lines) - 1 else line.rstrip() for i, line in enumerate(lines)]


def _input_box(node: Node, name: str | None) -> Box:
    origin = f"{node.name}, {word(node)}"
    tip = f"reads {name or 'a tensor'}, {', '.join(_value(node))}: {origin}"
    return Box("input", name or word(node), _value(node), tip)


def _constant_box(node: Node) -> Box:
    tip = f"{node.name}, {', '.join(_value(node))}: computed from constants and positions alone"
    title = word(node) if node.target in aten.FILLS else "from constants"
    return Box("constant", title, _value(node), tip)


def _value(node: Node) -> tuple[str, ...]:
    """Shape and dtype of a node's value."""
    value: Any = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return (f"{len(value)} tensors",)
    return " × ".join(str(n) for n in value.shape) or "a number", dtype_name(value.dtype)
