"""GEGLU, gelu(gate) * up (arXiv:2002.05202, with the tanh approximation of GELU as in Gemma).

The fusion is described by a search function: `search` says what to look for, and `traced.fusion` finds and proves it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import traced
from fusion_passes.fusion import Context, Reason, Site
from fusion_passes.lowering import Launch, Operand, Output, Target, cdiv, contiguous_strides, define

BLOCK = 1024


def search(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What the op computes: gate and up have one shape."""
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def _fake(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have one shape and dtype, got {list(gate.shape)} {gate.dtype} and "
            f"{list(up.shape)} {up.dtype}"
        )
    if not (gate.is_contiguous() and up.is_contiguous()):
        raise ValueError(f"gate and up must be contiguous, got strides {list(gate.stride())} and {list(up.stride())}")
    return torch.empty_like(gate)


def _cpu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    _fake(gate, up)
    wide = gate.dtype if gate.dtype == torch.float64 else torch.float32
    return search(gate.to(wide), up.to(wide)).to(gate.dtype)


@triton.jit
def geglu_kernel(gate_ptr, up_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """Grid: (blocks,); all tensors are contiguous and have `numel` elements."""
    o_element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_gate = tl.load(gate_ptr + o_element, mask=o_element < numel, other=0.0).to(tl.float32)
    b_up = tl.load(up_ptr + o_element, mask=o_element < numel, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 = sigmoid(2 u), here with 2 u = sqrt(8 / pi) * (gate + 0.044715 gate^3)
    b_gelu = b_gate * tl.sigmoid(1.5957691216057308 * b_gate * (1.0 + 0.044715 * b_gate * b_gate))
    tl.store(out_ptr + o_element, b_gelu * b_up, mask=o_element < numel)


def plan(target: Target, gate: Operand, up: Operand) -> Launch:
    """The one launch that computes the op."""
    numel = 1
    for length in gate.shape:
        numel = numel * length
    out = Output(gate.shape, contiguous_strides(gate.shape), gate.dtype)
    args = {"gate_ptr": gate.whole(), "up_ptr": up.whole(), "out_ptr": out, "numel": numel, "BLOCK": BLOCK}
    return Launch(geglu_kernel, (cdiv(numel, BLOCK),), args, num_warps=4)


OP = define(
    "geglu",
    "(Tensor gate, Tensor up) -> Tensor",
    reference=_cpu,
    fake=_fake,
    plan=plan,
    backward="geglu has no gradient: it is for inference. Call it under torch.no_grad().",
)


def _equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Are two sizes equal whatever the symbols are? Adds no guard."""
    return statically_known_true(a == b)


def guard(site: Site, context: Context) -> Reason:
    """The kernel reads two contiguous tensors of one dtype."""
    gate, up = (site.leaves[name].meta["val"] for name in ("gate", "up"))
    if gate.dtype != up.dtype:
        return f"gate is {gate.dtype} and up is {up.dtype}; the kernel reads one dtype"
    if len(gate.shape) != len(up.shape) or not all(map(_equal, gate.shape, up.shape)):
        return f"gate has shape {list(gate.shape)} and up {list(up.shape)}; the kernel does not broadcast"
    for name, value in (("gate", gate), ("up", up)):
        if not all(map(_equal, value.stride(), contiguous_strides(value.shape))):
            return f"{name} has strides {list(value.stride())}; the kernel reads contiguous memory"
    return None


FUSION = traced.fusion(
    "geglu",
    "gelu(gate) * up, the feed-forward layers of Gemma",
    search,
    OP,
    (torch.empty(2, 8), torch.empty(2, 8)),
    guard=guard,
    tolerance=1e-2,
)
