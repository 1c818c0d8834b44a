"""Windows of one tensor, each copied to contiguous memory: the split of a projection into queries, keys and values.

Found: two or more contiguous copies of windows of one tensor that lie next to each other, whatever views lead to
them. A window is tokens (and batch) x columns; columns may be divided into heads, heads may come before tokens in the
copy, and each head may be repeated. The tensor may lie in memory row by row, or column by column as a convolution
over time leaves it.

Near misses:

- windows that overlap or leave gaps, or of a symbolic number of channels
- copies that are not contiguous, that repeat all heads as a whole, or in another order than tokens or heads first
- windows of which some have tokens first and others heads

Refused:

- runs of channels that are no multiple of 8
- windows that cannot be read as rows of columns without a copy

Not worth it: Inductor makes one kernel of each copy, and would fuse it with an operator that computes the tensor or
consumes the window; a consumer takes strides and needs no copy; or the copies move so much (2,200 MB row by row, 600 MB
column by column, 40 MB column by column where columns begin at odd addresses) that stock is as fast. A single token
needs no copy.

Gains: one launch in place of one per window; with a symbolic number of tokens, 16-byte loads where stock Inductor has
2-byte ones. Values are moved, not computed: results are equal bit by bit.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import advice
from fusion_passes.fusion import Because, Context, Fusion, NearMiss, Reason, Refusal, Site, dtype_name
from fusion_passes.ops import qkv_split as op
from fusion_passes.patterns._qkv_profit import by_neighbours, by_size, consumers
from fusion_passes.patterns._qkv_view import columns_view
from fusion_passes.patterns._qkv_windows import (
    COPIES,
    Window,
    adjacent,
    copies_of,
    head_major,
    read_window,
    root_of,
    rows_of,
    source_of_copy,
)
from fusion_passes.rewrite import call, known_size
from fusion_passes.sizes import Sizes

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Split:
    """What holds under every admissible assignment of sizes; tuples in the order of the columns."""

    copies: tuple[Node, ...]
    heads: tuple[int, ...]
    dims: tuple[int, ...]
    repeats: tuple[int, ...]
    head_major: bool
    row_axes: int
    unit_columns: bool


def match(anchor: Node, context: Context) -> Site | None:
    """The adjacent windows of which `anchor` copies one; None if it is not the first of them, or alone."""
    source = source_of_copy(anchor)
    if source is None:
        return None
    root = root_of(source)
    # All copies of one tensor are looked at together, from the first of those that belong together.
    copies = [copy for copy in copies_of(root) if _is_part(copy, root, context.sizes[0])]
    if len(copies) < 2 or anchor not in copies:
        return None
    try:
        found = [_split(root, copies, anchor, sizes) for sizes in context.sizes]
    except NearMiss:
        # Said once for each tensor.
        if anchor is copies[0]:
            raise
        return None
    split, run = found[0]
    if any(other != split for other, _ in found[1:]):
        raise NearMiss("they are windows of heads and channels for some sizes only", advice.STATIC)
    if len(split.copies) < 2 or anchor is not min(split.copies):
        return None
    first, *rest = split.copies
    leaf = _behind_copies(root, split.copies)
    # Elements between neighbouring columns; behind a copy of the tensor its last axis stands for them.
    pitch = run[0].step if leaf is root else context.sizes[0].strides(leaf)[-1]
    proofs = [(sizes, proven) for sizes, (_, proven) in zip(context.sizes, found)]
    return Site(
        anchor=anchor,
        replaced=first,
        also=tuple(rest),
        leaves={"x": leaf},
        interior=_views_between(root, split.copies),
        params={"split": split, "proofs": proofs, "root": root, "pitch": pitch},
        summary=_summary(split, root.meta["val"].dtype, pitch),
        saved_launches=len(split.copies) - 1,
    )


def _is_part(copy: Node, root: Node, sizes: Sizes) -> bool:
    """Does it read a part of the tensor? A copy of all of it is no window."""
    source = source_of_copy(copy)
    if source is None:
        return False
    elements = 1
    for length, stride in zip(sizes.shape(source), sizes.strides(source)):
        elements *= length if stride else 1
    return elements < sizes.numel(root)


def _split(root: Node, copies: Sequence[Node], anchor: Node, sizes: Sizes) -> tuple[Split, list[Window]]:
    windows = []
    # Copies of another kind do not disturb those around them.
    for copy in copies:
        try:
            windows.append(read_window(copy, root, sizes))
        except NearMiss:
            if copy is anchor:
                raise
    if len(windows) == 1:
        raise NearMiss("another part of the tensor is copied too, but not as a window of tokens and channels")
    run = adjacent(windows, anchor)
    split = Split(
        copies=tuple(w.copy for w in run),
        heads=tuple(w.heads for w in run),
        dims=tuple(w.dim for w in run),
        repeats=tuple(w.repeats for w in run),
        head_major=head_major(run),
        row_axes=len(rows_of(run)),
        unit_columns=run[0].step == 1,
    )
    return split, run


def _behind_copies(root: Node, copies: Sequence[Node]) -> Node:
    """Where the tensor's values already are: a copy of something else that only the windows read is not needed."""
    source = source_of_copy(root) if root.op == "call_function" else None
    return root if source is None or not set(consumers(root)) <= set(copies) else source


def _views_between(root: Node, copies: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = list(copies)
    while stack:
        node = stack.pop()
        if node is not root and node not in found:
            found.add(node)
            source = source_of_copy(node) if node in copies else node.args[0]
            assert isinstance(source, Node)
            stack.append(source)
    return found


def _summary(split: Split, dtype: torch.dtype, pitch: int) -> str:
    parts = []
    for heads, dim, repeats in zip(split.heads, split.dims, split.repeats):
        form = f"{heads} x {dim}" if heads > 1 else str(dim)
        parts.append(form + (f" repeated {repeats} times" if repeats > 1 else ""))
    order = "heads before tokens" if split.head_major else "tokens before heads"
    memory = "row by row" if pitch == 1 else "column by column"
    windows = f"{len(parts)} windows of {dtype_name(dtype)}, {', '.join(parts)} channels"
    return f"{windows}, read {memory}, copied with {order}"


def guard(site: Site, context: Context) -> Reason:
    """The kernel moves granules of eight channels, which must not straddle the end of a head."""
    split: Split = site.params["split"]
    # Only heads that are moved apart or repeated are told apart; else the whole window is one.
    for copy, dim in zip(split.copies, split.dims):
        if dim % op.GRANULE:
            reason = f"{copy.name} has runs of {dim} channels; the kernel moves multiples of {op.GRANULE}"
            fits = range(op.GRANULE, dim + op.GRANULE, op.GRANULE)
            return Because(reason, advice.padded("every head, by rows of the weight,", dim, fits))
    return None


def profit(site: Site, context: Context) -> Reason:
    """Alone between opaque neighbours, and where launches or symbolic sizes are what stock Inductor loses by."""
    split: Split = site.params["split"]
    reason = by_neighbours(site.leaves["x"], list(split.copies))
    if reason is not None:
        return reason
    run: list[Window] = site.params["proofs"][0][1]
    item = site.leaves["x"].meta["val"].dtype.itemsize
    # Repeated heads are read once and written several times.
    rows = math.prod(length for length, _ in rows_of(run))
    moved = item * rows * sum(w.width * (1 + w.repeats) for w in run)
    layout, pitch = "rows", site.params["pitch"]
    if pitch != 1:
        symbolic = not all(isinstance(n, int) for n in site.replaced.meta["val"].shape)
        aligned = pitch * item % 16 == 0
        layout = "transposed, symbolic" if symbolic else "transposed" if aligned else "unaligned"
    tokens = rows_of(run)[-1][0]
    return by_size(moved, layout, min(tokens, *(w.width for w in run)))


def replace(site: Site, graph: Graph) -> list[Node]:
    """`torch.ops.fusion_passes.qkv_split` on a view of the tensor, and views of its results as the graph had them."""
    split: Split = site.params["split"]
    x = columns_view(graph, site.params["root"], site.leaves["x"], site.params["proofs"])
    form = (list(split.heads), list(split.dims), list(split.repeats), split.head_major)
    results = call(graph, op.OP, x, *form)
    pieces = [call(graph, operator.getitem, results, index) for index in range(len(split.copies))]
    first = source_of_copy(min(split.copies))
    assert first is not None
    return [_shaped(graph, piece, copy, first) for piece, copy in zip(pieces, split.copies)]


def _shaped(graph: Graph, result: Node, copy: Node, known: Node) -> Node:
    """A result with the axes that the copy has in the graph; symbolic sizes are those of `result` or `known`."""
    shape, have = copy.meta["val"].shape, result.meta["val"].shape
    if len(shape) == len(have) and all(statically_known_true(a == b) for a, b in zip(shape, have)):
        return result
    lengths: list[int | Node] = []
    # One unknown size follows from the others.
    symbolic = [length for length in shape if not isinstance(length, int)]
    for length in shape:
        if isinstance(length, int) or len(symbolic) == 1:
            lengths.append(length if isinstance(length, int) else -1)
            continue
        places = [(node, axis) for node in (result, known) for axis in range(node.meta["val"].dim())]
        same = [p for p in places if statically_known_true(p[0].meta["val"].shape[p[1]] == length)]
        if not same:
            raise Refusal(f"{copy.name} has axes of symbolic sizes that are neither batch nor tokens", advice.STATIC)
        lengths.append(known_size(graph, *same[0]))
    return call(graph, aten.reshape.default, result, lengths)


FUSION = Fusion(
    name="qkv_split",
    doc="contiguous copies of neighbouring windows of one tensor (queries, keys, values) in one launch",
    anchors=COPIES,
    match=match,
    guard=guard,
    profit=profit,
    replace=replace,
    dtypes=op.FLOATS,
    tolerance=0.0,
)
