"""Rewrites that happen wholly or not at all.

A fused call is built beside the old nodes; its metadata is computed and compared with that of the values it
replaces; only then do the users move over. When anything goes wrong the new nodes are taken out again and the
graph is what it was, node for node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.utils import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_map

from fusion_passes import restriding
from fusion_passes.folding import is_view
from fusion_passes.fusion import Refusal
from fusion_passes.guards import writers
from fusion_passes.sizes import Sizes

# What a new node inherits from the one it stands for: where it came from, not what it is.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "fwd_source_fn_stack", "original_aten", "from_node")

# Nodes that are moved ahead for one operand: a gate and its projection, but not half of a model.
MOST_MOVED = 16


class MetadataMismatch(Exception):
    """The replacement differs from the original in shape, strides, dtype or device; the message says where."""


class StrideMismatch(MetadataMismatch):
    """The strides differ, and nothing else."""


def replace(
    graph: Graph,
    replaced: Sequence[Node],
    leaves: Collection[Node],
    build: Callable[[], Sequence[Node]],
    assignments: Sequence[Sizes],
    meta: Mapping[str, Any],
) -> None:
    """Put the values that `build()` returns in the places of `replaced`, or leave the graph as it was and raise.

    `build` creates nodes with `call`; they are inserted before the first of `replaced`, or after the last of `leaves`
    where that comes later, and get the entries of `meta`. Those of `leaves` that come behind a reader of `replaced` are
    put before it, if they can be computed there. Nothing is added to the guards.

    Raises:
        MetadataMismatch: a new value's shape, strides, dtype or device differ from the old one's.
        Refusal: there is no such place: something needs one of `replaced` before the last leaf is known.
    """
    before = set(graph.nodes)
    moved: list[tuple[Node, Node]] = []
    try:
        first_reader = min((user for node in replaced for user in node.users), default=None)
        for leaf in sorted(leaves):
            if first_reader is not None:
                _put_before(first_reader, leaf, moved)
        place = _place(replaced, leaves)
        with graph.inserting_before(place), _no_new_guards(replaced[0]):
            new = build()
            if len(new) != len(replaced):
                raise RuntimeError(f"the fusion's replace returned {len(new)} values for {len(replaced)} outputs")
            restrided: dict[Node, Any] = {}
            for made, old in zip(new, replaced):
                restrided |= _accept(made, old, assignments)
        _check_order([node for node in graph.nodes if node not in before])
    except BaseException:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        for node, following in reversed(moved):
            following.prepend(node)
        raise
    for node in graph.nodes:
        if node not in before:
            node.meta.update({k: replaced[0].meta[k] for k in _PROVENANCE if k in replaced[0].meta} | dict(meta))
    for made, old in zip(new, replaced):
        old.replace_all_uses_with(made)
    for node, value in restrided.items():
        node.meta["val"] = value


def _put_before(limit: Node, node: Node, moved: list[tuple[Node, Node]]) -> None:
    """Move `node` before `limit`, and what it needs; nothing if that is not possible. Notes what it moved.

    What is computed without side effects is the same wherever its sources are known, unless something is written on the
    way. A pass of Inductor puts such nodes right before their first reader.
    """
    late: set[Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node < limit or node in late:
            continue
        if node is limit or len(late) == MOST_MOVED or not _is_movable(node):
            return
        late.add(node)
        stack += node.all_input_nodes
    if late and not any(writers(limit, max(late))):
        for node in sorted(late):
            moved.append((node, node.next))
            limit.prepend(node)


def _is_movable(node: Node) -> bool:
    """Is `node` a view, or an operator of ATen that only computes, from its inputs alone?"""
    if is_view(node):
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _accept(made: Node, old: Node, assignments: Sequence[Sizes]) -> dict[Node, Any]:
    """`check_metadata`, but for strides that only the padding of a product has; returns the new values of readers."""
    try:
        check_metadata(made, old, assignments)
    except StrideMismatch as mismatch:
        if not restriding.is_cut(old):
            raise
        values, reason = restriding.follow(made, old)
        if reason is not None:
            raise MetadataMismatch(f"{mismatch}, and {reason}") from mismatch
        return values
    return {}


def _place(replaced: Sequence[Node], leaves: Collection[Node]) -> Node:
    """The node before which values that read `leaves` and stand for `replaced` can be computed."""
    first, last_leaf = min(replaced), max(leaves, default=None)
    place = first if last_leaf is None or last_leaf < first else last_leaf.next
    for node in replaced:
        early = [user for user in node.users if user < place]
        if early:
            needed = f"{node.name} is needed by {early[0].name}"
            raise Refusal(f"{needed} before {last_leaf} is computed, which the same fused op reads")
    return place


def _check_order(new: Sequence[Node]) -> None:
    for node in new:
        late = [source.name for source in node.all_input_nodes if not source < node]
        if late:
            raise RuntimeError(f"a new node calls {node.target} with {late[0]}, which is computed only later")


def call(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A new call node at the insertion point, with the metadata that its fake evaluation gives."""
    node = graph.call_function(target, args, kwargs)
    value = tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, (args, kwargs))
    tensors = [a for a in torch.utils._pytree.tree_leaves(value) if isinstance(a, torch.Tensor)]
    # Without a tensor among the arguments, as for `empty`, the mode is that of the graph.
    mode = detect_fake_mode(tensors or [n.meta["val"] for n in graph.nodes if "val" in n.meta])
    with mode if mode is not None else contextlib.nullcontext():
        node.meta["val"] = target(*value[0], **value[1])
    return node


def size(graph: Graph, node: Node, axis: int) -> int | Node:
    """The size of an axis as an argument for a new node: an integer, or a node that holds the symbol."""
    length = node.meta["val"].shape[axis]
    return length if isinstance(length, int) else call(graph, torch.ops.aten.sym_size.int, node, axis)


def known_size(graph: Graph, node: Node, axis: int) -> int | Node:
    """As `size`, but takes a node that holds the same symbol already, so that `node` itself need not stay alive."""
    length = node.meta["val"].shape[axis]
    if isinstance(length, int):
        return length
    for other in graph.nodes:
        if other is node:
            break
        value = other.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == length.node.expr:
            return other
    return size(graph, node, axis)


def check_metadata(new: Node, old: Node, assignments: Sequence[Sizes]) -> None:
    """Raise `MetadataMismatch` unless both values have the same dtype, device, shape and strides.

    Shapes must be provably equal. Strides must be equal under every assignment of sizes (those of axes of size 1 do
    not count): symbolic strides are products of sizes in forms that the solver does not simplify.
    """
    a, b = new.meta["val"], old.meta["val"]
    if a.dtype != b.dtype or a.device != b.device:
        raise MetadataMismatch(f"the fused op gives {a.dtype} on {a.device}, the graph has {b.dtype} on {b.device}")
    same = len(a.shape) == len(b.shape) and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape))
    if not same:
        raise MetadataMismatch(f"the fused op's shape {list(a.shape)} is not provably the graph's {list(b.shape)}")
    for sizes in assignments:
        strides = list(zip(sizes.shape(old), sizes.strides(new), sizes.strides(old)))
        if any(n > 1 and x != y for n, x, y in strides):
            ours, theirs = ([stride[i] for stride in strides] for i in (1, 2))
            raise StrideMismatch(f"the fused op's strides {ours} differ from the graph's {theirs}")


@contextlib.contextmanager
def _no_new_guards(node: Node) -> Iterator[None]:
    mode = detect_fake_mode([node.meta["val"]])
    shape_env = getattr(mode, "shape_env", None)
    with shape_env.suppress_guards() if shape_env is not None else contextlib.nullcontext():
        yield
