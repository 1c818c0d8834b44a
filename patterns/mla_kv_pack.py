"""The key of multi-head latent attention, put together and cast to float8, with the value's cast beside it.

Found: a tensor [.., T, H, N + R] or [.., H, T, N + R] made of two parts along its columns, one of which all heads share

    K = cast(steps([k_nope | k_pe]))        V = cast(steps(v)), v another window of the tensor that holds k_nope

whatever the spelling: assignment to slices of an empty or zero tensor, `copy_`, `cat`; k_pe broadcast by an
assignment or expanded; scales, clamps and the cast before, between or after. The structure says which columns come
from where and in which order the steps are taken, and the values at random places have to agree with it.

Near misses:

- parts that overlap, leave a gap, have fewer than 8 columns, or of which none or both are shared by the heads
- parts that are shared by batches or tokens
- a scale per channel, head or token; more than one scale, number and clamp; other steps for one part than for the other
- a key that stays in the dtype of its parts, which stock Inductor builds in one launch

Refused:

- parts of a width that is no multiple of 8, or is more than 1,024
- a symbolic number of heads or columns; batch and tokens may be symbolic
- the wide key is needed elsewhere
- GPUs before sm_89 and AMD GPUs, which do not cast to float8 with saturation

Not worth it: an operand is computed by an operator that Inductor fuses with the key, such as a rotary embedding in the
graph; all consumers are such operators; or the key is written into a tensor of the caller, which stock does in place.

Gains: one launch in place of two; with a symbolic number of tokens full vectors, where stock Inductor is 1.5 times
slower.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import advice, arch, rewrite
from fusion_passes import aten as semantics
from fusion_passes.fusion import Because, Context, Fusion, NearMiss, Reason, Refusal, Site, dtype_name
from fusion_passes.layout import Piece
from fusion_passes.ops import mla_kv_pack as op
from fusion_passes.ops._mla_kv_pack_checks import LARGEST_WIDTH, VECTOR
from fusion_passes.patterns import _mla_value
from fusion_passes.patterns._mla_chain import BUILDS, FLOAT8, FLOATS
from fusion_passes.patterns._mla_key import MOVES, Key, is_cast, prove, roots
from fusion_passes.patterns._mla_parts import interior
from fusion_passes.patterns._mla_profit import computed_leaf, fusible_consumer, written_in_place
from fusion_passes.patterns._mla_value import Value
from fusion_passes.patterns._mla_views import Lengths, composed, per_root_axis, relabel, window
from fusion_passes.sizes import Sizes, Unsupported

aten = torch.ops.aten


def wants(anchor: Node) -> bool:
    """Casts to float8, and the last step of putting a tensor of three or more axes together from two parts."""
    value = anchor.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    if anchor.target not in BUILDS:
        source = anchor.args[1 if anchor.target is aten.copy.default else 0]
        return value.dtype in FLOAT8 and isinstance(source, Node) and source.meta["val"].dtype not in FLOAT8
    if value.dtype not in FLOATS or value.dim() < 3:
        return False
    if anchor.target is aten.cat.default:
        return len(semantics.arguments(anchor)["tensors"]) == 2
    return not any(user.target is aten.slice_scatter.default and user.args[0] is anchor for user in anchor.users)


def match(anchor: Node, context: Context) -> Site | None:
    """Prove that the cast at `anchor`, or what it becomes a part of, is an MLA key."""
    key = _cast_key(anchor, context) if anchor.target not in BUILDS else _uncast_key(anchor, context)
    if key is None:
        return None
    value = _value(key, context) if is_cast(key) else None
    nope, pe = key.parts
    leaves = {"k_nope": nope.leaf, "k_pe": pe.leaf}
    leaves |= {"k_scale": key.scale} if key.scale is not None else {}
    inner = interior(key.build) | set(key.chain.nodes)
    if value is not None:
        leaves |= {"v": value.leaf} | ({"v_scale": value.scale} if value.scale is not None else {})
        inner |= value.interior
    return Site(
        anchor=anchor,
        replaced=key.root,
        also=(value.root,) if value is not None else (),
        leaves=leaves,
        interior=inner - set(leaves.values()),
        params={"key": key, "value": value, "sizes": context.sizes[0]},
        roundings=[*key.roundings, *(value.roundings if value is not None else ())],
        summary=_summary(key, value),
        saved_launches=1 if value is not None else 0,
    )


def _cast_key(anchor: Node, context: Context) -> Key | None:
    """The key that a cast to float8 finishes, or is a part of; None where another cast speaks for it."""
    failure: Exception | None = None
    for root in roots(anchor):
        try:
            key = prove(root, context)
        except (NearMiss, Unsupported) as miss:
            failure = failure or miss
            continue
        if key is not None:
            casts = [n for n in (*interior(key.build), *key.chain.nodes) if n.target in _mla_value.CASTS and wants(n)]
            return key if anchor == min(casts) else None
    if failure is not None:
        raise failure
    return None


def _uncast_key(anchor: Node, context: Context) -> Key | None:
    """A key that stays in the dtype of its parts. Only what is a key in all respects is worth a word."""
    if any(node.meta["val"].dtype in FLOAT8 for node in _fates(anchor)):
        return None
    try:
        key = prove(anchor, context)
    except (NearMiss, Unsupported, Refusal):
        return None
    if key is None or key.steps or key.root.meta["val"].dtype != key.parts[0].leaf.meta["val"].dtype:
        return None
    return key


def _fates(node: Node) -> list[Node]:
    """What pointwise work and views make of a tensor."""
    found, pending = {node}, [node]
    while pending and len(found) < 32:
        for user in pending.pop().users:
            if (
                (user.target in semantics.POINTWISE or user.target in MOVES)
                and user not in found
                and isinstance(user.meta.get("val"), torch.Tensor)
            ):
                found.add(user)
                pending.append(user)
    return list(found)


def _value(key: Key, context: Context) -> Value | None:
    nope, _ = key.parts
    tokens, heads = [], []
    for sizes in context.sizes:
        # Factors are compared by size and step, both of which depend on the assignment.
        here = key
        if sizes is not context.sizes[0]:
            again = prove(key.root, Context(context.graph, context.settings, [sizes]))
            assert again is not None
            here = again
        moves = here.memory(here.parts[0], sizes)
        tokens.append([(p.size, moves[p]) for p in here.roles.tokens])
        heads.append([(p.size, moves[p]) for p in here.roles.heads])
    taken = interior(key.build) | set(key.chain.nodes)
    value = _mla_value.find(context.graph, nope.leaf, taken, tokens, heads, context.sizes)
    if value is None or value_reason(value) is not None:
        return None
    if not context.settings.always_profitable and fusible_consumer(value.root) is not None:
        return None
    return value


def value_reason(value: Value) -> Reason:
    """Why the kernel cannot take a value along, or None."""
    width = value.column.size
    if not value.column.static or width % VECTOR or width > LARGEST_WIDTH:
        return f"the value has {width} columns"
    return None


def _summary(key: Key, value: Value | None) -> str:
    nope, pe = key.parts
    columns = f"{nope.width} + {pe.width}" if nope.start == 0 else f"{pe.width} + {nope.width}"
    dtype, cast = nope.leaf.meta["val"].dtype, key.root.meta["val"].dtype
    with_value = f" and value of {value.column.size}{_steps(value.steps)}" if value is not None else ""
    heads = key.roles.heads[0].size
    casts = f"{dtype_name(dtype)} to {dtype_name(cast)}"
    return f"key of {columns} columns{_steps(key.steps)}{with_value}, {heads} heads, {casts}"


def _steps(steps: str) -> str:
    return f" ({steps})" if steps else ""


def guard(site: Site, context: Context) -> Reason:
    """The kernel is compiled for fixed heads and columns, and reads rows of neighbouring columns."""
    key: Key = site.params["key"]
    if not all(p.static for p in key.roles.heads):
        return advice.symbolic("heads")
    for name, part in zip(("k_nope", "k_pe"), key.parts):
        if part.width % VECTOR or part.width > LARGEST_WIDTH:
            reason = f"{name} has {part.width} columns; the kernel moves multiples of {VECTOR} up to {LARGEST_WIDTH}"
            fits = range(VECTOR, LARGEST_WIDTH + 1, VECTOR)
            return Because(reason, advice.padded(name, part.width, fits, "columns"))
        step = key.memory(part, site.params["sizes"])[key.column(part)]
        if step != 1:
            reason = f"the columns of {name} ({part.leaf.name}) lie {step} elements apart; the kernel reads neighbours"
            return Because(reason, advice.adjacent(name))
    if not isinstance(key.build.frame.meta["val"].shape[-1], int):
        return advice.symbolic("columns")
    device = site.replaced.meta["val"].device
    if is_cast(key) and (device.type == "cuda" or not context.settings.reference_on_cpu):
        on = arch.of_device(device) if device.type == "cuda" and torch.cuda.is_available() else None
        return op.float8_reason(on or arch.by_name(context.settings.arch))
    return None


def profit(site: Site, context: Context) -> Reason:
    """Only between tensors that are in memory anyway; there the one launch wins at every size that was measured."""
    key: Key = site.params["key"]
    reasons = (computed_leaf(site), *map(fusible_consumer, site.outputs), written_in_place(site))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None and not is_cast(key):
        kept = dtype_name(key.root.meta["val"].dtype)
        reason = (
            f"it stays in {kept}: stock Inductor builds such a key in one launch at the "
            "rate of a copy, and there is no value to cast beside it"
        )
    return reason


# --- rewrite ---------------------------------------------------------------------------------------------------------


def replace(site: Site, graph: Graph) -> Sequence[Node]:
    """`torch.ops.fusion_passes.mla_kv_pack` on views of the leaves, its results viewed as the graph had them."""
    key: Key = site.params["key"]
    value: Value | None = site.params["value"]
    sizes: Sizes = site.params["sizes"]
    nope, pe = key.parts
    leaves = list(site.leaves.values())
    tokens, heads = key.roles.tokens, key.roles.heads
    layout = _key_layout(key, sizes)
    split = _batches(site, sizes, layout)
    groups = [tokens[:split], tokens[split:], heads]
    columns = (key.column(nope), key.column(pe))
    lengths = Lengths({**_row_lengths(key), **{c: c.size for c in columns}}, leaves)
    k_nope = window(graph, nope.leaf, key.part_map(nope), key.pieces(nope), [*groups, columns[:1]], lengths)
    k_pe = window(graph, pe.leaf, key.part_map(pe), key.pieces(pe), [*groups[:2], columns[1:]], lengths)
    form = (key.steps, key.root.meta["val"].dtype, layout, pe.start == 0)
    if value is None:
        out = rewrite.call(graph, op.KEY_OP, k_nope, k_pe, key.scale, *form)
        return (_key_as_in_graph(graph, out, key, groups, layout, leaves),)
    own = [value.tokens[:split], value.tokens[split:], value.heads]
    value_lengths = Lengths(value.lengths(), leaves)
    v = window(graph, value.leaf, value.axes, value.pieces, [*own, [value.column]], value_lengths)
    v_layout = _value_layout(value, sizes)
    v_form = (value.steps, value.root.meta["val"].dtype, v_layout)
    out = rewrite.call(graph, op.OP, k_nope, k_pe, v, key.scale, value.scale, *form, *v_form)
    packed, cast = (rewrite.call(graph, operator.getitem, out, i) for i in (0, 1))
    have = _in_memory([*own, [value.column]], v_layout)
    want = [value.pieces[axis] for axis in sorted(value.pieces)]
    return (
        _key_as_in_graph(graph, packed, key, groups, layout, leaves),
        relabel(graph, cast, have, want, value_lengths),
    )


def _row_lengths(key: Key) -> dict[Hashable, Any]:
    frame = key.build.frame.meta["val"].shape
    return {p: p.size if p.static else frame[p.axis] for p in (*key.roles.tokens, *key.roles.heads)}


def _batches(site: Site, sizes: Sizes, layout: str) -> int:
    """How many of the token factors are batches: all but the last, or none where one step serves them all."""
    key: Key = site.params["key"]
    value: Value | None = site.params["value"]
    tokens = key.roles.tokens
    if len(tokens) < 2:
        return 0
    moves = [([step[p] for p in tokens], tokens) for step in (key.memory(part, sizes) for part in key.parts)]
    if value is not None:
        step = _mla_value.memory_steps(value.leaf, value.axes, value.pieces, sizes)
        moves.append(([step[p] for p in value.tokens], value.tokens))
    static = all(p.static for p in tokens)
    one = all(a == b * p.size for steps, ps in moves for a, b, p in zip(steps, steps[1:], ps[1:]))
    layouts = {layout} | ({_value_layout(value, sizes)} if value is not None else set())
    return 0 if static and one and layouts == {"bthd"} else len(tokens) - 1


def _in_memory(groups: Sequence[Sequence[Any]], layout: str) -> list[Sequence[Any]]:
    """Batch, tokens, heads and columns in the order that the op's result has."""
    batch, tokens, heads, columns = groups
    return [batch, heads, tokens, columns] if layout == "bhtd" else [batch, tokens, heads, columns]


def _key_layout(key: Key, sizes: Sizes) -> str:
    """Whether tokens or heads are further apart in the memory of the root."""
    strides = sizes.strides(key.root)

    def step(piece: Piece) -> int:
        for index, coefficient in key.root_map.axes[piece.axis].terms:
            atom = key.root_map.atoms[index]
            if coefficient <= piece.stride < coefficient * atom.size:
                return strides[atom.root_axis] * atom.root_stride * (piece.stride // coefficient)
        raise Refusal("its tokens or heads are divided differently before and after the cast")

    return _order(key.roles.tokens, key.roles.heads, step)


def _value_layout(value: Value, sizes: Sizes) -> str:
    strides = sizes.strides(value.root)
    return _order(value.tokens, value.heads, lambda p: strides[p.axis] * p.stride)


def _order(tokens: Sequence[Piece], heads: Sequence[Piece], step: Any) -> str:
    return "bhtd" if tokens and heads and step(heads[-1]) > step(tokens[-1]) else "bthd"


def _key_as_in_graph(
    graph: Graph, out: Node, key: Key, groups: Sequence[Sequence[Piece]], layout: str, leaves: list[Node]
) -> Node:
    """The op's key in the axes of the frame, and then in those of the root."""
    frame, root = key.build.frame.meta["val"].shape, key.root.meta["val"].shape
    columns = Piece(len(frame) - 1, 1, frame[-1], True)
    lengths = Lengths({**_row_lengths(key), columns: columns.size}, leaves)
    node = relabel(graph, out, _in_memory([*groups, [columns]], layout), [*key.roles.per_axis, [columns]], lengths)
    if key.root is key.build.frame:
        return node
    have = composed(key.root_map)
    assert have is not None
    digits: dict[Hashable, Any] = {}
    for index, atom in enumerate(key.root_map.atoms):
        whole = statically_known_true(root[atom.root_axis] == atom.size)
        symbolic = not isinstance(root[atom.root_axis], int) and not whole
        if symbolic and sum(a.root_axis == atom.root_axis for a in key.root_map.atoms) > 1:
            raise Refusal("an axis of symbolic size is divided", advice.STATIC)
        digits[index] = root[atom.root_axis] if symbolic else atom.size
    return relabel(graph, node, have, per_root_axis(key.root_map), Lengths(digits, leaves))


FUSION = Fusion(
    name="mla_kv_pack",
    doc="MLA key (k_nope and the shared k_pe) put together and cast to float8, with the value's cast, in one launch",
    anchors=(*_mla_value.CASTS, *BUILDS),
    match=match,
    replace=replace,
    guard=guard,
    profit=profit,
    wants=wants,
    absorbs=("qkv_split",),
    tolerance=4e-2,
)
