"""What in-place code leaves behind after functionalisation, and stock Inductor does not remove.

Found:

- *Identities*: a slice written back onto itself, also after an in-place operator has changed it, and a `cat` or `stack`
  of all the neighbouring parts of one tensor. The tensor itself takes their place.
- *Rotations*: rotary embedding written back over its input, or over a matrix product. One kernel does it in place.
  `verify` runs it, and allows four roundings to the tensor's dtype.
- *Chains*: several slice writes and `index_put_`s into one graph input, such as a cache of keys and values. Each is
  made in place, where stock Inductor computes the whole input anew as soon as there is more than one.
- *Changed copies* of an input that is overwritten later: nothing is saved, but stock returns what overwrote it.

Values are followed through views and writes as windows of a tensor after a sequence of writes, so that it does not
matter how the code is spelled. No result newly shares memory with an input or another result, and no reader sees
another state than it did.

Near misses:

- parts that are moved, swapped, repeated, incomplete, or were overwritten in between
- writes into tensors of the graph's own, which are no input

Refused:

- the result would share memory with an input or with another result that is returned
- memory that another operator needs as it was, or that is written between the read and the use
- a part that cannot be shown as pairs or as a slice without a copy; a rotation whose values are also used elsewhere

Not worth it: a cache so small that rewriting it costs less than a launch per write; a single write, which stock makes
in place; the rotation of a product of few tokens.

Gains: no copy. Of a cache only the rows that change are touched; a rotation takes one launch where stock Inductor has
two and a buffer. It is right where stock Inductor is not: `x[1:] = x[:-1].clone()`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Graph, Node

from fusion_passes import advice, cone, rewrite, verify
from fusion_passes.fusion import Because, Context, Fusion, NearMiss, Reason, Refusal, Site
from fusion_passes.patterns import _copies_chain as chains
from fusion_passes.patterns import _copies_rotation as rotations
from fusion_passes.patterns._copies_aliases import aliases, is_mutation, roots
from fusion_passes.patterns._copies_apart import changed_copies, keep_apart
from fusion_passes.patterns._copies_cat import joined, same_shape
from fusion_passes.patterns._copies_chain import Chain
from fusion_passes.patterns._copies_values import CLONES, SCATTERS, Value, Values, Write, is_write, same_content
from fusion_passes.patterns._copies_windows import Window
from fusion_passes.patterns._qkv_profit import is_opaque
from fusion_passes.sizes import Sizes
from fusion_passes.views import is_alias, is_view

aten = torch.ops.aten

# What one more launch costs, as bytes that the GPU moves in that time.
LAUNCH_BYTES = 4 << 20
# Bytes that a rotation in place has to save where stock rotates out of place in one kernel too.
ROTATION_BYTES = 1 << 20
# Units in the last place by which `verify` lets a rotation differ: the graph rounds every product and sum.
ROUNDINGS = 4

_DTYPES = tuple(dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype))


def wants(anchor: Node) -> bool:
    """A cheap look: is a part of a tensor copied at all?"""
    if anchor.target is aten.copy_.default:
        target, source = anchor.args[:2]
        if not isinstance(target, Node) or target.op != "placeholder":
            return False
        written = is_write(_behind_views(source)) or any(map(is_write, target.users))
        return written or _may_be_rotated(target, source)
    if anchor.target is aten.cat.default:
        pieces = anchor.args[0]
        return isinstance(pieces, (list, tuple)) and len(pieces) > 1 and all(map(_is_part, pieces))
    return True


def _is_part(node: object) -> bool:
    if not isinstance(node, Node):
        return False
    copied = node.target in CLONES or node.target in (aten.copy.default, aten.cat.default)
    return copied or is_view(node) or is_write(node)


def _may_be_rotated(target: Node, source: object) -> bool:
    """Is all of `target` overwritten by what is computed from parts of it?"""
    value = target.meta["val"]
    pairs = value.dim() > 1 and isinstance(value.shape[-1], int) and value.shape[-1] % 2 == 0
    computed = isinstance(source, Node) and (source.target is aten.copy.default or cone.is_transparent(source))
    return computed and pairs and value.dtype.is_floating_point and len(target.users) > 1


def _behind_views(node: object) -> object:
    while isinstance(node, Node) and node.op == "call_function" and is_view(node):
        node = node.args[0]
    return node


def match(anchor: Node, context: Context) -> Site | None:
    """The identity or the chain of writes at `anchor`."""
    values: Values = context.memo.setdefault("values", Values())
    if anchor.target is aten.copy_.default:
        _, last = _nodes(anchor)
        rotation = _rotation(values.of(last), anchor, values, context)
        chain = rotation or chains.find(anchor, values)
        apart = changed_copies(anchor, values)
        if chain is not None and (apart or not _served_by_stock(chain)):
            return _chain_site(anchor, chain, context)
        return _apart_site(anchor, apart, context) if apart else None
    if anchor.target is aten.cat.default:
        source = joined(anchor, values)
        return None if source is None else _identity_site(anchor, source, context)
    source = _written_back(anchor, values)
    if source is not None:
        return _identity_site(anchor, source, context)
    rotation = _rotation(values.of(anchor), None, values, context)
    return None if rotation is None else _chain_site(anchor, rotation, context)


def _nodes(write: Node) -> tuple[Node, Node]:
    """What a scatter or `copy_` writes into, and what it writes."""
    into, written = write.args[:2]
    assert isinstance(into, Node) and isinstance(written, Node)
    return into, written


def _rotation(final: Value, epilogue: Node | None, values: Values, context: Context) -> Chain | None:
    """The rotation whose result is `final`; of a tensor that the graph computes if there is no epilogue."""
    if epilogue is not None and final.origin is not epilogue.args[0]:
        final = _overwritten(epilogue)
    tensor = final.origin
    if not 1 <= len(final.writes) <= 2:
        return None
    if epilogue is not None:
        if tensor is not epilogue.args[0] or not final.is_whole:
            return None
    elif not is_opaque(tensor) or any(root.op != "call_function" for root in roots(tensor)):
        return None
    rotation = rotations.find(tensor, final.writes, context.sizes)
    return None if rotation is None else chains.rotated(rotation, final, epilogue, values)


def _overwritten(epilogue: Node) -> Value:
    """An input after `epilogue` as one write of the whole."""
    target, _ = _nodes(epilogue)
    whole = Window.whole(target.meta["val"].shape)
    return Value(target, whole, (Write(epilogue, whole),))


def _written_back(scatter: Node, values: Values) -> Node | None:
    """The tensor into which `scatter` writes what it holds there already; None if it writes something else."""
    into, written = _nodes(scatter)
    if same_content(values.of(scatter), values.of(into)):
        # Nested writes are one: the outermost stands for all.
        return None if _nested_only(scatter, values) else into
    source, result = values.of(written), values.of(scatter)
    if source.origin is result.origin and result.writes and result.writes[-1].node is scatter:
        raise NearMiss(_difference(source, result))
    return None


def _nested_only(scatter: Node, values: Values) -> bool:
    """Is the result of `scatter` only written back itself?"""
    outer = [user for user in scatter.users if user.target in SCATTERS and user.args[0] is not scatter]
    identities = all(same_content(values.of(user), values.of(_nodes(user)[0])) for user in outer)
    return bool(outer) and len(outer) == len(scatter.users) and identities


def _difference(source: Value, result: Value) -> str:
    region = result.writes[-1].window
    if source.window.same(region):
        return f"the part of {source.origin.name} that is written back has been overwritten in between"
    return f"a part of {source.origin.name} is written to another place than it was read from"


def _identity_site(anchor: Node, source: Node, context: Context) -> Site:
    moved = 2 * context.sizes[0].numel(anchor) * anchor.meta["val"].dtype.itemsize
    kind = "joined again" if anchor.target is aten.cat.default else "written back onto itself"
    summary = f"parts of a tensor of shape {list(anchor.meta['val'].shape)}, {kind}"
    site = Site(anchor, anchor, {"x": source}, set(), summary=summary, saved_bytes=moved, saved_launches=1)
    site.rewrite = functools.partial(_drop, site, context)
    return site


def _drop(site: Site, context: Context) -> None:
    """Put the tensor in the place of its copy."""
    source = site.leaves["x"]

    def build() -> list[Node]:
        return [source if same_shape(source, site.anchor) else _reshaped(source, site.anchor)]

    rewrite.replace(context.graph, site.outputs, (), build, context.sizes, {})
    # What wrote an input back into itself does nothing now.
    values = Values()
    for epilogue in context.graph.find_nodes(op="call_function", target=aten.copy_.default):
        target, last = _nodes(epilogue)
        value = values.of(last)
        if target.op == "placeholder" and value.origin is target and value.is_whole and not value.writes:
            epilogue.replace_all_uses_with(target)
            context.graph.erase_node(epilogue)


def _reshaped(source: Node, like: Node) -> Node:
    """A view of `source` with the shape of `like`."""
    shape = [n if isinstance(n, int) else -1 for n in like.meta["val"].shape]
    if shape.count(-1) > 1:
        raise Refusal(f"{like.name} has several symbolic sizes, and {source.name} another shape", advice.STATIC)
    view = rewrite.call(source.graph, aten.reshape.default, source, shape)
    if not is_alias(view, source):
        raise Refusal(f"{source.name} cannot be shown with the shape of {like.name} without a copy")
    return view


def _chain_site(anchor: Node, chain: Chain, context: Context) -> Site:
    sizes = context.sizes[0]
    item = chain.cache.meta["val"].dtype.itemsize
    written = sum(_elements(write.window, sizes) for write in chain.writes)
    site = Site(
        anchor=anchor,
        replaced=anchor,
        leaves={"cache": chain.cache},
        interior=set(),
        params={"chain": chain},
        summary=chains.describe(chain),
        # Stock reads and writes the whole input.
        saved_bytes=max(2 * item * (sizes.numel(chain.cache) - written), 0),
    )
    check = None
    if chain.rotation is not None and context.settings.verify:
        check = functools.partial(_verify_rotation, chain, context)
    site.rewrite = functools.partial(chains.write_in_place, context.graph, chain, check)
    return site


def _verify_rotation(chain: Chain, context: Context, shown: Mapping[Node, Node], writes: Sequence[Node]) -> None:
    """Run the rotation and the kernel on random tensors and factors, and allow some roundings to the tensor's dtype."""
    rotation = chain.rotation
    assert rotation is not None
    known = (chain.cache, rotation.cos, rotation.sin)
    cones = [cone.backward(write.source, stop=known) for write in rotation.pairs.writes]
    leaves = dict.fromkeys([*known, *(leaf for found in cones for leaf in found.leaves)])
    fusion = dataclasses.replace(FUSION, tolerance=ROUNDINGS * torch.finfo(chain.cache.meta["val"].dtype).eps)
    verify.check_in_place(fusion, shown, writes, leaves, context.sizes[0])


def _apart_site(anchor: Node, changed: list[Node], context: Context) -> Site:
    """Stock makes a changed copy of an input in the input itself, and then overwrites it."""
    target, _ = _nodes(anchor)
    names = ", ".join(node.name for node in changed)
    site = Site(anchor, anchor, {"x": target}, set(), params={"changed": changed})
    site.summary = f"{names} returned from memory of its own, since its input is overwritten: correctness, not speed"
    site.rewrite = functools.partial(keep_apart, context.graph, changed)
    return site


def _elements(window: Window, sizes: Sizes) -> int:
    return math.prod(sizes.of(n) for n in window.shape)


def _served_by_stock(chain: Chain) -> bool:
    """Does stock Inductor write in place here too? It does so for one write that is made on the input directly."""
    if chain.rotation is not None or len(chain.writes) != 1 or chain.buffered or chain.returned:
        return not chain.writes
    (write,) = chain.writes
    direct = not write.indexed or (chain.epilogue is not None and chain.epilogue.args[1] is write.node)
    return (
        direct
        and all(view.target in SCATTERS.values() for view in write.window.path)
        and not (write.indexed and write.window.path)
    )


def guard(site: Site, context: Context) -> Reason:
    """No result may newly share memory with an input or another result, and nothing may be written in between."""
    if "chain" in site.params or "changed" in site.params:
        return None
    source, copy = site.leaves["x"], site.anchor
    output = context.graph.output_node()
    returned = [node for node in aliases(copy) if output in node.users]
    if returned:
        if any(root.op != "call_function" for root in roots(source)):
            reason = f"{returned[0].name} is returned and would share memory with an input"
            return Because(reason, "do not return it: it has the values of the input, which the caller has")
        others = {n for root in roots(source) for n in aliases(root)} - aliases(copy)
        if any(output in node.users for node in others):
            reason = f"{returned[0].name} is returned and would share memory with another result"
            return Because(reason, "return only one of the two")
    return _written_between(source, copy)


def _written_between(source: Node, copy: Node) -> Reason:
    """Memory that is written in place while the copy is still in use."""
    last = max((user for node in aliases(copy) for user in node.users if user.op != "output"), default=copy)
    memory = roots(source)
    node = source.next
    while node < last:
        if is_mutation(node) and any(roots(n) & memory for n in node.all_input_nodes[:1]):
            reason = f"{source.name} is written by {node.name} while its copy is in use"
            return Because(reason, f"write to {source.name} after the last use of the copy")
        node = node.next
    return None


def profit(site: Site, context: Context) -> Reason:
    """Every slice write beyond the first is one more launch; stock rewrites the whole input in one."""
    chain: Chain | None = site.params.get("chain")
    if chain is None or chain.buffered or chain.overwritten:
        return None
    if chain.rotation is not None:
        return _rotation_pays(site, chain)
    extra = LAUNCH_BYTES * (len(chain.writes) - 1)
    if (site.saved_bytes or 0) < extra:
        size = f"{(site.saved_bytes or 0) / 2**20:.1f} MiB"
        return f"{len(chain.writes)} launches for {size} less memory traffic: stock is faster with one"
    return None


def _rotation_pays(site: Site, chain: Chain) -> Reason:
    """In an input stock needs two kernels; a tensor of the graph's own it copies with the rotation, in one."""
    if chain.epilogue is None and (site.saved_bytes or 0) < ROTATION_BYTES:
        return f"a copy of {(site.saved_bytes or 0) / 2**20:.2f} MiB costs less than a launch of its own"
    return None


def replace(site: Site, graph: Graph) -> Node:
    """The value that takes the copy's place; the sites of this fusion rewrite the graph themselves."""
    return site.leaves["x"]


FUSION = Fusion(
    name="redundant_copy",
    doc="copies that in-place code leaves behind: slices written back, parts joined again, caches written piecewise",
    anchors=(*SCATTERS, aten.cat.default, aten.copy_.default),
    match=match,
    guard=guard,
    profit=profit,
    replace=replace,
    wants=wants,
    dtypes=_DTYPES,
    tolerance=0.0,
)
