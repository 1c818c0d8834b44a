"""Chains of writes into one graph input, made in place in their order.

Stock Inductor writes in place where a graph input is written once; a second write makes it compute the whole input
anew. Here every write of the chain becomes a `copy_` or `index_put_` at the place where the graph has it, and all
versions of the input become the input itself. That is right only if nobody sees the difference: whoever reads an older
version has to do so before it is overwritten, or read elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fusion_passes import advice
from fusion_passes.fusion import NearMiss, Refusal
from fusion_passes.patterns._copies_aliases import is_dead, is_mutation, roots, uses
from fusion_passes.patterns._copies_readers import Readers
from fusion_passes.patterns._copies_rotation import Rotation, emit
from fusion_passes.patterns._copies_values import Value, Values, Write, is_write
from fusion_passes.patterns._copies_windows import Window, known
from fusion_passes.rewrite import call, size
from fusion_passes.views import is_alias

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Chain:
    """Writes into one graph input.

    Attributes:
        cache: the input; a tensor of the graph's own for a rotation that has no epilogue.
        writes: in their order, without those that write back what is there.
        versions: the nodes of the graph that hold the input, or a part of it, after some of the writes.
        epilogue: the `copy_` that brings the last version back into the input.
        buffered: writes whose source may overlap what they overwrite; it has to be copied aside first.
        returned: versions that are results of the graph; results must not share memory with the input.
        earlier: for a write, the nodes that stand behind it in the graph and have to be computed before it.
        rotation: what the only write does, where it rotates pairs in place.
    """

    cache: Node
    writes: tuple[Write, ...]
    versions: dict[Node, Value]
    epilogue: Node | None
    buffered: frozenset[Write]
    returned: tuple[Node, ...]
    earlier: dict[Write, tuple[Node, ...]]
    rotation: Rotation | None = None

    @property
    def overwritten(self) -> int:
        """How many of the writes replace elements by index."""
        return sum(write.indexed for write in self.writes)


def find(epilogue: Node, values: Values) -> Chain | None:
    """The chain of writes that ends in `epilogue`, a `copy_` into a graph input; None if there is none.

    Raises:
        NearMiss: the copied value is no chain of writes, and why.
        Refusal: the writes must not be made in place, and why.
    """
    cache, last = epilogue.args[:2]
    assert isinstance(cache, Node) and isinstance(last, Node)
    final = values.of(last)
    if final.origin is not cache or not final.is_whole:
        if is_write(last):
            raise NearMiss(f"{last.name} writes into {final.origin.name}, and not into the input {cache.name} itself")
        return None
    if not final.writes:
        return None
    versions = _versions(cache, final, values)
    for write in final.writes:
        if not write.window.is_shown:
            raise Refusal(f"{write.node.name} writes to a copy of a part of {cache.name}")
        if write.window.repeats:
            raise Refusal(f"{write.node.name} writes to memory that it shows more than once")
    readers = Readers(cache, final.writes, versions, epilogue)
    readers.check()
    earlier = {write: tuple(nodes) for write, nodes in readers.earlier.items()}
    return Chain(cache, final.writes, versions, epilogue, frozenset(readers.buffered), tuple(readers.returned), earlier)


def rotated(rotation: Rotation, final: Value, epilogue: Node | None, values: Values) -> Chain:
    """The writes of a rotation as a single one, at the place of the last.

    Raises:
        Refusal: the writes must not be made in place, and why.
    """
    tensor, everything = final.origin, _versions(final.origin, final, values)
    last = max(write.node for write in final.writes)
    for factor in (rotation.cos, rotation.sin):
        _check_unwritten(factor, last)
    write = Write(last, rotation.pairs.window)
    between = {n for n, v in everything.items() if 0 < len(v.writes) < len(final.writes)}
    versions = {
        node: dataclasses.replace(value, writes=(write,) if value.writes else ())
        for node, value in everything.items()
        if node not in between and node not in rotation.gone
    }
    unneeded = between | rotation.gone | {w.node for w in final.writes}
    for node in between:
        if not all(user in unneeded or is_dead(user) for user in uses(node)):
            raise Refusal(f"{node.name} shows {tensor.name} half rotated")
    readers = Readers(tensor, (write,), versions, epilogue, rotation.gone | between)
    readers.check()
    returned = tuple(readers.returned)
    if epilogue is None and len(set(returned)) > 1:
        raise Refusal(f"several results would share memory with {tensor.name}")
    earlier = {late: tuple(nodes) for late, nodes in readers.earlier.items()}
    copied = returned if epilogue is not None else ()
    return Chain(tensor, (write,), versions, epilogue, frozenset(), copied, earlier, rotation)


def _check_unwritten(factor: Node, place: Node) -> None:
    """The rotation at `place` reads what `factor` held where the graph has it.

    Raises:
        Refusal: its memory is written in between.
    """
    memory = roots(factor)
    for node in factor.graph.nodes:
        if factor < node < place and is_mutation(node) and roots(node.all_input_nodes[0]) & memory:
            raise Refusal(f"{node.name} writes into {factor.name}, by which {place.name} rotates, before it does so")


def _versions(cache: Node, final: Value, values: Values) -> dict[Node, Value]:
    """Every node that shows the input after some first part of the writes, the input itself included."""
    found: dict[Node, Value] = {}
    stack = [cache]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        value = values.of(node)
        prefix = len(value.writes) <= len(final.writes) and all(a is b for a, b in zip(value.writes, final.writes))
        if value.origin is cache and prefix:
            found[node] = value
            stack += [user for user in uses(node) if isinstance(user.meta.get("val"), torch.Tensor)]
    return found


# Looks at the views that are to take the places of versions, and at the new writes, and raises a Refusal if it must.
Check = Callable[[Mapping[Node, Node], Sequence[Node]], None]


def write_in_place(graph: Graph, chain: Chain, check: Check | None = None) -> None:
    """Replace the versions of the input by the input, and the epilogue by writes into it.

    All new nodes are made before any old one changes, and shown to `check`; if that fails they are taken out again.
    """
    before = set(graph.nodes)
    trace = {k: v for k, v in chain.writes[0].node.meta.items() if k == "stack_trace"}
    places: dict[Write, Node] = {}
    try:
        for write in chain.writes:
            previous = write.node.prev
            with graph.inserting_before(write.node):
                if chain.rotation is not None:
                    emit(graph, chain.cache, chain.rotation)
                else:
                    _emit(graph, chain, write)
            places[write] = previous.next
        shown = _shown(graph, chain)
        if check is not None:
            check(shown, [n for n in graph.nodes if n not in before and is_mutation(n)])
        copies = {node: _returned_copy(graph, node) for node in chain.returned}
    except BaseException:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        raise
    for write, nodes in chain.earlier.items():
        for node in nodes:
            for moved in (node, *copies.get(node, ())):
                places[write].prepend(moved)
    for node, (buffer, *_) in copies.items():
        graph.output_node().replace_input_with(node, buffer)
    for node, view in shown.items():
        node.replace_all_uses_with(view)
    if chain.epilogue is not None:
        chain.epilogue.replace_all_uses_with(chain.cache)
        graph.erase_node(chain.epilogue)
    finish(graph, before, trace)


def finish(graph: Graph, before: set[Node], trace: dict[str, Any]) -> None:
    """Metadata after new writes: patterns must not match across them, so torch has to number the regions between."""
    for node in graph.nodes:
        node.meta.pop("mutation_region_id", None)
        if node not in before:
            node.meta.update(trace)


def _emit(graph: Graph, chain: Chain, write: Write) -> None:
    target = _view(graph, chain.cache, write.window)
    if write.indexed:
        _, indices, values, *rest = write.node.args
        values = aside(graph, write.source) if write in chain.buffered else values
        call(graph, aten.index_put_.default, target, indices, values, *rest)
    else:
        source = aside(graph, write.source) if write in chain.buffered else write.source
        call(graph, aten.copy_.default, target, source)


def aside(graph: Graph, source: Node) -> Node:
    """A copy of `source` that no pass removes: `clone` counts as doing nothing."""
    value = source.meta["val"]
    lengths: list[Any] = [size(graph, source, axis) for axis in range(value.dim())]
    buffer = call(graph, aten.empty.memory_format, lengths, dtype=value.dtype, device=value.device, pin_memory=False)
    _fill(graph, buffer, source)
    return buffer


def _fill(graph: Graph, buffer: Node, source: Node) -> tuple[Node, ...]:
    """Copy `source` into `buffer`, through views: else Inductor makes `buffer` the memory of an input to be saved."""
    views = [call(graph, aten.unsqueeze.default, node, 0) for node in (buffer, source)]
    return *views, call(graph, aten.copy_.default, *views)


def _returned_copy(graph: Graph, node: Node) -> tuple[Node, ...]:
    """A copy of a version with its shape and strides, at the place where it stands: the buffer, and what fills it."""
    value = node.meta["val"]
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        reason = f"{node.name}, which would be the input itself, is returned, and its sizes are symbolic"
        raise Refusal(reason, f"do not return it, or {advice.STATIC}")
    with graph.inserting_before(node.next):
        form = list(value.shape), list(value.stride())
        buffer = call(graph, aten.empty_strided.default, *form, dtype=value.dtype, device=value.device)
        return buffer, *_fill(graph, buffer, node)


def _view(graph: Graph, base: Node, window: Window) -> Node:
    node = base
    for view in window.path:
        node = call(graph, view.target, node, *view.args)
    if not is_alias(node, base):
        raise Refusal(f"a part of {base.name} that is written cannot be shown without a copy")
    return node


def _shown(graph: Graph, chain: Chain) -> dict[Node, Node]:
    """For each version that is no view of another: the view of the input that takes its place."""
    shown: dict[Node, Node] = {}
    for node, value in chain.versions.items():
        if not is_write(node):
            continue
        needed = [u for u in node.users if u is not chain.epilogue and u not in chain.versions and not is_dead(u)]
        with graph.inserting_before(node.next):
            view = _view(graph, chain.cache, value.window)
        if needed and not _same_layout(node, view):
            raise Refusal(f"{node.name} has other strides than the part of {chain.cache.name} in whose place it stands")
        shown[node] = view
    return shown


def _same_layout(a: Node, b: Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    pairs = [*zip(x.shape, y.shape), *((s, t) for n, s, t in zip(x.shape, x.stride(), y.stride()) if not known(n == 1))]
    return x.dtype == y.dtype and len(x.shape) == len(y.shape) and all(known(s == t) for s, t in pairs)


def describe(chain: Chain) -> str:
    """The chain in words."""
    shape: Any = list(chain.cache.meta["val"].shape)
    if chain.rotation is not None:
        pairs = chain.rotation.pairs
        kind = "neighbouring channels" if pairs.neighbours else "channels of two halves"
        back = " back" if chain.rotation.inverse else ""
        return f"{pairs.window.shape[-1]} pairs of {kind} rotated{back} in a tensor of shape {shape}, in place"
    slices, indexed = len(chain.writes) - chain.overwritten, chain.overwritten
    counted = ((slices, "slice write"), (indexed, "index write"))
    kinds = [f"{n} {name}{'s' if n > 1 else ''}" for n, name in counted if n]
    return f"{' and '.join(kinds)} into an input of shape {shape}, in place"
