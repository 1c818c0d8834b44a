"""Where one launch beats what Inductor makes of the copies, and where it does not."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes import cone
from fusion_passes.fusion import Because, Reason
from fusion_passes.patterns._qkv_windows import root_of
from fusion_passes.views import is_alias

aten = torch.ops.aten

# Computed by libraries or templates, whose results are in memory whatever comes next.
OPAQUE: frozenset[object] = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_mm.default,
        aten.convolution.default,
        aten.convolution_backward.default,
    }
)

# Bytes read and written up to which one launch was at least as fast on an H200 as stock Inductor with or without combo
# kernels, by how x lies in memory: the largest case measured, or where stock caught up. All run at the rate of a copy
# there, and what one launch saves is lost in it.
PAYS_UP_TO = {
    "rows": 2_200_000_000,
    "transposed": 600_000_000,
    "transposed, symbolic": 600_000_000,
    "unaligned": 40_000_000,
}

# Bytes up to which the launch is what counts, and not how the kernel moves them.
LAUNCH_BOUND = 4_000_000
SHORTEST_SIDE = 32


def by_neighbours(read: Node, copies: list[Node]) -> Reason:
    """A producer of what is read or a consumer of a copy that Inductor would fuse the copies with, or None."""
    producer = root_of(read)
    if not is_opaque(producer):
        return (
            f"the windowed tensor is computed by {_what(producer)} ({producer.name}), which Inductor fuses with the "
            "copies; the fused op would force it to memory"
        )
    for copy in copies:
        for user in consumers(copy):
            if _is_ours(user):
                reason = f"{user.name} ({_what(user)}) takes strides: it can read its window without any copy"
                return Because(reason, "leave out the .contiguous() before it")
            if not is_opaque(user):
                return f"{_what(user)} ({user.name}) consumes a window, and Inductor fuses the copy into it"
    return None


def by_size(moved: int, layout: str, shortest: int) -> Reason:
    """Why a split that reads and writes `moved` bytes does not pay, or None.

    Args:
        moved: bytes.
        layout: a key of `PAYS_UP_TO`.
        shortest: tokens of a sequence or columns of a window, whichever is less.
    """
    limit = PAYS_UP_TO[layout]
    if moved > limit:
        return f"it moves {moved / 1e6:.0f} MB ({layout}): above {limit / 1e6:.0f} MB stock Inductor copies as fast"
    if layout != "rows" and shortest < SHORTEST_SIDE and moved > LAUNCH_BOUND:
        return f"tiles of {shortest} tokens or channels are turned; below {SHORTEST_SIDE} most of a tile stays empty"
    return None


def consumers(copy: Node) -> Iterator[Node]:
    """The nodes that read a copy, through whatever views."""
    stack, seen = [copy], {copy}
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.target in semantics.SPLITS or is_alias(user, copy):
                stack.append(user)
            else:
                yield user


def is_opaque(node: Node) -> bool:
    """Does a tensor that `node` takes or gives have to be in memory, because Inductor generates no code for it?"""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and not cone.is_transparent(node) and is_opaque(source)
    if node.target in OPAQUE or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    from torch._inductor import lowering

    # Fallbacks are called; an op of somebody's own that Inductor does not know becomes one.
    unknown = node.target.namespace not in ("aten", "prims") and node.target not in lowering.lowerings
    return unknown or node.target in lowering.fallbacks or _is_ours(node)


def _is_ours(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fusion_passes"


def _what(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]
