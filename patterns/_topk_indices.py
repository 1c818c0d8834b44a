"""A `topk` that is only asked which entries it selects: from its indices to the scatters that they end in.

What `full_topk` and `topk_mask` have in common. Where a constant is scattered along the axis of the selection, over the
whole of a tensor, the order of the indices does not matter, nor do the values that were selected.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss, Site
from fusion_passes.sizes import Sizes

aten = torch.ops.aten

VALUES, INDICES = 0, 1

# What a scatter may write to.
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64,
)  # fmt: skip


def known(anchor: Node) -> tuple[int, int] | None:
    """k and the entries of a row, where both are known when the graph is compiled."""
    given = semantics.arguments(anchor)
    scores, k = given["self"], given["k"]
    value = scores.meta.get("val") if isinstance(scores, Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return None
    length = value.shape[axis_of(anchor)]
    return (k, length) if isinstance(k, int) and isinstance(length, int) else None


def axis_of(anchor: Node) -> int:
    """The axis of the selection, counted from the front."""
    given = semantics.arguments(anchor)
    axis: int = given["dim"]
    return axis % given["self"].meta["val"].dim()


def scores_of(anchor: Node) -> Node:
    """What is selected from."""
    scores = semantics.arguments(anchor)["self"]
    assert isinstance(scores, Node)
    return scores


def follow(anchor: Node) -> tuple[list[Node], list[Node]] | None:
    """What the indices become by copies and casts, themselves first, and the scatters that read them.

    None where the values are read, or nothing is scattered.

    Raises:
        NearMiss: something else reads the indices, or a scatter is not of a constant over the whole of a tensor.
    """
    parts = {user.args[1]: user for user in anchor.users if user.target is operator.getitem}
    indices = parts.get(INDICES)
    if indices is None or any(user.users for place, user in parts.items() if place != INDICES):
        return None
    steps = list(_indices(indices, scores_of(anchor).meta["val"].shape[axis_of(anchor)]))
    scatters = sorted({user for step in steps for user in step.users} - set(steps))
    for scatter in scatters:
        _check(scatter, anchor, steps)
    return (steps, scatters) if scatters else None


def site(
    anchor: Node, steps: list[Node], scatters: list[Node], bases: dict[str, Node], summary: str, sizes: Sizes
) -> Site:
    """The site that takes the place of the scatters; `bases` are the tensors written to, as far as they are read.

    What is saved is estimated as the selection and the scatters, without what stands in for them.
    """
    itemsize = scores_of(anchor).meta["val"].dtype.itemsize
    return Site(
        anchor=anchor,
        replaced=scatters[0],
        also=tuple(scatters[1:]),
        leaves={"scores": scores_of(anchor), **bases},
        interior={anchor, *steps},
        summary=summary,
        saved_bytes=sizes.numel(steps[0]) * (itemsize + 8 * (1 + len(scatters))),
        saved_launches=1 + len(scatters),
    )


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
    """`scatter` writes a constant to the selected positions of rows that are as long as those selected from.

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
    assert isinstance(base, Node) and isinstance(axis, int)
    shape, covered = base.meta["val"].shape, scores_of(anchor).meta["val"].shape
    if axis % max(len(shape), 1) != axis_of(anchor):
        raise NearMiss(f"{name} writes along another axis than that of the selection")
    if not all(statically_known_true(m == n) for m, n in zip(shape, covered)):
        raise NearMiss(f"{name} writes to a part of a tensor of shape {list(shape)}, the scores are {list(covered)}")
