"""The part of a chunked delta rule that needs no state, where the whole is not found: a symbolic number of tokens, a
scan that is another one.

Found: from the sums of log decays within chunks of 16, 32 or 64 tokens, the results of a unit lower triangular system

    (I + L) u = beta v,  (I + L) w = beta k exp G,  L_ij = beta_i sum_k k_i k_j exp(G_i - G_j)  (j < i)

however it is solved (triangular solve, forward substitution, inverse, products) and spelled; with them, where the graph
has them, the pairs of queries and keys, of all chunks or chunk by chunk. One decay per head or per channel; u and w
solved apart or together. Everything is decided by evaluating the graph (`_intra_proof`).

Near misses:

- systems that read anything but rows of k, v and beta and one sum of decays
- operators that mix heads, batches or chunks, that clamp a value, or that round it on the way

Refused:

- chunks of 128 tokens, and a symbolic number of heads
- K or V that are no multiple of 16, or above 256
- inverses or decays that are needed elsewhere, or saved for the backward pass

Gains: one launch in place of 14 (a decay per head) to 100 (per channel). The decays between tokens, 64 per token and
head or channel, never go to memory.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import advice, rewrite
from fusion_passes import aten as semantics
from fusion_passes.fusion import Because, Context, Fusion, NearMiss, Reason, Refusal, Site
from fusion_passes.ops import delta_rule_intra as op
from fusion_passes.ops._delta_rule_intra_checks import CHUNKS, MOST_CHANNELS
from fusion_passes.patterns import _delta_rule_operands as operands
from fusion_passes.patterns._chunk_assembly import CHUNK_SIZES
from fusion_passes.patterns._delta_rule_region import Leaf
from fusion_passes.patterns._intra_frame import Frame, frames
from fusion_passes.patterns._intra_pairs import Pairs, pairs_of
from fusion_passes.patterns._intra_proof import Meaning, prove
from fusion_passes.patterns._intra_search import Parts, Tokens, candidates, checked, choices, unlike
from fusion_passes.patterns.chunk_delta_rule import _in_memory_order
from fusion_passes.sizes import Sizes, Unsupported

aten = torch.ops.aten


def wants(anchor: Node) -> bool:
    """A cumulative sum over chunks, rather than a count of positions."""
    value = anchor.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.dim() < 2:
        return False
    length = value.shape[int(semantics.arguments(anchor)["dim"]) % value.dim()]
    return any(statically_known_true(length == size) for size in CHUNK_SIZES)


def match(anchor: Node, context: Context) -> Site | None:
    """Prove that the sums at `anchor` decay the intra-chunk part of a delta rule."""
    found = _found(anchor, context.sizes[0], None)
    if found is None:
        return None
    first = _identity(*found, context.sizes[0])
    for sizes in context.sizes[1:]:
        again = _found(anchor, sizes, found)
        if again is None or _identity(*again, sizes) != first:
            raise NearMiss("it is a delta rule for some sizes only", advice.STATIC)
    return _site(anchor, *found, context.sizes[0])


Found = tuple[Parts, Meaning, Pairs | None]


def _identity(found: Parts, meaning: Meaning, pairs: Pairs | None, sizes: Sizes) -> tuple[object, ...]:
    """What has to be the same under every assignment of sizes."""
    more = None if pairs is None else (pairs.scale, pairs.nodes, pairs.order)
    rows = [(role, row.node, row.head_first) for role, row in _read(found, pairs, sizes).items()]
    return (found.frame.order, found.results, rows, meaning, more)


def _found(anchor: Node, sizes: Sizes, before: Found | None) -> Found | None:
    failure: Exception | None = None
    strange: str | None = None
    for frame in frames(anchor, sizes):
        nodes = candidates(frame, sizes) if before is None else before[0].results
        tokens = Tokens(frame, sizes)
        for choice in choices(frame, nodes, tokens, sizes) if nodes else ():
            try:
                found = checked(frame, choice, tokens, sizes)
                meaning = prove(found, sizes, before is not None)
            except (NearMiss, Unsupported) as miss:
                failure = failure or miss
            else:
                return found, meaning, pairs_of(found, meaning, sizes)
        strange = strange or unlike(nodes, tokens)
    if failure is None and strange is None:
        return None
    raise failure or NearMiss(strange or "")


def _site(anchor: Node, found: Parts, meaning: Meaning, pairs: Pairs | None, sizes: Sizes) -> Site:
    rows = _read(found, pairs, sizes)
    leaves = {role: row.node for role, row in rows.items()} | {"sums": found.frame.sums}
    depends, order = found.region.depends, found.region.leaves
    ours = {n for n in found.region.nodes if depends[n]} | (set() if pairs is None else pairs.interior)
    # what is made of beta and decays belongs to the system; decays and rows of k may have other uses
    system = 1 << order.index(found.leaves["beta"]) | 1 << len(order) - 1
    checks = _checks(found)
    computed = (*found.results, *(() if pairs is None else pairs.nodes))
    replaced = _rounded(computed)
    size, key, value = found.frame.size, found.leaves["k"].width, found.leaves["v"].width
    kind = "per channel" if found.frame.per_channel else "per head"
    more = "" if pairs is None else f", pairs of q and k of {'all chunks' if len(pairs.nodes) == 1 else 'each chunk'}"
    return Site(
        anchor=anchor,
        replaced=replaced[0],
        also=(*replaced[1:], *checks),
        leaves=leaves,
        interior=(ours | {*computed, *replaced}) - set(leaves.values()),
        shared=frozenset(n for n in ours if depends.get(n, 0) & system != system),
        params={"rows": rows, "frame": found.frame, "meaning": meaning, "pairs": pairs, "sizes": sizes,
                "widths": (key, value), "checks": checks},
        roundings=[*found.region.roundings, *(() if pairs is None else pairs.roundings)],
        summary=f"solved chunks of {size['c']} of a delta rule: {rows['k'].shape[2]} key and {size['h']} value heads "
        f"of {key} x {value}, decay {kind}{more}",
    )  # fmt: skip


def _rounded(results: Sequence[Node]) -> Sequence[Node]:
    """The casts of all results to one narrower dtype, where nothing else reads them: the op rounds as well."""
    casts = [user for node in results for user in node.users if user.target in semantics.CASTS]
    dtypes = {user.meta["val"].dtype for user in casts}
    alone = all(len(node.users) == 1 for node in results) and len(casts) == len(results)
    return casts if alone and len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16} else results


def _checks(found: Parts) -> list[Node]:
    """Whether inverses exist, where that is asked for: those of unit triangular matrices do."""
    calls = [node for node in found.region.nodes if node.target is aten.linalg_inv_ex.default]
    return [node for call in calls for node in call.users if node.target is operator.getitem and node.args[1] == 1]


def _read(found: Parts, pairs: Pairs | None, sizes: Sizes) -> dict[str, operands.Rows]:
    """What the op reads by role, the sums excepted."""
    rows = {role: _rows(leaf, role == "k", sizes) for role, leaf in found.leaves.items()}
    if pairs is not None:
        rows["q"] = _rows(pairs.query, True, sizes)
        if rows["q"].shape != rows["k"].shape:  # a repetition that only one of them shows
            rows |= {role: _plain(leaf, sizes) for role, leaf in (("k", found.leaves["k"]), ("q", pairs.query))}
    return rows


def _rows(leaf: Leaf, shared: bool, sizes: Sizes) -> operands.Rows:
    """What a leaf is read from; a repetition of heads is read by index if it may be `shared` by several."""
    rows = operands.rows(leaf.node, leaf.head_first, sizes)
    return rows if shared or rows.shape[2] == leaf.heads else _plain(leaf, sizes)


def _plain(leaf: Leaf, sizes: Sizes) -> operands.Rows:
    shape = sizes.shape(leaf.node)
    if leaf.head_first:
        shape = (shape[0], shape[2], shape[1], *shape[3:])
    return operands.Rows(leaf.node, shape, leaf.head_first)


def guard(site: Site, context: Context) -> Reason:
    """The kernels have a few chunk sizes, and head dims and heads that are known."""
    length = site.params["frame"].size["c"]
    if length not in CHUNKS:
        reason = f"its chunks have {length} tokens; the kernels have {', '.join(map(str, CHUNKS))}"
        return Because(reason, f"divide the sequence into chunks of {advice.listed(CHUNKS)} tokens")
    for name, tensors, width in zip(("K", "V"), ("q and k", "v"), site.params["widths"]):
        if width % 16 or not 16 <= width <= MOST_CHANNELS:
            reason = f"{name} is {width}; the kernels have multiples of 16 up to {MOST_CHANNELS}"
            return Because(reason, advice.padded(tensors, width, range(16, MOST_CHANNELS + 1, 16)))
    for role, rows in site.params["rows"].items():
        shape = rows.node.meta["val"].shape
        if not all(isinstance(n, int) for n in (shape[1 if rows.head_first else 2], *shape[3:])):
            reason = f"the heads of {role} are symbolic; the kernel is compiled for a fixed number"
            return Because(reason, advice.STATIC)
    return None


def replace(site: Site, graph: Graph) -> list[Node]:
    """`torch.ops.fusion_passes.delta_rule_intra`, and its results in the shape and memory order that the graph has."""
    meaning, pairs, frame, sizes = (site.params[name] for name in ("meaning", "pairs", "frame", "sizes"))
    read = {role: rows.build(graph, dense=role != "beta") for role, rows in site.params["rows"].items()}
    first = site.outputs[0]
    columns = _by_columns(first, sizes)
    fused = rewrite.call(
        graph, op.OP, read["k"], read["v"], _sums(graph, frame), read["beta"], read.get("q"),
        pairs.scale if pairs is not None else 1.0, meaning.norm_eps, meaning.results, columns,
        pairs is not None and len(pairs.nodes) > 1, first.meta["val"].dtype,
    )  # fmt: skip
    results = []
    for index, (old, order) in enumerate(zip(site.outputs, meaning.orders)):
        new = rewrite.call(graph, operator.getitem, fused, index)
        results.append(_as_in_graph(graph, new, old, order, columns, frame.size["c"]))
    if pairs is not None:
        whole = rewrite.call(graph, operator.getitem, fused, 2)
        for index, old in enumerate(pairs.nodes):
            part = whole if len(pairs.nodes) == 1 else rewrite.call(graph, aten.select.int, whole, 2, index)
            results.append(_as_in_graph(graph, part, old, pairs.order, False, frame.size["c"]))
    return results + [_no_errors(graph, old) for old in site.params["checks"]]


def _no_errors(graph: Graph, old: Node) -> Node:
    value = old.meta["val"]
    shape = [rewrite.known_size(graph, old, axis) for axis in range(value.dim())]
    return rewrite.call(graph, aten.full.default, shape, 0, dtype=value.dtype, device=value.device)


def _sums(graph: Graph, frame: Frame) -> Node:
    """The sums as [B, H, N, C] or [B, H, N, C, K]."""
    letters = [letter for letter in "bhnck" if letter in frame.order]
    order = [frame.order.index(letter) for letter in letters]
    node = frame.sums
    if order != sorted(order):
        node = rewrite.call(graph, aten.permute.default, node, order)
    for axis, letter in enumerate("bhn"):
        if letter not in frame.order:
            node = rewrite.call(graph, aten.unsqueeze.default, node, axis)
    if frame.per_channel and node.meta["val"].stride(-1) != 1:
        node = rewrite.call(graph, aten.clone.default, node, memory_format=torch.contiguous_format)
    return node


def _by_columns(node: Node, sizes: Sizes) -> bool:
    return sizes.strides(node)[-2] == 1 and sizes.shape(node)[-1] > 1


def _as_in_graph(graph: Graph, node: Node, old: Node, order: str, columns: bool, length: int) -> Node:
    """A result [B, H, (N,) C, D] as the shape, with the leading axes in this order, and the strides of `old`."""
    rank = node.meta["val"].dim()
    lead = ["bhn".index(letter) for letter in order if letter != "n" or rank == 5]
    lead = [sorted(lead).index(axis) for axis in lead]
    node = _permuted(graph, node, [*lead, rank - 2, rank - 1])
    shape = list(old.meta["val"].shape)
    ours = node.meta["val"].shape
    if len(ours) != len(shape) or not all(statically_known_true(a == b) for a, b in zip(ours, shape)):
        wanted = [n if isinstance(n, int) else length if statically_known_true(n == length) else -1 for n in shape]
        if wanted.count(-1) > 1:
            raise Refusal(f"the shape of {old.name} has more than one symbolic axis", advice.STATIC)
        if columns:  # what is dense can be viewed in another shape
            node = _permuted(graph, node, [*range(rank - 2), rank - 1, rank - 2])
            wanted = [*wanted[:-2], wanted[-1], wanted[-2]]
        node = rewrite.call(graph, aten.reshape.default, node, wanted)
        if columns:
            node = _permuted(graph, node, [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2])
    static = all(isinstance(n, int) for n in (*shape, *node.meta["val"].shape))
    return _in_memory_order(graph, node, old) if static else node


def _permuted(graph: Graph, node: Node, order: list[int]) -> Node:
    return node if order == sorted(order) else rewrite.call(graph, aten.permute.default, node, order)


FUSION = Fusion(
    name="delta_rule_intra",
    doc="triangular systems of a chunked gated delta rule (GDN, KDA): u, w and pairs of queries and keys",
    anchors=(aten.cumsum.default,),
    wants=wants,
    match=match,
    replace=replace,
    guard=guard,
    tolerance=1e-2,
)
