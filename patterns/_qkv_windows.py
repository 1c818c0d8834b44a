"""Copies of windows of one tensor, in terms of its memory alone: no trace of how the views were spelled is left.

A window is a contiguous copy whose source is `rows` x `heads` x `repeats` x `dim` elements of the tensor: `rows` are
one or two axes (batch and tokens), the columns of a head are `step` elements apart, heads follow each other without
gaps, and a repetition has stride zero. Repetitions lie within heads. In the copy, heads come after the rows, or
before the last of them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.fx import Node

from fusion_passes import advice
from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss
from fusion_passes.sizes import Sizes
from fusion_passes.views import is_alias

aten = torch.ops.aten

COPIES = (aten.clone.default, aten.copy.default)
# What to do where the copies disagree.
ONE_ORDER = "copy all windows with batch, tokens and heads in the same order"

# (size, stride in elements) of an axis
Axis = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Window:
    """One copied window under one assignment of sizes.

    Attributes:
        copy: the node that makes it contiguous.
        offset: of its first element from the first one of the tensor, in elements.
        rows: batch and token axes in the order of the copy.
        step: elements between neighbouring columns.
        heads, dim, repeats: see the module; heads that need not be told apart count as one.
        head_major: whether heads come before the last axis of rows; None where that makes no difference.
    """

    copy: Node
    offset: int
    rows: tuple[Axis, ...]
    step: int
    heads: int
    dim: int
    repeats: int
    head_major: bool | None

    @property
    def width(self) -> int:
        """Columns of the tensor that it covers."""
        return self.heads * self.dim

    @property
    def end(self) -> int:
        """Where the window that follows it without a gap begins."""
        return self.offset + self.width * self.step


def source_of_copy(copy: Node) -> Node | None:
    """What a node copies element by element into contiguous memory without a change of dtype, or None."""
    position = 1 if copy.target is aten.copy.default else 0
    source = copy.args[position] if copy.target in COPIES and len(copy.args) > position else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    value, copied = source.meta["val"], copy.meta["val"]
    # copy_ may broadcast or cast as well, which is more than a copy.
    alike = value.dtype == copied.dtype and value.dim() == copied.dim()
    return source if alike and all(_same(a, b) for a, b in zip(value.shape, copied.shape)) else None


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr


def root_of(node: Node) -> Node:
    """The node that `node` is a view of: the first one, walking back, that does not share its inputs' memory."""
    while True:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if node.target is operator.getitem and isinstance(source, Node) and source.target in semantics.SPLITS:
            source = source.args[0]
        elif node.target not in semantics.VIEWS:
            return node
        if not isinstance(source, Node) or not is_alias(source, node):
            return node
        if source.meta["val"].dtype != node.meta["val"].dtype:
            return node
        node = source


def copies_of(root: Node) -> list[Node]:
    """The nodes that copy views of `root`, in the order of the graph."""
    found: list[Node] = []
    # Forward through everything that still shows the tensor's memory.
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            source = source_of_copy(user)
            if source is not None and root_of(source) is root:
                found.append(user)
            elif user.target in semantics.SPLITS or is_alias(user, root):
                stack.append(user)
    return sorted(found)


def read_window(copy: Node, root: Node, sizes: Sizes) -> Window:
    """The window of `root` that `copy` copies.

    Raises:
        NearMiss: it is something else; the message says what.
    """
    source = source_of_copy(copy)
    assert source is not None
    name = copy.name
    order = sizes.strides(copy)
    shape = sizes.shape(copy)
    if any(n > 1 and s != want for n, s, want in zip(shape, order, _contiguous(shape))):
        raise NearMiss(f"{name} is not contiguous")
    # The copy is contiguous: its axes in order say how elements follow each other in it.
    axes = list(merged(zip(shape, sizes.strides(source))))
    offset = sizes.offset(source) - sizes.offset(root)
    if len(axes) < 2:
        already = all(stride == 1 for _, stride in axes)
        what = "memory that is contiguous already, such as that of a single token" if already else "no rows of channels"
        raise NearMiss(f"{name} copies {what}")
    # Innermost are the channels; an axis that continues them counts heads, one that stands still repeats them.
    *outer, (dim, step) = axes
    repeated = [i for i, (_, stride) in enumerate(outer) if stride == 0]
    headed = [i for i, (_, stride) in enumerate(outer) if stride == dim * step]
    rows = [i for i in range(len(outer)) if i not in repeated and i not in headed]
    lanes = headed + repeated
    if step == 0 or len(repeated) > 1 or len(headed) > 1 or not 1 <= len(rows) <= 2:
        raise NearMiss(f"the axes of {name} are not tokens, heads and channels")
    if lanes != sorted(lanes):
        raise NearMiss(f"{name} repeats its heads as a whole, not each of them")
    # Without heads to tell apart both orders are the same.
    head_major: bool | None = None
    if lanes:
        head_major = lanes[0] < rows[-1]
        if not (rows[:-1] + lanes + rows[-1:] if head_major else rows + lanes) == list(range(len(outer))):
            raise NearMiss(f"{name} has heads and tokens in an order that is neither of the two that are copied")
    heads = outer[headed[0]][0] if headed else 1
    repeats = outer[repeated[0]][0] if repeated else 1
    if step != 1 and outer[rows[-1]][1] != 1:
        reason = f"in what {name} reads, neither neighbouring channels nor neighbouring tokens are adjacent"
        raise NearMiss(reason, advice.adjacent(root.name, "channels"))
    return Window(copy, offset, tuple(outer[i] for i in rows), step, heads, dim, repeats, head_major)


def merged(axes: Iterable[Axis]) -> Iterator[Axis]:
    """The axes (outermost first) without those of size one, joined where one is the continuation of the other."""
    pending: Axis | None = None
    for size, stride in axes:
        if size == 1:
            continue
        if pending is not None and pending[1] == size * stride:
            pending = (pending[0] * size, stride)
        else:
            if pending is not None:
                yield pending
            pending = (size, stride)
    if pending is not None:
        yield pending


def adjacent(windows: Sequence[Window], chosen: Node) -> list[Window]:
    """The windows around that of `chosen` that cover columns without gaps, in the order of their columns.

    It is alone where the others have other rows, such as the chunks of a sequence.

    Raises:
        NearMiss: windows overlap, or there are gaps on both sides.
    """
    (around,) = (w for w in windows if w.copy is chosen)
    alike = [w for w in windows if _rows(w) == _rows(around)]
    alike.sort(key=lambda w: w.offset)
    for left, right in zip(alike, alike[1:]):
        # Windows that differ by less than a row were cut along it and then turned.
        if right.offset < left.end and 0 < right.offset - left.offset < left.step:
            raise NearMiss(f"{left.copy.name} and {right.copy.name} turn windows of channels into channels by tokens")
        if right.offset < left.end:
            raise NearMiss(f"the windows {left.copy.name} and {right.copy.name} overlap")
    # A gap ends a run of windows, and the next one begins another.
    runs: list[list[Window]] = []
    for window in alike:
        if runs and runs[-1][-1].end == window.offset:
            runs[-1].append(window)
        else:
            runs.append([window])
    (run,) = (r for r in runs if any(w.copy is chosen for w in r))
    if len(run) == 1 < len(alike):
        hint = "order the rows of the weight so that what is copied lies side by side"
        raise NearMiss(f"{len(alike)} windows of one tensor are copied, but they leave gaps between them", hint)
    _check_rows(run)
    return run


def _check_rows(run: Sequence[Window]) -> None:
    """The columns of a row end before the next row begins, or tokens do before the next column."""
    columns = sum(w.width for w in run)
    step = run[0].step
    for size, stride in _rows(run[0])[0]:
        if stride >= step and stride < columns * step or stride < step and size * stride > step:
            raise NearMiss("the windows overlap from one row to the next")


def head_major(run: Sequence[Window]) -> bool:
    """Whether heads come before tokens in the copies.

    Raises:
        NearMiss: in some they do and in others they do not, or they come before batch and tokens in one, between
            them in another.
    """
    orders = {w.head_major for w in run} - {None}
    if len(orders) > 1:
        raise NearMiss("some windows have their heads before the tokens and others behind them", ONE_ORDER)
    if len({w.rows for w in run if w.head_major}) > 1:
        raise NearMiss("some windows have their heads before the batch and others behind it", ONE_ORDER)
    return orders == {True}


def rows_of(run: Sequence[Window]) -> tuple[Axis, ...]:
    """Batch and tokens of all windows, told apart where heads come between them."""
    return next((w.rows for w in run if w.head_major), run[0].rows)


def _rows(window: Window) -> tuple[tuple[Axis, ...], int]:
    return tuple(merged(window.rows)), window.step


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]
