"""Pairs of numbers, each rotated by an angle of its own and written back where it was: rotary embedding in place.

The pair (a, b) becomes (a cos - b sin, b cos + a sin): RoFormer (arXiv:2104.09864), equation 34. How the pairs lie is
up to the strides of `pairs`: halves of the rotated channels next to each other (GPT-NeoX, Llama), or neighbouring
channels (GPT-J, DeepSeek).

The op has no result. It takes the place of a rotation whose result is copied back over its input, where Inductor needs
a second kernel and a buffer in between: a pair has to be read as a whole before any of it is overwritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_passes.eager import launcher
from fusion_passes.fusion import dtype_name
from fusion_passes.lowering import (
    LIBRARY,
    Launch,
    NotInlinable,
    Operand,
    Size,
    Target,
    cdiv,
    inline,
    static,
)
from fusion_passes.ops._checks import FLOATS, typed

# Pairs of one program, and rows below which a program takes fewer, so that there are programs for all of the GPU.
PAIRS = 2048
FEW_ROWS = 16384


def reference(pairs: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """The rotated pairs as a new tensor, computed in float32 at least. Arguments as for `rotate_pairs_`."""
    wide = torch.promote_types(pairs.dtype, torch.float32)
    first, second = pairs.to(wide).unbind(-2)
    (c1, c2), (s1, s2) = ([*t.to(wide).expand(pairs.shape).unbind(-2)] for t in (cos, -sin if inverse else sin))
    return torch.stack([first * c1 - second * s1, second * c2 + first * s2], -2).to(pairs.dtype)


def check_arguments(pairs: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """Raise a TypeError or ValueError that names the argument, what it was and what it must be."""
    if pairs.dim() != 5 or pairs.shape[3] != 2:
        raise ValueError(f"pairs must be [A, B, C, 2, N], got shape {list(pairs.shape)}")
    for name, value in (("pairs", pairs), ("cos", cos), ("sin", sin)):
        if value.dtype not in FLOATS:
            allowed = ", ".join(map(dtype_name, FLOATS))
            raise TypeError(f"{name} must be one of {allowed}, got {dtype_name(value.dtype)}")
        if value.device != pairs.device:
            raise ValueError(f"{name} must be on {pairs.device} as pairs is, got {value.device}")
    for name, value in (("cos", cos), ("sin", sin)):
        fits = value.dim() == 5 and value.shape[4] == pairs.shape[4]
        if not fits or any(n != m and n != 1 for n, m in zip(value.shape, pairs.shape)):
            wanted = f"pairs' shape {list(pairs.shape)} or 1 along all axes but the last"
            raise ValueError(f"{name} must have {wanted}, got {list(value.shape)}")
    if any(n > 1 and stride == 0 for n, stride in zip(pairs.shape, pairs.stride())):
        raise ValueError(f"pairs must show no element twice, got strides {list(pairs.stride())}")


def plan(target: Target, pairs: Operand, cos: Operand, sin: Operand, inverse: bool = False) -> Launch:
    """The one launch that rotates all pairs; it writes into the memory of `pairs`."""
    from fusion_passes.ops._rotate_pairs_kernel import rotate_pairs_kernel

    a, b, c, _, _ = pairs.shape
    width = _compiled_in(pairs.shape[4])
    lanes = 1 << (width - 1).bit_length()
    rows = a * b * c
    block = max(1, PAIRS // lanes // (1 if target.hint(rows) > FEW_ROWS else 8))
    args: dict[str, Any] = {"x_ptr": pairs, "cos_ptr": cos, "sin_ptr": sin}
    args |= {"x_offset": pairs.offset, "cos_offset": cos.offset, "sin_offset": sin.offset}
    args |= {"rows": rows, "size_b": b, "size_c": c, "N": width, "INVERSE": inverse, "ROWS": block, "LANES": lanes}
    args["PDL"] = target.arch.pdl
    for name, operand in (("x", pairs), ("cos", cos), ("sin", sin)):
        *outer, pair, lane = operand.used_strides
        args |= dict(zip((f"{name}_a", f"{name}_b", f"{name}_c"), outer))
        args |= {f"{name.upper()}_PAIR": _compiled_in(pair), f"{name.upper()}_LANE": _compiled_in(lane)}
    return Launch(rotate_pairs_kernel, (cdiv(rows, block),), args, num_warps=4 if block * lanes >= 1024 else 1)


def _compiled_in(number: Size) -> int:
    known = static(number)
    if known is None:
        raise NotInlinable("the places of the two numbers of a pair depend on a symbolic size")
    return known


def _cpu(pairs: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    check_arguments(pairs, cos, sin, inverse)
    torch.ops.aten.copy_.default(pairs, reference(pairs, cos, sin, inverse))


LIBRARY.define(
    "rotate_pairs_(Tensor(a!) pairs, Tensor cos, Tensor sin, bool inverse=False) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("rotate_pairs_", _cpu, "CPU")
LIBRARY.impl("rotate_pairs_", launcher(check_arguments, plan), "CUDA")
torch.library.register_fake("fusion_passes::rotate_pairs_", check_arguments, lib=LIBRARY)
OP = torch.ops.fusion_passes.rotate_pairs_.default
inline(OP, plan)


@typed
def rotate_pairs_(pairs: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> None:
    """Rotate pairs in place: (a, b) becomes (a cos - b sin, b cos + a sin).

    Args:
        pairs: [A, B, C, 2, N], a view of the memory to change; bfloat16, float16 or float32. Neighbouring channels of
            x are pairs in `x.unflatten(-1, (-1, 2)).mT`, its halves in `x.unflatten(-1, (2, -1))`.
        cos, sin: [A, B, C, 2, N], or 1 along any axis but the last; same dtypes. With 2 along the axis of pairs the
            second of each pair has factors of its own.
        inverse: rotate back, with -sin.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it must be.
        NotImplementedError: a gradient would be needed.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (pairs, cos, sin)):
        raise NotImplementedError("rotate_pairs_ has no gradient: call it under torch.no_grad()")
    torch.ops.fusion_passes.rotate_pairs_(pairs, cos, sin, inverse)
