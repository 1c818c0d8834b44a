"""A top-k that selects every entry, and is only asked which.

Found: `topk` along an axis that has k entries, whose values nothing reads and whose indices only `scatter` a constant
along the same axis, over the whole of a tensor:

    mask = ones.scatter(-1, scores.topk(k).indices, False)    # scores [.., k]

The indices are every position of a row once, in an order that does not matter to the scatter, whatever the scores are,
NaN included. So the result is that constant everywhere, and what computed the scores is dead code. This is what sparse
attention comes to where a prompt has no more tokens than a query may select (2,048 in DeepSeek-V3.2), and routing where
all groups of experts are kept.

Near misses:

- indices that are returned, or go to an operator for which their order matters, such as `gather`
- a scatter of a tensor, along another axis than that of the selection, or over a part of a tensor only

Nothing is recorded of a `topk` of fewer than all entries, of a symbolic number of entries, or whose values are read.

Gains: the sort, and all that only its scores needed: the projections, products and reductions of an indexer. There is
no fused op and nothing to tune: a constant takes the place of the subgraph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import aten as semantics
from fusion_passes import rewrite
from fusion_passes.fusion import Context, Fusion, NearMiss, Site

aten = torch.ops.aten

VALUES, INDICES = 0, 1


def selects_all(anchor: Node) -> bool:
    """Is k the length of the axis, known when the graph is compiled?"""
    given = semantics.arguments(anchor)
    scores, k = given["self"], given["k"]
    value = scores.meta.get("val") if isinstance(scores, Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return False
    length = value.shape[_axis(anchor)]
    return isinstance(k, int) and isinstance(length, int) and k == length


def match(anchor: Node, context: Context) -> Site | None:
    """Follow the indices to the scatters that they end in."""
    parts = {user.args[1]: user for user in anchor.users if user.target is operator.getitem}
    indices = parts.get(INDICES)
    if indices is None or any(user.users for place, user in parts.items() if place != INDICES):
        return None
    steps = list(_indices(indices, indices.meta["val"].shape[_axis(anchor)]))
    scatters = sorted({user for step in steps for user in step.users} - set(steps))
    for scatter in scatters:
        _check(scatter, anchor, steps)
    if not scatters:
        return None
    scores: Node = semantics.arguments(anchor)["self"]
    bases = {f"base_{n}": base for n, s in enumerate(scatters) if isinstance(base := s.args[0], Node)}
    sizes = context.sizes[0]
    length = scores.meta["val"].shape[_axis(anchor)]
    return Site(
        anchor=anchor,
        replaced=scatters[0],
        also=tuple(scatters[1:]),
        leaves={"scores": scores, **bases},
        interior={anchor, *steps},
        summary=f"all of {length} entries are selected, whatever their scores",
        saved_bytes=sizes.numel(scores) * (scores.meta["val"].dtype.itemsize + 8 * (1 + len(scatters))),
        saved_launches=1 + len(scatters),
    )


def _axis(anchor: Node) -> int:
    given = semantics.arguments(anchor)
    axis: int = given["dim"]
    return axis % given["self"].meta["val"].dim()


def _indices(node: Node, length: int) -> Iterator[Node]:
    """The indices below `length`, and what they become by copies and by casts that keep them apart."""
    yield node
    for user in node.users:
        if user.target in semantics.CASTS or user.target is aten.clone.default:
            if _holds(user.meta["val"].dtype, length - 1):
                yield from _indices(user, length)


def _holds(dtype: torch.dtype, largest: int) -> bool:
    """Are all whole numbers up to `largest` numbers of `dtype`?"""
    if dtype == torch.bool:
        return largest <= 1
    return largest <= (2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max)


def _check(scatter: Node, anchor: Node, steps: list[Node]) -> None:
    """`scatter` writes a constant to every position of its rows.

    Raises:
        NearMiss: it does something else.
    """
    name = f"{scatter.name} ({getattr(scatter.target, '__name__', scatter.target)})"
    if scatter.target is not aten.scatter.value:
        written = scatter.args[3] if scatter.target is aten.scatter.src else None
        constant = isinstance(written, Node) and written.target in semantics.FILL_ARGUMENT
        hint = "write a number, as in scatter(dim, index, 0.0), in place of a tensor" if constant else ""
        raise NearMiss(f"its indices go to {name}, for which their order matters", hint)
    base, axis, index, number = scatter.args
    in_place = isinstance(base, Node) and isinstance(index, Node) and index in steps and isinstance(axis, int)
    if not in_place or isinstance(number, Node):
        raise NearMiss(f"its indices go to {name} in another place than that of its indices")
    assert isinstance(base, Node) and isinstance(index, Node) and isinstance(axis, int)
    shape, covered = base.meta["val"].shape, index.meta["val"].shape
    if axis % max(len(shape), 1) != _axis(anchor):
        raise NearMiss(f"{name} writes along another axis than that of the selection")
    if not all(statically_known_true(m == n) for m, n in zip(shape, covered)):
        raise NearMiss(f"{name} writes to a part of a tensor of shape {list(shape)}, the indices are {list(covered)}")


def replace(site: Site, graph: Graph) -> list[Node]:
    """The constants, as tensors of the shapes and dtypes of what was written to."""
    return [_constant(graph, scatter) for scatter in site.outputs]


def _constant(graph: Graph, scatter: Node) -> Node:
    base, number = scatter.args[0], scatter.args[3]
    assert isinstance(base, Node)
    value = base.meta["val"]
    shape = [rewrite.known_size(graph, base, axis) for axis in range(value.dim())]
    return rewrite.call(graph, aten.full.default, shape, number, dtype=value.dtype, device=value.device)


FUSION = Fusion(
    name="full_topk",
    doc="a top-k that selects every entry of a row, and all that computed its scores, removed",
    anchors=(aten.topk.default,),
    match=match,
    replace=replace,
    wants=selects_all,
    dtypes=(
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int8, torch.int16,
        torch.int32, torch.int64,
    ),
    tolerance=0.0,
)  # fmt: skip
