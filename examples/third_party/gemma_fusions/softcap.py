"""Soft-capping, cap * tanh(x / cap), which keeps the logits of Gemma 2 (arXiv:2408.00118, section 2) within +-cap.

The fusion is described by its meaning: `match` finds the one tensor that is read, solves for the cap, and compares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import cone, probe, rewrite
from fusion_passes.access import factor_axes
from fusion_passes.evaluate import hashed
from fusion_passes.fusion import Context, Fusion, NearMiss, Reason, Site
from fusion_passes.lowering import Launch, Operand, Output, Target, cdiv, contiguous_strides, define

aten = torch.ops.aten

BLOCK = 1024
SPECIAL = (0.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan"))


def reference(x: torch.Tensor, cap: float) -> torch.Tensor:
    """The op in plain PyTorch, computed in float32 at least; x of any shape, cap > 0."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (cap * torch.tanh(wide / cap)).to(x.dtype)


def _fake(x: torch.Tensor, cap: float) -> torch.Tensor:
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got shape {list(x.shape)} with strides {list(x.stride())}")
    if not 0 < cap < float("inf"):
        raise ValueError(f"cap must be positive and finite, got {cap}")
    return torch.empty_like(x)


def _cpu(x: torch.Tensor, cap: float) -> torch.Tensor:
    _fake(x, cap)
    return reference(x, cap)


@triton.jit
def softcap_kernel(x_ptr, out_ptr, numel, cap, BLOCK: tl.constexpr):
    """Grid: (blocks,); x and out are contiguous and have `numel` elements."""
    o_element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o_element, mask=o_element < numel, other=0.0).to(tl.float32) / cap
    b_abs = tl.abs(b_x)
    b_exp = tl.exp(-2.0 * b_abs)
    b_square = b_x * b_x
    # Next to zero 1 - exp(-2 x) would cancel: the series of tanh takes over.
    b_series = b_abs * (1.0 + b_square * (-1.0 / 3 + b_square * (2.0 / 15 - b_square * (17.0 / 315))))
    b_tanh = tl.where(b_abs < 0.1, b_series, (1.0 - b_exp) / (1.0 + b_exp))
    tl.store(out_ptr + o_element, cap * tl.where(b_x < 0, -b_tanh, b_tanh), mask=o_element < numel)


def plan(target: Target, x: Operand, cap: float) -> Launch:
    """The one launch that computes the op."""
    numel = 1
    for length in x.shape:
        numel = numel * length
    out = Output(x.shape, contiguous_strides(x.shape), x.dtype)
    args = {"x_ptr": x.whole(), "out_ptr": out, "numel": numel, "cap": cap, "BLOCK": BLOCK}
    return Launch(softcap_kernel, (cdiv(numel, BLOCK),), args, num_warps=4)


OP = define(
    "softcap",
    "(Tensor x, float cap) -> Tensor",
    reference=_cpu,
    fake=_fake,
    plan=plan,
    backward="softcap has no gradient: it is for inference. Call it under torch.no_grad().",
)


def match(anchor: Node, context: Context) -> Site:
    """Prove that the product which uses the tanh at `anchor` is a soft cap."""
    product = next((user for user in anchor.users if user.target is aten.mul.Tensor), None)
    if product is None:
        raise NearMiss("the tanh is not multiplied by anything")
    whole = cone.backward(product)
    if len(whole.leaves) != 1:
        raise NearMiss(f"the product is computed from {len(whole.leaves)} tensors; a soft cap has one")
    x = cone.last_alias(whole.leaves[0], whole.interior)
    part = cone.backward(product, stop={x})
    cap: float | None = None
    roundings: list[Node] = []
    for sizes in context.sizes:
        axes = factor_axes(product, x, sizes)
        steps = [[(axes.atoms[index].root_axis, step) for index, step in axis.terms] for axis in axes.axes]
        in_place = all(terms in ([], [(i, 1)]) for i, terms in enumerate(steps))
        if sizes.shape(product) != sizes.shape(x) or not in_place or any(axis.offset for axis in axes.axes):
            raise NearMiss("the product does not read its input element by element")
        if cap is None:  # far out the result is the cap itself
            far = probe.sample(product, {x: hashed(1, 1e8, 1e9)}, sizes, count=64, seed=1)
            cap = probe.solve_scale(far.values, torch.ones_like(far.values))
            if cap is None or cap <= 0 or not probe.agree(far.values, torch.full_like(far.values, cap)):
                raise NearMiss("it does not tend to a positive cap")
        for seed in (2, 3):
            run = probe.sample(product, {x: hashed(seed, -4 * cap, 4 * cap, SPECIAL)}, sizes, count=256, seed=seed)
            value = run.leaves[x]
            if not bool(run.valid[x].all()) or not probe.agree(run.values, cap * torch.tanh(value / cap), cap):
                raise NearMiss(f"it tends to {cap:g} but is not {cap:g} * tanh(x / {cap:g})")
            roundings = run.roundings
    summary = f"cap {cap:g} on {list(product.meta['val'].shape)}"
    return Site(anchor, product, {"x": x}, part.interior, {"cap": cap}, roundings, summary)


def guard(site: Site, context: Context) -> Reason:
    """The kernel reads a contiguous tensor."""
    value = site.leaves["x"].meta["val"]
    wanted = contiguous_strides(value.shape)
    if not all(statically_known_true(a == b) for a, b in zip(value.stride(), wanted)):
        return f"its input has strides {list(value.stride())}; the kernel reads contiguous memory"
    return None


def replace(site: Site, graph: Graph) -> Node:
    return rewrite.call(graph, OP, site.leaves["x"], site.params["cap"])


FUSION = Fusion(
    name="softcap",
    doc="cap * tanh(x / cap), the logits of Gemma 2",
    anchors=(aten.tanh.default,),
    match=match,
    guard=guard,
    replace=replace,
    tolerance=1e-2,
)
