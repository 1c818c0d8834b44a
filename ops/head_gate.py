"""The weights of a sparse-attention indexer's heads: a skinny projection and its scaling.

    out[b, t, h] = round(sum over k of x[b, t, k] * weight[h, k]) * scale * q_scale[b, t, h]

as in DeepSeek-V3.2 (arXiv:2512.02556, section 2.1), where scale is H^-1/2, or H^-1/2 D^-1/2 for heads of D columns, and
q_scale, which may be missing, undoes the quantisation of the queries. `round` goes to `product_dtype`: to bfloat16
where the projection is a bfloat16 matrix product, whose result is rounded before it is scaled; to float32, that is
not at all, where its operands are upcast.

Numerics. Products are exact and sums float32, whatever the operands: two 16-bit operands multiply exactly on tensor
cores, float32 weights go there as three bfloat16 parts, which hold all their bits, and two float32 operands as tf32
parts (an error of 2^-22 per product). Relative L2 error against float64, 7,168 columns: below 5e-7 unless rounded.
Infinities and NaN come out as from a float32 matrix product.

One pass over memory, one launch: x and the weights once, at any number of rows. Where the rows are few, programs share
the depth; the order of their sums is fixed, so that results are the same from run to run.

Dims: B batch, T tokens, H heads, K columns (the width of the model).

Launch parameters:
    rows: rows of a tile.
    heads: heads of a tile.
    depth: columns of x that a step multiplies.
    splits: programs that share a tile at most, each with a part of the columns.
    warps: warps of a program.
    stages: stages of the software pipeline that loads steps ahead.
    tensor: 1 for tensor cores, 0 for a dot product per row and head.

Shape classes, by rows:
    half: x and weights have the same 16-bit dtype.
    split: one is bfloat16, the other float32.
    float32: any other pair of dtypes.
    half_symbolic, split_symbolic, float32_symbolic: likewise, with rows that are known at run time only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min

from fusion_passes.arch import Architecture
from fusion_passes.fusion import dtype_name
from fusion_passes.lowering import (
    Launch,
    NotInlinable,
    Operand,
    Output,
    Program,
    Size,
    Target,
    cdiv,
    constant_or_argument,
    contiguous_strides,
    define,
    static,
)
from fusion_passes.ops._checks import typed
from fusion_passes.ops._head_gate_checks import check_arguments
from fusion_passes.tuning import Complaint, Parameters, TunedTable

Tensor = torch.Tensor

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? q_scale, float scale, ScalarType product_dtype, ScalarType dtype, "
    "bool head_first) -> Tensor"
)

TABLE = TunedTable(
    "head_gate",
    Path(__file__).parent / "tuned" / "head_gate.json",
    ("rows", "heads", "depth", "splits", "warps", "stages", "tensor"),
    ("tensor",),
    ("splits", "stages"),
)

SMALLEST_TILE = 16  # of tensor cores, along every axis
MOST_DOTTED = 16  # rows up to which the table may choose dot products


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor, weight: Tensor, q_scale: Tensor | None, scale: float, product_dtype: torch.dtype, dtype: torch.dtype,
    head_first: bool,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch; arguments as in `SCHEMA`. On float64 tensors in float64, without roundings."""
    wide = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    product = torch.matmul(x.to(wide), weight.to(wide).mT)
    if wide == torch.float32:
        product = product.to(product_dtype).to(wide)
    out = product * scale
    if q_scale is not None:
        out = out * q_scale.to(wide)
    out = out.mT.contiguous() if head_first else out
    return out if wide == torch.float64 else out.to(dtype)


# --- launch ----------------------------------------------------------------------------------------------------------


def form_of(x: torch.dtype, weight: torch.dtype, product: torch.dtype) -> str:
    """How the kernel multiplies operands of these dtypes; see `_head_gate_kernel._add_product`."""
    if x == weight and x.itemsize == 2:
        return "exact" if product == torch.float32 else "rounded"
    if (x, weight) == (torch.bfloat16, torch.float32):
        return "split_weight"
    return "split_x" if (x, weight) == (torch.float32, torch.bfloat16) else "float32"


def _complaint(parameters: Parameters, arch: Architecture, bytes_of: tuple[int, int]) -> Complaint:
    rows, heads, depth, warps = (parameters[name] for name in ("rows", "heads", "depth", "warps"))
    threads = warps * arch.warp_size
    if threads > arch.max_threads:
        return f"{warps} warps are {threads} threads, and a block of {arch.name} has {arch.max_threads}"
    if not parameters["tensor"]:
        rows, heads = 1, depth
    elif min(rows, heads, depth) < SMALLEST_TILE:
        return f"tensor cores take tiles of {SMALLEST_TILE} and more, got rows={rows}, heads={heads}, depth={depth}"
    if rows * heads // threads > 128:
        return f"a thread would hold {rows * heads // threads} sums, and 128 fit in its registers"
    if not parameters["tensor"]:
        return None
    x_bytes, w_bytes = bytes_of
    shared = max(1, parameters["stages"] - 1) * depth * (rows * x_bytes + heads * w_bytes)
    if shared > arch.shared_memory:
        return f"the tiles under way take {shared} bytes, and a block of {arch.name} has {arch.shared_memory} to share"
    return None


def _fit(parameters: Parameters, heads: int, depth: int, arch: Architecture, bytes_of: tuple[int, int]) -> Parameters:
    """A table entry for this shape: no more heads or columns than there are, no more than fits into shared memory."""
    least = SMALLEST_TILE if parameters["tensor"] else 1
    use = {**parameters, "heads": max(least, min(parameters["heads"], 1 << (heads - 1).bit_length()))}
    use["depth"] = max(least, min(parameters["depth"], 1 << max(depth - 1, 0).bit_length()))
    while use["tensor"] and use["stages"] > 1 and _complaint(use, arch, bytes_of):
        use["stages"] -= 1
    while use["depth"] > least and _complaint(use, arch, bytes_of):
        use["depth"] //= 2
    return use


def parameters_for(
    arch: Architecture, form: str, rows: int | None, heads: int, depth: int, bytes_of: tuple[int, int]
) -> Parameters:
    """The launch parameters (see the kernels) for a shape; `rows` is None where they are known only at run time.

    Raises:
        ValueError: parameters that the user forces cannot run; the message says why.
    """
    kind = {"rounded": "half", "exact": "half", "float32": "float32"}.get(form, "split")
    return TABLE.choose(
        arch, kind if rows is not None else f"{kind}_symbolic", rows or 0,
        fit=lambda p: _fit(p, heads, depth, arch, bytes_of),
        complaint=lambda p: _complaint(p, arch, bytes_of),
    )  # fmt: skip


def _splits(tiles: Size, most: int, steps: int, arch: Architecture) -> Size:
    """How many programs share a tile: as many as give every multiprocessor one program, none of them idle."""
    known = static(tiles)
    if known is None:
        return Max(1, Min(min(most, steps), FloorDiv(sympy.Integer(arch.multiprocessors), Max(1, tiles))))
    splits = max(1, min(most, steps, arch.multiprocessors // known))
    return cdiv(steps, cdiv(steps, splits))


def _strides(target: Target, x: Operand, q_scale: Operand | None) -> dict[str, Any]:
    batch, token, column = x.used_strides
    q_batch, q_token, q_head = q_scale.used_strides if q_scale is not None else (0, 0, 0)
    return {
        "x_stride_b": batch,
        **constant_or_argument(target, "X_T", "x_stride_t", token, always=True),
        "X_K": column,
        "q_stride_b": q_batch,
        "q_stride_t": q_token,
        "q_stride_h": q_head,
    }


def plan(
    target: Target, x: Operand, weight: Operand, q_scale: Operand | None, scale: float, product_dtype: torch.dtype,
    dtype: torch.dtype, head_first: bool,
) -> Launch | Program:  # fmt: skip
    """The one launch that computes the op, with scratch memory where programs share the depth."""
    from fusion_passes.ops._head_gate_kernel import head_gate_kernel, head_gate_row_kernel

    batch, tokens = x.shape[:2]
    heads, depth = (static(n) for n in weight.shape)
    strides = [static(n) for n in (x.used_strides[2], *weight.used_strides)]
    if heads is None or depth is None or None in strides:
        raise NotInlinable(f"heads and columns must be known at compile time, weight is {weight.shape}")
    rows = batch * tokens
    known = target.hint(rows) if static(rows) is not None else None
    if known is not None and strides[2] != 1:
        known = max(known, MOST_DOTTED + 1)  # dot products would read far more of such weights than they need
    bytes_of = (x.dtype.itemsize, weight.dtype.itemsize)
    form = form_of(x.dtype, weight.dtype, product_dtype)
    use = parameters_for(target.arch, form, known, heads, depth, bytes_of)
    shape = (batch, heads, tokens) if head_first else (batch, tokens, heads)
    out = Output(shape, contiguous_strides(shape), dtype)
    args: dict[str, Any] = {
        "x_ptr": x, "w_ptr": weight.whole(), "q_ptr": q_scale and q_scale.whole(), "out_ptr": out,
        "x_offset": x.offset, "rows": rows, "tokens": tokens, **_strides(target, x, q_scale),
        "W_H": strides[1], "W_K": strides[2], "H": heads, "K": depth, "SCALE": scale,
        "ROUND_TO": dtype_name(product_dtype), "BATCHED": static(batch) != 1,
        "HEAD_FIRST": head_first, "DEPTH": use["depth"], "PDL": target.arch.pdl,
    }  # fmt: skip
    if not use["tensor"]:
        return Launch(head_gate_row_kernel, (rows * heads,), args, use["warps"])
    tiles = cdiv(rows, use["rows"]) * cdiv(heads, use["heads"])
    splits = _splits(tiles, use["splits"], -(-depth // use["depth"]), target.arch)
    most = static(splits) or use["splits"]
    precision = "tf32x3" if target.arch.name.startswith("sm_") else "ieee"
    args |= {"part_ptr": None, "flag_ptr": None, "FORM": form, "PRECISION": precision}
    args |= {"MOST_SPLITS": most, "SLOTS": 1 << (most - 1).bit_length(), "ROWS": use["rows"], "HEADS": use["heads"]}
    if most > 1:
        # A symbolic product of tiles and splits is at most the larger of the two numbers that bound it.
        slots = tiles * splits if static(splits) is not None else Max(tiles, target.arch.multiprocessors)
        args["part_ptr"] = Output((slots, use["heads"] * use["rows"]), (use["heads"] * use["rows"], 1), torch.float32)
        args["flag_ptr"] = Output((slots,), (1,), torch.int64)
    launch = Launch(head_gate_kernel, (tiles, splits), args, use["warps"], use["stages"])
    return Program((launch,), (out,))


# --- op --------------------------------------------------------------------------------------------------------------


def _fake(
    x: Tensor, weight: Tensor, q_scale: Tensor | None, scale: float, product_dtype: torch.dtype, dtype: torch.dtype,
    head_first: bool,
) -> Tensor:  # fmt: skip
    check_arguments(x, weight, q_scale, scale, product_dtype, dtype)
    (batch, tokens), heads = x.shape[:2], weight.shape[0]
    return x.new_empty((batch, heads, tokens) if head_first else (batch, tokens, heads), dtype=dtype)


def _cpu(*args: Any) -> Tensor:
    _fake(*args)
    return reference(*args)


OP = define(
    "head_gate",
    SCHEMA,
    reference=_cpu,
    fake=_fake,
    plan=plan,
    backward="head_gate has no gradient: it is for inference. Call it under torch.no_grad(), or write the projection "
    "as torch.nn.functional.linear where x, weight or q_scale requires one.",
)


@typed
def head_gate(
    x: Tensor,
    weight: Tensor,
    q_scale: Tensor | None = None,
    *,
    scale: float = 1.0,
    product_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The formula at the top of this module.

    Args:
        x: [T, K] or [B, T, K]; bfloat16, float16 or float32; any strides.
        weight: [H, K]; the same dtypes, which need not be that of x; any strides.
        q_scale: a factor per row and head, broadcast to [.., T, H], or [.., T, H, 1]; None for none.
        scale: factor of all elements.
        product_dtype: the sums over K are rounded to it before they are scaled; float32 for no rounding.
        dtype: of the result.

    Returns:
        [T, H] or [B, T, H], contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message says what it is
            and what it must be.
        NotImplementedError: a backward pass reaches the op.
    """
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [T, K] or [B, T, K], got shape {list(x.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [H, K], got shape {list(weight.shape)}")
    full = x if x.dim() == 3 else x.unsqueeze(0)
    shape = (*full.shape[:2], weight.shape[0])
    if q_scale is not None:
        given = q_scale.squeeze(-1) if q_scale.dim() == x.dim() + 1 and q_scale.shape[-1] == 1 else q_scale
        try:
            q_scale = given.expand(shape)
        except RuntimeError:
            wanted = f"broadcast to {list(shape[3 - x.dim() :])}"
            raise ValueError(f"q_scale must {wanted}, got shape {list(q_scale.shape)}") from None
    out = OP(full, weight, q_scale, scale, product_dtype, dtype, False)
    return out if x.dim() == 3 else out.squeeze(0)


# --- benchmark cases -------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    """What the op is benchmarked on, a list of `fusion_passes.benchmarking.Case`."""
    from fusion_passes.ops import _head_gate_cases

    return _head_gate_cases.cases()
