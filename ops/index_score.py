"""Scores of a sparse-attention indexer: how much a key matters to a query, over all heads at once.

    I[b, s, t] = scale * sum over h of w[b, s, h] * relu(q[b, s, h, :] . k[b, t, :])

the lightning indexer of DeepSeek-V3.2 (arXiv:2512.02556, equation 1), with a mask on top. k is shared by all heads; w
may have either sign. The products per head, [S, H, T], never leave the chip.

Numerics. Sums are float32. Products of bfloat16, float16 or float8_e4m3fn operands are exact on tensor cores, but those
of sm_90 align the products of float8 to fewer bits than float32 has when they add them up. float32 operands take three
TF32 products unless `precision` allows less. A q_scale or k_scale multiplies the products before the relu, as it would
in dequantised operands; with `scale_after` k_scale multiplies the scores, which costs less and is the same where it is
not negative. NaN passes the relu if `keep_nan`, else it counts as 0, as in `where(x > 0, x, 0)`.

Masks. "keep" and "drop" put `fill` in the place of hidden scores. "add" adds the mask to the scores; where it is
-3e38 or less the key counts as hidden, and a block of hidden keys holds the mask alone: the same as the sum unless the
score is NaN, +inf or beyond 1e31. "causal" hides t > s + causal_offset without a mask in memory. Blocks
that are hidden entirely cost no product.

Dims: B batch, S queries, T keys, H heads, D channels.

Launch parameters:
    keys: keys of a program, which it keeps on the chip.
    queries: queries that a program walks over.
    columns: queries times heads of one matrix product.
    warps: warps of a program.
    stages: stages of the software pipeline that loads queries ahead.

Shape classes, by queries of all sequences:
    half: bfloat16 and float16.
    float8: float8_e4m3fn.
    single: float32.
    half_decode, float8_decode, single_decode: likewise, up to 16 queries per sequence.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fusion_passes.arch import Architecture
from fusion_passes.lowering import (
    Launch,
    NotInlinable,
    Operand,
    Output,
    Size,
    Target,
    cdiv,
    constant_or_argument,
    contiguous_strides,
    define,
    static,
)
from fusion_passes.ops._index_score_checks import MASKS, check_arguments
from fusion_passes.tuning import Complaint, Parameters, TunedTable

Tensor = torch.Tensor

SCHEMA = (
    "(Tensor q, Tensor k, Tensor w, Tensor? q_scale, Tensor? k_scale, Tensor? mask, str mask_kind, "
    "SymInt causal_offset, float scale, float fill, bool keep_nan, bool scale_after, str precision, "
    "ScalarType dtype, str layout) -> Tensor"
)

TABLE = TunedTable(
    "index_score",
    Path(__file__).parent / "tuned" / "index_score.json",
    ("keys", "queries", "columns", "warps", "stages"),
    counts=("stages",),
)
# Up to this many queries have launch parameters of their own: keys are read once, and nothing else takes time.
DECODE = 16
KINDS = {1: "float8", 2: "half", 4: "single"}
# float32 values of a product that a thread may hold.
MOST_HELD = 128


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    q: Tensor, k: Tensor, w: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, mask: Tensor | None,
    mask_kind: str, causal_offset: int, scale: float, fill: float, keep_nan: bool, scale_after: bool, precision: str,
    dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch; arguments as in `SCHEMA`, see `index_score`. float64 operands give a float64 result."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    products = torch.einsum("bshd,btd->bsht", q.to(wide), k.to(wide))
    if q_scale is not None:
        products = products * q_scale.to(wide).unsqueeze(-1)
    if k_scale is not None and not scale_after:
        products = products * k_scale.to(wide)[:, None, None]
    products = products.relu() if keep_nan else torch.where(products > 0, products, 0.0)
    scores = torch.einsum("bsht,bsh->bst", products, w.to(wide)) * scale
    if k_scale is not None and scale_after:
        scores = scores * k_scale.to(wide)[:, None]
    if mask_kind == "add":
        assert mask is not None
        scores = scores + mask.to(wide)
    elif mask_kind != "none":
        hidden = mask if mask is not None else _causal(scores, causal_offset)
        scores = scores.masked_fill(~hidden if mask_kind == "keep" else hidden, fill)
    scores = scores if wide == torch.float64 else scores.to(dtype)
    return scores.permute(["bst".index(axis) for axis in layout]).contiguous()


def _causal(scores: Tensor, offset: int) -> Tensor:
    """True where a key lies behind its query: [S, T]."""
    s, t = (torch.arange(n, device=scores.device) for n in scores.shape[1:])
    return t > s[:, None] + offset


# --- launch ----------------------------------------------------------------------------------------------------------


def _heads(heads: int) -> int:
    """Columns of a product that one query takes."""
    return max(8, 1 << (heads - 1).bit_length())


def _steps(use: Parameters, heads: int) -> int:
    """Queries whose heads make one product, of 16 columns at least."""
    return max(1, use["columns"] // _heads(heads), 16 // _heads(heads))


def _shared(use: Parameters, heads: int, width: int, itemsize: int, split: bool) -> int:
    """Bytes of shared memory: keys, the queries in flight, scores on their way out; operands that are split, twice."""
    columns, depth = _steps(use, heads) * _heads(heads), 1 << (width - 1).bit_length()
    copies = 2 if split else 1
    tiles = copies * use["keys"] + (use["stages"] + copies - 1) * columns
    return tiles * depth * itemsize + 4 * use["keys"] * _steps(use, heads)


def _complaint(use: Parameters, arch: Architecture, heads: int, width: int, itemsize: int) -> Complaint:
    if use["warps"] * arch.warp_size > arch.max_threads:
        threads = use["warps"] * arch.warp_size
        return f"{use['warps']} warps are {threads} threads, and a block of {arch.name} has {arch.max_threads}"
    if use["keys"] < 16:
        return f"a tile has 16 keys at least, got {use['keys']}"
    if use["queries"] < _steps(use, heads):
        return f"one product takes {_steps(use, heads)} queries of {heads} heads; queries={use['queries']} is less"
    held = use["keys"] * _steps(use, heads) * _heads(heads) // (use["warps"] * arch.warp_size)
    if held > MOST_HELD:
        return f"a thread would hold {held} values of a product, and {MOST_HELD} fit in its registers"
    split = itemsize == 4 and arch.name.startswith("sm_")
    if (needed := _shared(use, heads, width, itemsize, split)) > arch.shared_memory:
        return f"the tiles take {needed} bytes, and a block of {arch.name} has {arch.shared_memory} to share"
    return None


def parameters_for(
    arch: Architecture, batch: int, queries: int, keys: int, heads: int, width: int, itemsize: int
) -> Parameters:
    """The launch parameters (see the kernel) for a shape.

    Raises:
        ValueError: parameters that the user forces cannot run; the message says why.
    """

    def fit(entry: Parameters) -> Parameters:
        use = {**entry, "keys": max(16, min(entry["keys"], 1 << (keys - 1).bit_length()))}
        least = _steps(use, heads)
        use["queries"] = max(least, min(use["queries"], 1 << (queries - 1).bit_length()))
        while use["stages"] > 1 and _complaint({**use, "queries": 128}, arch, heads, width, itemsize):
            use["stages"] -= 1
        while use["keys"] > 16 and _complaint({**use, "queries": 128}, arch, heads, width, itemsize):
            use["keys"] //= 2
        # Too few programs leave multiprocessors idle: shorter chunks, although each of them reads its keys again.
        while use["queries"] > least and _programs(use, batch, queries, keys) < arch.multiprocessors:
            use["queries"] //= 2
        return use

    shape_class = KINDS[itemsize] + ("_decode" if queries <= DECODE else "")
    return TABLE.choose(
        arch, shape_class, batch * queries, fit, lambda use: _complaint(use, arch, heads, width, itemsize)
    )


def _programs(use: Parameters, batch: int, queries: int, keys: int) -> int:
    return batch * -(-queries // use["queries"]) * -(-keys // use["keys"])


def unsupported(arch: Architecture, dtype: torch.dtype, heads: int, width: int) -> str | None:
    """Why a GPU cannot multiply queries and keys of a dtype and shape, or None."""
    nvidia = arch.name.startswith("sm_")
    if dtype.itemsize == 1 and not (nvidia and int(arch.name[3:]) >= 89):
        return f"{arch.gpu} ({arch.name}) has no products of float8_e4m3fn; NVIDIA GPUs do from sm_89 on"
    least = {"keys": 16, "queries": 16, "columns": 0, "warps": 4, "stages": 1}
    reason = _complaint(least, arch, heads, width, dtype.itemsize)
    return reason and f"{heads} heads of {width} channels in {str(dtype).removeprefix('torch.')} are too many: {reason}"


def _arguments(target: Target, name: str, operand: Operand | None, axes: str, constants: str) -> dict[str, Any]:
    """Strides of a tensor, those of the axes in `constants` compiled in where they are known."""
    found: dict[str, Any] = {}
    for axis, stride in zip(axes, operand.used_strides if operand is not None else (0,) * len(axes)):
        argument = f"{name}_stride_{axis}"
        if axis in constants:
            found |= constant_or_argument(target, f"{name.upper()}_{axis.upper()}", argument, stride, stride == 1)
        else:
            found[argument] = stride
    return found


def _fill(fill: float) -> dict[str, Any]:
    """The score of hidden keys as compiled-in numbers that generated code can spell: an infinity as its sign."""
    infinite = abs(fill) > torch.finfo(torch.float32).max
    return {"FILL": math.copysign(1.0, fill) if infinite else fill, "INFINITE": infinite}


def plan(
    target: Target, q: Operand, k: Operand, w: Operand, q_scale: Operand | None, k_scale: Operand | None,
    mask: Operand | None, mask_kind: str, causal_offset: Size, scale: float, fill: float, keep_nan: bool,
    scale_after: bool, precision: str, dtype: torch.dtype, layout: str,
) -> Launch:  # fmt: skip
    """The one launch of `index_score_kernel` that computes the op."""
    from fusion_passes.ops._index_score_kernel import index_score_kernel

    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    heads, width = static(q.shape[2]), static(q.shape[3])
    if heads is None or width is None:
        raise NotInlinable(f"heads and channels must be known at compile time, q is {q.shape}")
    if (reason := unsupported(target.arch, q.dtype, heads, width)) is not None:
        raise NotImplementedError(f"index_score: {reason}")
    if q.dtype != torch.float32 or not target.arch.name.startswith("sm_"):
        precision = "ieee"
    hints = [max(1, target.hint(n)) for n in (batch, queries, keys)]
    use = parameters_for(target.arch, hints[0], hints[1], hints[2], heads, width, q.dtype.itemsize)
    step = _steps(use, heads)
    extents = {"b": batch, "s": queries, "t": keys}
    shape = tuple(extents[axis] for axis in layout)
    out = Output(shape, contiguous_strides(shape), dtype)
    steps = dict(zip(layout, out.strides))
    args: dict[str, Any] = {
        "q_ptr": q, "k_ptr": k, "w_ptr": w, "mask_ptr": mask, "out_ptr": out,
        "q_scale_ptr": q_scale and q_scale.whole(), "k_scale_ptr": k_scale and k_scale.whole(),
        "q_offset": q.offset, "k_offset": k.offset, "w_offset": w.offset, "mask_offset": mask.offset if mask else 0,
        "queries": queries, "keys": keys, "causal_offset": causal_offset,
        **_arguments(target, "q", q, "bsh", "sh"), **_arguments(target, "k", k, "bt", "t"),
        **_arguments(target, "w", w, "bsh", "sh"), **_arguments(target, "mask", mask, "bst", "t"),
        **_arguments(target, "q_scale", q_scale, "bsh", ""), **_arguments(target, "k_scale", k_scale, "bt", ""),
        "out_stride_b": steps["b"], "out_stride_s": steps["s"],
        **constant_or_argument(target, "OUT_T", "out_stride_t", steps["t"], layout[-1] == "t"),
        "H": heads, "BH": _heads(heads), "D": width, "BD": 1 << (width - 1).bit_length(),
        "SCALE": scale, **_fill(fill), "MASK": MASKS.index(mask_kind), "KEEP_NAN": keep_nan, "SCALE_AFTER": scale_after,
        "PRECISION": precision, "KEYS": use["keys"], "ROWS": use["queries"], "STEP": step,
    }  # fmt: skip
    grid = cdiv(keys, use["keys"]) * cdiv(queries, use["queries"]) * batch
    return Launch(index_score_kernel, (grid,), args, use["warps"], use["stages"])


# --- op --------------------------------------------------------------------------------------------------------------


def _fake(
    q: Tensor, k: Tensor, w: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, mask: Tensor | None,
    mask_kind: str, causal_offset: int, scale: float, fill: float, keep_nan: bool, scale_after: bool, precision: str,
    dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    check_arguments(q, k, w, q_scale, k_scale, mask, mask_kind, scale, fill, precision, dtype, layout)
    extents = {"b": q.shape[0], "s": q.shape[1], "t": k.shape[1]}
    return q.new_empty([extents[axis] for axis in layout], dtype=dtype)


def _cpu(*args: Any) -> Tensor:
    _fake(*args)
    return reference(*args)


OP = define(
    "index_score",
    SCHEMA,
    reference=_cpu,
    fake=_fake,
    plan=plan,
    backward="index_score has no gradient: it selects keys. Call it under torch.no_grad(), or compute the scores with "
    "torch.matmul and torch.relu where q, k or w requires a gradient.",
    keep_stride_order=True,
)


def index_score(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    fill: float = float("-inf"),
    causal_offset: int | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    scale_after: bool = False,
    precision: str = "tf32x3",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Index scores: the formula at the top of this module.

    Args:
        q: [B, S, H, D] or [S, H, D]; bfloat16, float16, float32 or float8_e4m3fn; any strides whose last is 1. Up to
            128 heads; D a multiple of 8 from 16 to 256.
        k: [B, T, D] or [T, D], likewise.
        w: [B, S, H] or [S, H]; bfloat16, float16 or float32; any strides.
        scale: a positive factor.
        mask: broadcasts to [B, S, T]: bool, True where a key is seen, or a float that is added.
        fill: the score of keys that a bool mask or causal_offset hides.
        causal_offset: in place of a mask, query s sees the keys t <= s + causal_offset; T - S where the last query sees
            all keys.
        q_scale, k_scale: [B, S, H] and [B, T] (or without B): factors of the rows of q and k, for float8.
        scale_after: k_scale multiplies the scores; faster, and the same where k_scale is not negative.
        precision: of float32 products: "ieee", "tf32x3" (three TF32 products, as good) or "tf32".
        dtype: of the result.

    Returns:
        [B, S, T] or [S, T].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message says what it is
            and what it must be.
        NotImplementedError: the GPU has no float8 products or too little shared memory for the heads, or a backward
            pass reaches the op.
    """
    if q.dim() not in (3, 4):
        raise ValueError(f"q must be [B, S, H, D] or [S, H, D], got shape {list(q.shape)}")
    if mask is not None and causal_offset is not None:
        raise ValueError("mask and causal_offset exclude one another; give the mask alone")
    single = q.dim() == 3
    if single:
        q, k, w = (t.unsqueeze(0) for t in (q, k, w))
        q_scale, k_scale = (None if t is None else t.unsqueeze(0) for t in (q_scale, k_scale))
    shape = (q.shape[0], q.shape[1], k.shape[1] if k.dim() == 3 else 0)
    kind = "none" if causal_offset is None else "causal"
    if mask is not None:
        kind = "keep" if mask.dtype == torch.bool else "add"
        try:
            mask = mask.expand(shape)
        except RuntimeError:
            found = list(mask.shape)
            raise ValueError(f"mask must broadcast to [B, S, T] = {list(shape)}, got shape {found}") from None
    scores = OP(
        q, k, w, q_scale, k_scale, mask, kind, causal_offset or 0, scale, fill, True, scale_after, precision, dtype,
        "bst",
    )  # fmt: skip
    return scores.squeeze(0) if single else scores


# --- benchmark cases -------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    """What the op is benchmarked on, a list of `fusion_passes.benchmarking.Case`."""
    from fusion_passes.ops import _index_score_cases

    return _index_score_cases.cases()
