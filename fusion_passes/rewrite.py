"""Rewrites that happen wholly or not at all.

A fused call is built beside the old nodes; its metadata is computed and compared with that of the value it
replaces; only then do the users move over. When anything goes wrong the new nodes are taken out again and the
graph is what it was, node for node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.utils import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_map

from fusion_passes.sizes import Sizes

# What a new node inherits from the one it stands for: where it came from, not what it is.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "fwd_source_fn_stack", "original_aten", "from_node")


class MetadataMismatch(Exception):
    """The replacement differs from the original in shape, strides, dtype or device; the message says where."""


def replace(
    graph: Graph, replaced: Node, build: Callable[[], Node], assignments: Sequence[Sizes], meta: Mapping[str, Any]
) -> Node:
    """Put the value that `build()` returns in the place of `replaced`, or leave the graph as it was and raise.

    `build` creates nodes with `call`; they are inserted just before `replaced` and get the entries of `meta`.
    Nothing is added to the guards.

    Raises:
        MetadataMismatch: the new value's shape, strides, dtype or device differ from the old one's.
    """
    before = set(graph.nodes)
    try:
        with graph.inserting_before(replaced), _no_new_guards(replaced):
            new = build()
            check_metadata(new, replaced, assignments)
    except BaseException:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        raise
    for node in graph.nodes:
        if node not in before:
            node.meta.update({k: replaced.meta[k] for k in _PROVENANCE if k in replaced.meta} | dict(meta))
    replaced.replace_all_uses_with(new)
    return new


def call(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A new call node at the insertion point, with the metadata that its fake evaluation gives."""
    node = graph.call_function(target, args, kwargs)
    value = tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, (args, kwargs))
    mode = detect_fake_mode([a for a in torch.utils._pytree.tree_leaves(value) if isinstance(a, torch.Tensor)])
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
            raise MetadataMismatch(f"the fused op's strides {ours} differ from the graph's {theirs}")


@contextlib.contextmanager
def _no_new_guards(node: Node) -> Iterator[None]:
    mode = detect_fake_mode([node.meta["val"]])
    shape_env = getattr(mode, "shape_env", None)
    with shape_env.suppress_guards() if shape_env is not None else contextlib.nullcontext():
        yield
