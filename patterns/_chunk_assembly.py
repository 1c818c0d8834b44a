"""Where a sequence of results is put together from chunks of tokens, however that is spelled.

A chain of `select_scatter` or `slice_scatter` into one tensor, or a `cat` or `stack`, and after it the views, copies
and the cast that make [B, T, H, V] of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.access import trace_access
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import axis_of, is_view, ravel, slice_start

aten = torch.ops.aten

ANCHORS = (aten.select_scatter.default, aten.slice_scatter.default, aten.cat.default, aten.stack.default)
CHUNK_SIZES = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Assembly:
    """Results of all chunks in one tensor.

    Attributes:
        node: the tensor.
        pieces: the result of each chunk; in row-major order its elements are those of `order` without n.
        order: the axes of `node` as letters: b batch, h head, n chunk, c token in its chunk, v value; t for tokens
            that are not divided into chunks.
        sizes: the size of every letter.
    """

    node: Node
    pieces: tuple[Node, ...]
    order: str
    sizes: dict[str, int]

    def tokens(self, index: int) -> int:
        """Tokens that a piece holds, padding included."""
        tail = self.sizes["t"] - index * self.sizes["c"]
        return min(self.sizes["c"], tail)


@dataclasses.dataclass(frozen=True)
class Output:
    """What the assembly is turned into: `node` [B, T, H, V], or [B, H, T, V] with `head_first`."""

    node: Node
    tokens: int
    head_first: bool


def assemblies(node: Node, sizes: Sizes) -> list[Assembly]:
    """What `node` may be as an assembly of chunks; nothing where it is none."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() not in (4, 5):
        return []
    if any(user.target is node.target and user.args[0] is node for user in node.users):
        return []  # not the last one of a chain
    axis = axis_of(int(semantics.arguments(node)["dim"]), value.dim())
    shape = sizes.shape(node)
    pieces = _joined(node) if node.target in ANCHORS[2:] else _written(node, axis, sizes)
    if not pieces:
        return []
    # in a stack every piece has length one along the axis
    stacked = value.dim() == 5
    lengths = [math.prod(sizes.shape(p)) * shape[axis] // max(math.prod(shape), 1) for p in pieces]
    if stacked:
        if len(pieces) != shape[axis] or lengths != [1] * len(pieces):
            return []
        rest = shape[:axis] + shape[axis + 1 :]
        found = [_named(letters, rest, "n", len(pieces), axis) for letters in ("bhcv", "bchv")]
    else:
        if any(length != lengths[0] for length in lengths[:-1]) or lengths[-1] > lengths[0]:
            return []
        found = [
            (letters, {**dict(zip(letters, shape)), "c": lengths[0]})
            for letters in ("bhtv", "bthv")
            if letters.index("t") == axis
        ]
    stripped = tuple(_same_elements(piece) for piece in pieces)
    return [Assembly(node, stripped, order, size) for order, size in found if size["c"] in CHUNK_SIZES]


def _named(letters: str, rest: Sequence[int], extra: str, count: int, axis: int) -> tuple[str, dict[str, int]]:
    size = {**dict(zip(letters, rest)), extra: count}
    return letters[:axis] + extra + letters[axis:], {**size, "t": size["n"] * size["c"]}


def _joined(node: Node) -> list[Node]:
    return [part for part in semantics.arguments(node)["tensors"] if isinstance(part, Node)]


def _written(node: Node, axis: int, sizes: Sizes) -> list[Node]:
    """The sources of a chain of writes that together cover the axis, each position once; later writes win."""
    size = sizes.shape(node)[axis]
    found: dict[int, tuple[int, Node]] = {}
    at: object = node
    while isinstance(at, Node) and at.target is node.target:
        call = semantics.arguments(at)
        if axis_of(int(call["dim"]), len(sizes.shape(at))) != axis or not isinstance(call["src"], Node):
            return []
        if at.target is aten.select_scatter.default:
            first, length = axis_of(sizes.of(call["index"]), size), 1
        elif sizes.of(call["step"]) == 1:
            first, length = slice_start(call["start"], size, sizes), sizes.shape(call["src"])[axis]
        else:
            return []
        found.setdefault(first, (length, call["src"]))
        at = at.args[0]
    end = 0
    for first in sorted(found):
        if first != end:
            return []
        end += found[first][0]
    return [found[first][1] for first in sorted(found)] if end == size else []


def _same_elements(node: Node) -> Node:
    """`node` without copies and reshapes that keep its dtype and the row-major order of its elements."""
    while node.op == "call_function":
        source = node.args[1] if node.target is aten.copy.default else node.args[0] if node.args else None
        if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return node
        kept = node.target in semantics.RESHAPES | semantics.COPIES or (
            node.target is aten.copy.default and source.meta["val"].shape == node.meta["val"].shape
        )
        if not kept or source.meta["val"].dtype != node.meta["val"].dtype:
            return node
        node = source
    return node


def output(assembly: Assembly, sizes: Sizes) -> Output | None:
    """The last node that is the assembly as [B, T, H, V], or else as [B, H, T, V]; at most one cast narrows it."""
    found: Output | None = None
    node = assembly.node
    while True:
        for head_first in (False, True):
            tokens = _tokens(node, assembly, sizes, head_first)
            if tokens is not None and not (head_first and found is not None and not found.head_first):
                found = Output(node, tokens, head_first)
                break
        users = list(node.users)
        if len(users) != 1 or not _moves(users[0], node):
            return found
        if users[0].target in semantics.CASTS and not _narrows(users[0], node):
            return found
        if node.meta["val"].dtype != assembly.pieces[0].meta["val"].dtype and users[0].target in semantics.CASTS:
            return found
        node = users[0]


def _moves(node: Node, source: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.target in semantics.CASTS:
        return True
    return is_view(node) and node.args[0] is source and node.target is not aten.constant_pad_nd.default


def _narrows(node: Node, source: Node) -> bool:
    ours, theirs = node.meta["val"].dtype, source.meta["val"].dtype
    return ours.is_floating_point and (ours == theirs or (theirs == torch.float32 and ours.itemsize == 2))


def _tokens(node: Node, assembly: Assembly, sizes: Sizes, head_first: bool) -> int | None:
    """The number of tokens, if `node` shows the assembly in the order of tokens."""
    size, shape = assembly.sizes, sizes.shape(node)
    if len(shape) != 4 or (shape[0], shape[3]) != (size["b"], size["v"]):
        return None
    heads, tokens = (shape[1], shape[2]) if head_first else (shape[2], shape[1])
    padded, chunk = size["t"], size["c"]
    if heads != size["h"] or not (padded - 1) // chunk * chunk < tokens <= padded:
        return None
    if node is assembly.node:
        return tokens if assembly.order == ("bhtv" if head_first else "bthv") else None
    coords = walks((size["b"], tokens, heads, size["v"]))
    b, t, h, v = coords
    index = dict(zip("btnchv", (b, t, t // chunk, t % chunk, h, v)))
    asked = [b, h, t, v] if head_first else [b, t, h, v]
    try:
        access = trace_access(node, assembly.node, asked, sizes)
    except Unsupported:
        return None
    wanted = ravel([index[letter] for letter in assembly.order], [size[letter] for letter in assembly.order])
    actual = ravel(access.coords, sizes.shape(assembly.node))
    return tokens if bool(access.valid.all()) and torch.equal(actual.expand(wanted.shape), wanted) else None


def walks(shape: Sequence[int]) -> list[Tensor]:
    """Coordinates along every axis, from both corners, and random ones."""
    generator = torch.Generator().manual_seed(0)
    columns = [[torch.randint(n, (512,), generator=generator)] for n in shape]
    for axis, size in enumerate(shape):
        for high in (False, True):
            for other, n in enumerate(shape):
                ends = torch.full((size,), (n - 1) * high, dtype=torch.int64)
                columns[other].append(torch.arange(size) if other == axis else ends)
    return [torch.cat(column) for column in columns]
