"""An MLA key as two parts along its columns: what is written where, and from which elements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import advice
from fusion_passes import aten as semantics
from fusion_passes.access import AxisMap, trace_access
from fusion_passes.axes import fit_axes
from fusion_passes.fusion import NearMiss, dtype_name
from fusion_passes.layout import Piece, refine
from fusion_passes.patterns._mla_chain import FLOAT8, FLOATS, Chain, read_from, repeats, walk
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import Coords, axis_of, concrete_tensors, ravel, slice_start, unravel

aten = torch.ops.aten

NARROWEST = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns `start` to `end` of a frame, the tensor that a build makes, and where they come from.

    Attributes:
        source: the node that is written there; it has the frame's rows, in a shape of its own.
        chain: from the source back to the tensor that is read.
        leaf: the view of that tensor that the fused op reads.
    """

    start: int
    end: int
    source: Node
    chain: Chain
    leaf: Node

    @property
    def width(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Build:
    """A frame, its parts in the order of their columns, and the nodes that put it together."""

    frame: Node
    parts: tuple[Part, ...]
    nodes: frozenset[Node]


def parse(frame: Node, sizes: Sizes) -> Build:
    """The parts of a concatenation, or of a chain of writes into one tensor.

    Raises:
        NearMiss: parts overlap, leave a gap, or lie along another axis than the last.
    """
    if frame.target is aten.cat.default:
        spans, nodes = _concatenated(frame, sizes), {frame}
    else:
        spans, nodes = _written(frame, sizes)
    spans = sorted((span for span in spans if span[0] < span[1]), key=lambda span: span[:2])
    columns = sizes.shape(frame)[-1]
    for (_, end), (start, _) in zip([(0, 0), *(s[:2] for s in spans)], [*(s[:2] for s in spans), (columns, columns)]):
        if end > start:
            raise NearMiss(f"its parts overlap: columns {start} to {min(end, columns)} are written twice")
        if end < start:
            raise NearMiss(f"its parts leave a gap: columns {end} to {start} are not written")
    parts = []
    for start, end, source in spans:
        chain = walk(source, sizes)
        parts.append(Part(start, end, source, chain, read_from(chain)))
    return Build(frame, tuple(parts), frozenset(nodes))


Span = tuple[int, int, Node]


def _concatenated(frame: Node, sizes: Sizes) -> list[Span]:
    call, rank = semantics.arguments(frame), len(sizes.shape(frame))
    if axis_of(call["dim"], rank) != rank - 1:
        raise NearMiss(f"its parts lie along axis {call['dim']} of {rank}, not along the columns")
    spans, begin = [], 0
    for source in call["tensors"]:
        width = sizes.shape(source)[-1]
        spans.append((begin, begin + width, source))
        begin += width
    return spans


def _written(frame: Node, sizes: Sizes) -> tuple[list[Span], set[Node]]:
    """The writes into the columns of a tensor that holds nothing else, and the nodes between them."""
    spans: list[Span] = []
    nodes: set[Node] = set()
    columns = sizes.shape(frame)[-1]
    at = frame
    while True:
        nodes.add(at)
        if at.target in semantics.RESHAPES or at.target in semantics.COPIES:
            at = _input(at)
            if sizes.shape(at)[-1:] != (columns,):
                raise NearMiss("it is reshaped between writes, across its columns")
        elif at.target is aten.slice_scatter.default:
            spans.append(_span(at, sizes))
            at = _input(at)
        elif at.target in semantics.FILLS:
            return spans, nodes
        else:
            # A tensor of the caller, all of which has to be overwritten, or a value that was written to all columns.
            spans += [(0, columns, at)] if at.op == "call_function" else []
            return spans, nodes - {at}


def _span(write: Node, sizes: Sizes) -> Span:
    call, shape = semantics.arguments(write), sizes.shape(write)
    axis = axis_of(call["dim"], len(shape))
    start = slice_start(call["start"], shape[axis], sizes)
    source = call["src"]
    length = sizes.shape(source)[axis]
    if length == 0:
        return 0, 0, source
    if axis != len(shape) - 1:
        raise NearMiss(f"a part is written along axis {axis} of {len(shape)}, not along the columns")
    if sizes.of(call["step"]) != 1:
        raise NearMiss(f"a part is written to every {sizes.of(call['step'])}th column")
    return start, start + length, source


def _input(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def interior(build: Build) -> set[Node]:
    """All nodes between the parts' leaves and the frame, the views that are written through among them."""
    found = set(build.nodes)
    for part in build.parts:
        found |= set(part.chain.nodes[: part.chain.nodes.index(part.leaf)])
    for node in list(found):
        if node.target is aten.copy.default:  # it writes through a view of the tensor
            target = _input(node)
            while target not in found and target.op == "call_function" and target.target in semantics.VIEWS:
                found.add(target)
                target = _input(target)
            if target.target in semantics.FILLS:
                found.add(target)
    return found


def axis_map(build: Build, part: Part, sizes: Sizes) -> AxisMap:
    """How the axes of a part's leaf are composed of those of the frame, the last of which counts the part's columns.

    Axes of the leaf along which it repeats itself do not count: all their elements are one.
    """
    rows, inner = sizes.shape(build.frame)[:-1], sizes.shape(part.source)[:-1]

    def look(coords: Coords) -> tuple[Coords, Tensor]:
        along = unravel(ravel(coords[:-1], rows), inner)
        access = trace_access(part.source, part.leaf, [*along, coords[-1]], sizes)
        still = repeats(part.leaf)
        return [c * 0 if a in still else c for a, c in enumerate(access.coords)], access.valid

    if math.prod(inner) != math.prod(rows):
        raise Unsupported(f"{part.source.name} has other rows than {build.frame.name}")
    with concrete_tensors():
        return fit_axes(look, (*rows, part.width), sizes.shape(part.leaf))


@dataclasses.dataclass(frozen=True)
class Roles:
    """The factors of a frame's axes, outermost first: those of tokens (batch among them), of heads, and the columns."""

    tokens: tuple[Piece, ...]
    heads: tuple[Piece, ...]
    per_axis: tuple[tuple[Piece, ...], ...]  # of every axis but the last


def roles(build: Build, maps: Sequence[AxisMap], shared: int, sizes: Sizes) -> Roles:
    """Tell heads from tokens: heads are what the shared part does not depend on.

    Raises:
        NearMiss: the shared part is shared by something else than heads.
    """
    last = len(sizes.shape(build.frame)) - 1
    stripped = [dataclasses.replace(m, atoms=tuple(a for a in m.atoms if a.root_axis != last)) for m in maps]
    pieces = refine(stripped, build.frame, sizes)
    used = []
    for m in maps:
        atoms = [m.atoms[i] for i in m.used()]
        used.append(lambda p, atoms=atoms: any(
            a.root_axis == p.axis and a.root_stride <= p.stride < a.root_stride * a.size for a in atoms))  # fmt: skip
    flat = [p for axis in range(last) for p in pieces[axis] if p.size > 1]
    idle = [p for p in flat if not used[1 - shared](p)]
    if idle:
        raise NearMiss(f"both of its parts are repeated along an axis of {idle[0].size}")
    heads = tuple(p for p in flat if not used[shared](p))
    if len(heads) != 1:
        raise NearMiss(f"a part is repeated along {len(heads)} axes; k_pe is shared by the heads alone")
    if heads[0] == flat[0] and heads[0].axis == 0:
        raise NearMiss(f"a part is repeated along the outermost axis (of {heads[0].size}), a batch and not heads")
    per_axis = tuple(tuple(p for p in pieces[axis] if p.size > 1) for axis in range(last))
    return Roles(tuple(p for p in flat if p not in heads), heads, per_axis)


def shared_part(build: Build, maps: Sequence[AxisMap], sizes: Sizes) -> int:
    """Which of two parts is the one that heads share.

    Raises:
        NearMiss: not exactly one of them is repeated, or one is too narrow.
    """
    if len(build.parts) != 2:
        raise NearMiss(f"it is put together from {len(build.parts)} parts, a key from two")
    narrow = min(part.width for part in build.parts)
    if narrow < NARROWEST:
        raise NearMiss(f"a part has {narrow} columns; a key's parts have {NARROWEST} or more")
    shape = sizes.shape(build.frame)
    last = len(shape) - 1
    counts = []
    for m in maps:
        rows = [atom.size for i, atom in enumerate(m.atoms) if i in m.used() and atom.root_axis != last]
        counts.append(math.prod(rows))
    everywhere = math.prod(shape[:-1])
    repeated = [i for i, count in enumerate(counts) if count < everywhere]
    if len(repeated) != 1:
        what = "none" if not repeated else "each"
        raise NearMiss(f"{what} of its parts is repeated; in a key one part is shared by the heads")
    return repeated[0]


def dtype_of(parts: Sequence[Part]) -> torch.dtype:
    """The one dtype of all leaves.

    Raises:
        NearMiss: they differ or are no floats.
    """
    found = {part.leaf.meta["val"].dtype for part in parts}
    names = ", ".join(sorted(map(dtype_name, found)))
    if len(found) > 1:
        raise NearMiss(f"its parts have different dtypes: {names}", advice.stored("both parts alike", FLOATS))
    (dtype,) = found
    if dtype in FLOAT8 or dtype not in FLOATS:
        raise NearMiss(f"its parts are {names} already")
    return dtype
