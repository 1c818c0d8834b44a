"""How `index_score` is launched: the table of launch parameters, what of them can run, and the launch itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fusion_passes.arch import Architecture
from fusion_passes.fusion import dtype_name
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
    static,
)
from fusion_passes.ops._index_score_checks import MASKS
from fusion_passes.tuning import Complaint, Parameters, TunedTable

TABLE = TunedTable(
    "index_score",
    Path(__file__).parent / "tuned" / "index_score.json",
    ("keys", "queries", "columns", "warps", "stages"),
    may_be_zero=("columns",),
    counts=("stages",),
)
# Up to this many queries have launch parameters of their own: keys are read once, and nothing else takes time.
DECODE = 16
KINDS = {1: "float8", 2: "half", 4: "single"}
# float32 values of a product that a thread may hold.
MOST_HELD = 128


def _heads(heads: int) -> int:
    """Columns of a product that one query takes."""
    return max(8, 1 << (heads - 1).bit_length())


def _steps(use: Parameters, heads: int) -> int:
    """Queries whose heads make one product, of 16 columns at least."""
    return max(1, use["columns"] // _heads(heads), 16 // _heads(heads))


def _depth(width: int, itemsize: int) -> int:
    """Channels of a product: a power of two, of float8 at least 32."""
    return max(32 if itemsize == 1 else 16, 1 << (width - 1).bit_length())


def _shared(use: Parameters, heads: int, width: int, itemsize: int, split: bool) -> int:
    """Bytes of shared memory: keys, the queries in flight, scores on their way out; operands that are split, twice."""
    depth, copies = _depth(width, itemsize), 2 if split else 1
    steps = _steps(use, heads)
    rows, out = (steps * _heads(heads), 4 * use["keys"] * steps) if use["columns"] else (use["queries"], 0)
    return (copies * use["keys"] + (use["stages"] + copies - 1) * rows) * depth * itemsize + out


def _held(use: Parameters, heads: int) -> int:
    """float32 values of all threads: of a product, and of the sums where those are carried from head to head."""
    if use["columns"]:
        return use["keys"] * _steps(use, heads) * _heads(heads)
    return 2 * use["keys"] * use["queries"]


def _complaint(use: Parameters, arch: Architecture, heads: int, width: int, itemsize: int) -> Complaint:
    if use["warps"] * arch.warp_size > arch.max_threads:
        threads = use["warps"] * arch.warp_size
        return f"{use['warps']} warps are {threads} threads, and a block of {arch.name} has {arch.max_threads}"
    if use["keys"] < 16:
        return f"a tile has 16 keys at least, got {use['keys']}"
    if use["columns"] and use["queries"] < _steps(use, heads):
        return f"one product takes {_steps(use, heads)} queries of {heads} heads; queries={use['queries']} is less"
    if not use["columns"] and use["queries"] < 16:
        return f"a product per head (columns=0) takes 16 queries at least, got {use['queries']}"
    held = _held(use, heads) // (use["warps"] * arch.warp_size)
    if held > MOST_HELD:
        return f"a thread would hold {held} values of products and sums, and {MOST_HELD} fit in its registers"
    split = itemsize == 4 and arch.name.startswith("sm_")
    if (needed := _shared(use, heads, width, itemsize, split)) > arch.shared_memory:
        return f"the tiles take {needed} bytes, and a block of {arch.name} has {arch.shared_memory} to share"
    return None


def parameters_for(
    arch: Architecture, batch: int, queries: int, keys: int, heads: int, width: int, itemsize: int
) -> Parameters:
    """The launch parameters (see `index_score`) for a shape.

    Raises:
        ValueError: parameters that the user forces cannot run; the message says why.
    """

    def complaint(use: Parameters) -> Complaint:
        return _complaint(use, arch, heads, width, itemsize)

    def fit(entry: Parameters) -> Parameters:
        use = {**entry, "keys": max(16, min(entry["keys"], 1 << (keys - 1).bit_length()))}
        # Too few programs leave multiprocessors idle: each gets fewer queries, or keys where it needs its queries.
        spread, least = ("queries", _steps(use, heads)) if use["columns"] else ("keys", 64)
        if use["columns"]:
            use["queries"] = max(least, min(use["queries"], 1 << (queries - 1).bit_length()))
        while use["stages"] > 1 and complaint(use):
            use["stages"] -= 1
        while use["keys"] > 16 and complaint(use):
            use["keys"] //= 2
        while use[spread] > least and _programs(use, batch, queries, keys) < arch.multiprocessors:
            use[spread] //= 2
        return use

    shape_class = KINDS[itemsize] + ("_decode" if queries <= DECODE else "")
    return TABLE.choose(arch, shape_class, queries, fit, complaint)


def _programs(use: Parameters, batch: int, queries: int, keys: int) -> int:
    return batch * -(-queries // use["queries"]) * -(-keys // use["keys"])


def unsupported(arch: Architecture, dtype: torch.dtype, heads: int, width: int) -> str | None:
    """Why a GPU cannot multiply queries and keys of a dtype and shape, or None."""
    nvidia = arch.name.startswith("sm_")
    if dtype.itemsize == 1 and not (nvidia and int(arch.name[3:]) >= 89):
        return f"{arch.gpu} ({arch.name}) has no products of float8_e4m3fn; NVIDIA GPUs do from sm_89 on"
    least = {"keys": 16, "queries": 16, "columns": 16, "warps": 4, "stages": 1}
    reason = _complaint(least, arch, heads, width, dtype.itemsize)
    return reason and f"{heads} heads of {width} channels in {dtype_name(dtype)} are too many: {reason}"


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
    """The one launch that computes the op, with `columns` 0 by head."""
    from fusion_passes.ops._index_score_by_head import index_score_by_head_kernel
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
        "D": width, "BD": _depth(width, q.dtype.itemsize),
        "SCALE": scale, **_fill(fill), "MASK": MASKS.index(mask_kind), "KEEP_NAN": keep_nan, "SCALE_AFTER": scale_after,
        "PRECISION": precision, "KEYS": use["keys"], "ROWS": use["queries"],
        "PDL": target.arch.pdl,
    }  # fmt: skip
    if use["columns"]:
        kernel = index_score_kernel
        args |= {"H": heads, "BH": _heads(heads), "STEP": _steps(use, heads)}
    else:
        kernel = index_score_by_head_kernel
        known = static(queries)
        args |= {"heads": heads, "ROWS_IN": known is not None and known % use["queries"] == 0}
    grid = cdiv(keys, use["keys"]) * cdiv(queries, use["queries"]) * batch
    return Launch(kernel, (grid,), args, use["warps"], use["stages"])
