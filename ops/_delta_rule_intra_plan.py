"""The launch of `delta_rule_intra`.

Launch parameters:
    warps: warps of a program, which has a tile of 64 tokens of one value head.
    key_block: channels of the keys that a program handles at a time.
    value_block: channels of the values that a program handles at a time.

Shape classes, by tiles times value heads:
    per_head: one decay per head.
    per_head_pairs: likewise, with products of q and k.
    per_channel: one decay per channel of the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fusion_passes.arch import Architecture
from fusion_passes.lowering import Launch, Operand, Output, Program, Size, Target, cdiv, contiguous_strides
from fusion_passes.ops._chunk_delta_rule_plan import _sizes, _strides
from fusion_passes.tuning import Parameters, TunedTable

TILE = 64
TABLE = TunedTable(
    "delta_rule_intra",
    Path(__file__).parent / "tuned" / "delta_rule_intra.json",
    names=("warps", "key_block", "value_block"),
)


def _parameters(arch: Architecture, shape_class: str, programs: int, key: int, value: int) -> Parameters:
    widths = {"key_block": key, "value_block": value}

    def fit(use: Parameters) -> Parameters:
        blocks = {name: min(use[name], max(64, 1 << (width - 1).bit_length())) for name, width in widths.items()}
        return {**use, **blocks}

    def complaint(use: Parameters) -> str | None:
        for name in widths:
            if use[name] not in (64, 128, 256):
                return f"{name} must be 64, 128 or 256, got {use[name]}"
        if use["warps"] * arch.warp_size > 256:
            return f"a program has at most {256 // arch.warp_size} warps"
        return None

    return TABLE.choose(arch, shape_class, programs, fit, complaint)


def _result(dtype: torch.dtype, chunked: tuple[Size, ...], width: int, columns: bool) -> Output:
    """[B, HV, N, C, width], the last two axes in either order in memory."""
    shape = (*chunked, width)
    strides = contiguous_strides(shape)
    return Output(shape, (*strides[:3], 1, chunked[3]) if columns else strides, dtype)


def plan(
    target: Target, k: Operand, v: Operand, sums: Operand, beta: Operand, q: Operand | None, scale: float,
    norm_eps: float | None, results: str, columns: bool, chunks_first: bool, out_dtype: torch.dtype,
) -> Program:  # fmt: skip
    """One launch, whatever the results."""
    from fusion_passes.ops import _delta_rule_intra_kernel as kernels

    batch, tokens = k.shape[:2]
    key_heads, key, heads, value, length = _sizes(
        key_heads=k.shape[2], key_dim=k.shape[3], value_heads=v.shape[2], value_dim=v.shape[3], chunk=sums.shape[3]
    )
    chunks = sums.shape[2]
    per_channel = len(sums.shape) == 5
    programs = cdiv(chunks, TILE // length) * batch * heads
    shape_class = "per_channel" if per_channel else "per_head" if q is None else "per_head_pairs"
    use = _parameters(target.arch, shape_class, target.hint(programs), key, value)
    narrow = all(operand.dtype == torch.bfloat16 for operand in (k, v, q) if operand is not None)
    exact = "ieee" if target.arch.name.startswith("gfx") else "tf32x3"

    chunked = (batch, heads, chunks, length)
    joined = results != "u,w"
    u = _result(out_dtype, chunked, value + key if joined else value, columns)
    w = Output((0,), (1,), out_dtype) if joined else _result(out_dtype, chunked, key, columns)
    pairs, block = Output((0,), (1,), out_dtype), length * length
    head_step, chunk_step = (block, block * heads * batch) if chunks_first else (block * chunks, block)
    if q is not None:
        pairs = Output((*chunked, length), (heads * head_step, head_step, chunk_step, length, 1), out_dtype)
    args: dict[str, Any] = {
        "k_ptr": k, "v_ptr": v, "sums_ptr": sums, "beta_ptr": beta, "q_ptr": q, "u_ptr": u,
        "w_ptr": None if joined else w, "pairs_ptr": None if q is None else pairs,
        "k_offset": k.offset, "v_offset": v.offset, "sums_offset": sums.offset, "beta_offset": beta.offset,
        "q_offset": 0 if q is None else q.offset, "tokens": tokens, "chunks": chunks,
        **_strides("k", k), **_strides("v", v), **_strides("beta", beta), **_strides("q", k if q is None else q),
        **{f"sums_stride_{axis}": stride for axis, stride in zip("bhnc", sums.used_strides)},
        "pairs_stride_h": head_step, "pairs_stride_n": chunk_step,
        "SCALE": scale, "NORM": norm_eps is not None, "EPS": norm_eps or 0.0, "HK": key_heads, "HV": heads,
        "K": key, "V": value, "BK": use["key_block"], "BV": use["value_block"], "C": length,
        "U_WIDTH": value + key if joined else value, "U_FIRST": key if results == "wu" else 0,
        "W_WIDTH": value + key if joined else key, "W_FIRST": value if results == "uw" else 0, "COLUMNS": columns,
        "SOLVE": "tf32" if narrow else exact, "PRECISION": "bf16" if narrow else exact,
        "PDL": target.arch.pdl,
    }  # fmt: skip
    kernel = kernels.delta_rule_intra_per_channel_kernel if per_channel else kernels.delta_rule_intra_per_head_kernel
    return Program((Launch(kernel, (programs,), args, use["warps"]),), (u, w, pairs))
