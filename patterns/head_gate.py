"""The weights of a sparse-attention indexer's heads.

Found: a matrix product of rows with the weights of 8 to 128 heads, scaled by a constant and perhaps by a tensor with
one number per row and head,

    out[t, h] = (sum over k of x[t, k] * weight[h, k]) * scale * q_scale[t, h]

whatever the spelling: `linear`, `matmul`, `einsum` or `bmm`, in either order of the operands; operands as they are or
upcast; the constant as one or several factors or divisors before or behind the product; any views. The product is
taken from the graph as it is, what becomes of it by its values at random places.

Near misses:

- a product that no constant scales, an ordinary linear layer, or that is needed elsewhere as well
- anything but a multiple of the product behind it: a sum, an activation, a clamp
- a second tensor beside `q_scale`, or one that Inductor computes on the spot and that would have to go to memory

Nothing is recorded of a product with a bias, which is another operator, or of weights that differ from batch to batch.

Refused:

- scales whose axes are divided otherwise than those of the product, or that are repeated within the rows

Not worth it: fewer than 256 columns; more than 16,384 rows with a product of 16-bit operands; rows of `x` whose columns
are not neighbours in memory; float32 rows where TF32 is allowed, with which stock multiplies faster.

Gains: one launch. Float32 weights meet bfloat16 rows on tensor cores without an upcast copy, and as exactly.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from fusion_passes import advice, rewrite
from fusion_passes.access import factor_axes
from fusion_passes.fusion import Because, Context, Fusion, NearMiss, Reason, Refusal, Site, dtype_name
from fusion_passes.layout import SubAxis, arrange, refine, sub_axes
from fusion_passes.ops import head_gate as op
from fusion_passes.patterns import _head_gate_scaling as scaling_of
from fusion_passes.patterns._head_gate_product import Product, may_be_gate, product_of, viewed_again
from fusion_passes.patterns._head_gate_scaling import Scaling
from fusion_passes.sizes import Sizes

aten = torch.ops.aten

# Below, the product is too small to be told from the launches around it.
FEWEST_COLUMNS = 256
# Above, 16-bit products run at the rate of memory in either form.
PAYS_UP_TO = 16384


def match(anchor: Node, context: Context) -> Site | None:
    """Prove that the product at `anchor` is scaled as a head gate is."""
    product = product_of(anchor)
    if product is None:
        return None
    scaling, scale = _scaled(product, context)
    if scaling is None:
        return None
    leaves = {"x": product.rows.leaf, "weight": product.weights.leaf}
    leaves |= {"q_scale": scaling.q} if scaling.q is not None else {}
    steps = {*product.rows.steps, *product.weights.steps}
    sizes = context.sizes[0]
    return Site(
        anchor=anchor,
        replaced=scaling.root,
        leaves=leaves,
        interior=(steps | scaling.interior | {anchor}) - set(leaves.values()),
        params={"product": product, "scaling": scaling, "scale": scale, "sizes": sizes},
        roundings=list(scaling.roundings),
        summary=_summary(product, scaling, scale),
        saved_bytes=_saved_bytes(product, sizes),
        saved_launches=1 + product.rows.upcast + product.weights.upcast,
        shared=frozenset(steps),
    )


def _scaled(product: Product, context: Context) -> tuple[Scaling | None, float]:
    """What scales the product, and the constant in all; None where it is an ordinary linear layer.

    Raises:
        NearMiss: it resembles a head gate, being upcast or multiplied, but no constant scales it.
    """
    anchor, before = product.node, product.rows.factor * product.weights.factor
    resembles = product.rows.upcast or product.weights.upcast or _is_multiplied(anchor)
    try:
        scaling = scaling_of.find(anchor, context)
    except NearMiss:
        if before == 1.0:
            if resembles:
                raise
            return None, 1.0
        scaling = Scaling(anchor, (), frozenset(), None, 1.0, ())
    scale = scaling.scale * before
    if not math.isclose(scale, 1.0, rel_tol=1e-9):
        return scaling, scale
    if resembles:
        raise NearMiss(f"its product ({anchor.name}) is not scaled by a constant")
    return None, 1.0


def _is_multiplied(anchor: Node) -> bool:
    """Does a product or quotient directly follow, views and casts aside?"""
    node = anchor
    for _ in range(scaling_of.LONGEST):
        users = [user for user in node.users if user.op != "output"]
        if len(users) != 1:
            return False
        (node,) = users
        if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            return True
        if not scaling_of.carries_product(node):
            return False
    return False


def _saved_bytes(product: Product, sizes: Sizes) -> int:
    """The product written and read again, and every upcast operand."""
    saved = 2 * sizes.numel(product.node) * product.node.meta["val"].dtype.itemsize
    for side in (product.rows, product.weights):
        if side.upcast:
            saved += 2 * sizes.numel(side.operand) * side.operand.meta["val"].dtype.itemsize
    return int(saved)


def _summary(product: Product, scaling: Scaling, scale: float) -> str:
    x, weight = (dtype_name(side.leaf.meta["val"].dtype) for side in (product.rows, product.weights))
    factors = f"{scale:.6g}" + (" and a scale per row and head" if scaling.q is not None else "")
    size = f"{product.columns} columns to {product.heads} heads"
    return f"{size}, {x} rows and {weight} weights, times {factors}, {dtype_name(scaling.root.meta['val'].dtype)}"


def profit(site: Site, context: Context) -> Reason:
    """Skinny products of many columns; with 16-bit operands up to the largest number of rows that was measured."""
    product: Product = site.params["product"]
    sizes: Sizes = site.params["sizes"]
    if product.columns < FEWEST_COLUMNS:
        return f"its product has {product.columns} columns; from {FEWEST_COLUMNS} on the fused op pays"
    operand = product.rows.operand
    strides, shape = sizes.strides(operand), sizes.shape(operand)
    along = len(shape) - (2 if product.transposed else 1)
    if strides[along] != 1:
        apart = f"neighbouring columns of x ({operand.name}) lie {strides[along]} elements apart"
        return Because(f"{apart}; the kernel reads rows", advice.adjacent("x"))
    x, weight = (side.leaf.meta["val"].dtype for side in (product.rows, product.weights))
    form = op.form_of(x, weight, _product_dtype(product))
    value = product.node.meta["val"]
    rows = value.numel() // product.heads
    if form in ("rounded", "exact") and isinstance(rows, int) and rows > PAYS_UP_TO:
        return f"at {rows} rows stock Inductor is as fast; the fused op pays up to {PAYS_UP_TO}"
    if form == "float32" and torch.get_float32_matmul_precision() != "highest":
        return "x is float32 and TF32 is allowed, with which stock multiplies faster than the fused op without"
    return None


def _product_dtype(product: Product) -> torch.dtype:
    dtype = product.node.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


# --- rewrite ---------------------------------------------------------------------------------------------------------


def replace(site: Site, graph: Graph) -> Node:
    """`torch.ops.fusion_passes.head_gate` on views of the leaves, viewed as the graph had its result."""
    product: Product = site.params["product"]
    scaling: Scaling = site.params["scaling"]
    x, weight = product.operands_for_op(graph)
    q_scale = _scale_per_row(graph, product, scaling, x, site.params["sizes"])
    dtype = scaling.root.meta["val"].dtype
    form = (_product_dtype(product), dtype, product.transposed)
    out = rewrite.call(graph, op.OP, x, weight, q_scale, site.params["scale"], *form)
    return viewed_again(graph, product.as_in_graph(graph, out), scaling.chain)


def _scale_per_row(graph: Graph, product: Product, scaling: Scaling, x: Node, sizes: Sizes) -> Node | None:
    """The scales as [B, T, H], with strides of zero where they are shared."""
    if scaling.q is None:
        return None
    root, stop = scaling.root, (product.node, scaling.q)
    maps = [factor_axes(root, leaf, sizes, stop=stop) for leaf in stop]
    pieces = refine(maps, root, sizes)
    wanted, parts = sub_axes(maps[0], pieces), sub_axes(maps[1], pieces)
    axes = [[part for part in wanted if part.leaf_axis == axis] for axis in range(len(maps[0].axes))]
    if product.transposed:
        axes[-2], axes[-1] = axes[-1], axes[-2]
    groups: list[list[SubAxis]] = [[] for _ in range(3 - len(axes))]
    for axis in axes:
        found = [part for want in axis for part in parts if part.pieces == want.pieces]
        if found and len(found) < len(axis):
            raise Refusal(f"{scaling.q.name} is repeated within the rows")
        groups.append(found)
    if sum(map(len, groups)) < len(parts):
        raise Refusal(f"the axes of {scaling.q.name} are divided otherwise than those of the product")
    view = arrange(graph, scaling.q, parts, groups)
    lengths = [rewrite.size(graph, x, 0), rewrite.size(graph, x, 1), product.heads]
    return rewrite.call(graph, aten.expand.default, view, lengths)


FUSION = Fusion(
    name="head_gate",
    doc="scaled projection to the head weights of a sparse-attention indexer, in one launch",
    anchors=(aten.mm.default, aten.bmm.default),
    match=match,
    replace=replace,
    profit=profit,
    wants=may_be_gate,
    # One rounding to bfloat16: a sum in another order may end on its other side.
    tolerance=4e-3,
)
