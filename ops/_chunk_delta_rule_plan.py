"""The launches of `chunk_delta_rule`: prologue, with few heads a summary of the segments, and scan.

Launch parameters:
    prologue_warps: warps of a program of the prologue, which has one chunk of one value head.
    scan_warps: warps of a program of the scan.
    columns: columns of the state that a program of the scan holds.
    stages: stages of the scan's software pipeline.
    segments: parts into which a sequence is cut for the scan; 0 to choose by the number of programs.

Shape classes, by chunks of a sequence:
    per_head: one decay per head.
    per_channel: one decay per channel of the key.
    per_head_few, per_channel_few: likewise, with too few heads and sequences to fill the GPU.

Nothing is ever timed on the caller's tensors.
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
    Program,
    Size,
    Target,
    cdiv,
    contiguous_strides,
    static,
)
from fusion_passes.tuning import Parameters, TunedTable

CHUNK = 64
# Chunks that a segment has at least: below, applying the maps costs more than the scan saves.
SEGMENT_CHUNKS = 16
NAMES = ("prologue_warps", "scan_warps", "columns", "stages", "segments")
TABLE = TunedTable(
    "chunk_delta_rule",
    Path(__file__).parent / "tuned" / "chunk_delta_rule.json",
    names=NAMES,
    may_be_zero=("segments",),
    counts=("stages",),
)


def _parameters(
    arch: Architecture, per_channel: bool, programs: int, chunks: int, key: int, value: int, itemsize: int
) -> Parameters:  # fmt: skip
    """The launch parameters for `programs` heads times sequences of `chunks` chunks."""
    padded = 1 << (key - 1).bit_length()
    # One stage reads shared memory out of bounds where keys are the operand of two warp-group products.
    least = 2 if arch.name == "sm_90" and itemsize == 2 and not per_channel else 1

    def shared(use: Parameters) -> int:
        """Bytes that the scan needs: per stage keys, queries, tiles and values of a chunk, and the state once."""
        stage = CHUNK * ((3 if per_channel else 2) * padded + 2 * CHUNK + use["columns"]) * itemsize + 1024
        return use["stages"] * stage + (padded + CHUNK // 2) * use["columns"] * itemsize

    def fit(use: Parameters) -> Parameters:
        use = {**use, "columns": math.gcd(use["columns"], value, padded)}
        while use["stages"] > least and shared(use) > arch.shared_memory:
            use["stages"] -= 1
        while use["columns"] > 16 and shared(use) > arch.shared_memory:
            use["columns"] //= 2
        return use

    def complaint(use: Parameters) -> str | None:
        if value % use["columns"] or use["columns"] < 16:
            return f"columns must be at least 16 and divide the {value} values of a head"
        if max(use["scan_warps"], use["prologue_warps"]) * arch.warp_size > 256:
            return f"a program has at most {256 // arch.warp_size} warps"
        if use["stages"] < least:
            return f"Triton 3.6 miscompiles this scan with one stage for {arch.name}: stages must be at least {least}"
        return None

    few = "_few" if programs * value // 32 * 2 <= arch.multiprocessors else ""
    use = TABLE.choose(arch, ("per_channel" if per_channel else "per_head") + few, chunks, fit, complaint)
    if use["segments"] == 0:
        use["segments"] = _segments(arch, programs * value // use["columns"], chunks)
    return use


def _segments(arch: Architecture, programs: int, chunks: int) -> int:
    """Segments per sequence, a power of two: none while the scan alone occupies half of the multiprocessors."""
    segments = 1
    while programs * segments * 2 <= arch.multiprocessors and chunks >= 2 * segments * SEGMENT_CHUNKS:
        segments *= 2
    return segments


def _sizes(**sizes: Size) -> list[int]:
    known = {name: static(size) for name, size in sizes.items()}
    if unknown := [name for name, size in known.items() if size is None]:
        raise NotInlinable(f"{', '.join(unknown)} must be known at compile time")
    return [size for size in known.values() if size is not None]


def _strides(prefix: str, operand: Operand) -> dict[str, Size]:
    """The first three strides, all run-time arguments."""
    return {f"{prefix}_stride_{axis}": stride for axis, stride in zip("bth", operand.used_strides)}


def _small_strides(prefix: str, operand: Operand | None, per_channel: bool) -> dict[str, int]:
    """Strides of a_log or dt_bias, [HV] or [HV, K], as constants of the kernel; 0 along axes that it has not."""
    strides = (*(operand.used_strides if operand is not None else ()), 0, 0)
    head, channel = _sizes(**{f"{prefix}'s stride per head": strides[0], f"{prefix}'s stride per channel": strides[1]})
    return {f"{prefix}_H": head, f"{prefix}_K": channel} if per_channel else {f"{prefix}_H": head}


def _scratch(dtype: torch.dtype, *shape: Size) -> Output:
    return Output(shape, contiguous_strides(shape), dtype)


def plan(
    target: Target, q: Operand, k: Operand, v: Operand, g: Operand, beta: Operand, a_log: Operand | None,
    dt_bias: Operand | None, initial_state: Operand | None, cu_seqlens: Operand | None, scale: float,
    norm_eps: float | None, gate: str, lower_bound: float, beta_sigmoid: float | None, out_dtype: torch.dtype,
    output_final_state: bool,
) -> Program:  # fmt: skip
    """Prologue and scan; between them a summary where the sequences are cut into segments."""
    from fusion_passes.ops import _delta_rule_prologue as prologue
    from fusion_passes.ops._delta_rule_scan import delta_rule_scan_kernel

    batch, tokens = q.shape[:2]
    key_heads, key, heads, value = _sizes(
        key_heads=q.shape[2], key_dim=q.shape[3], value_heads=v.shape[2], value_dim=v.shape[3]
    )
    per_channel = len(g.shape) == 4
    padded = 1 << (key - 1).bit_length()
    varlen = cu_seqlens is not None
    sequences: Size = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else batch
    slots = cdiv(tokens, CHUNK) + sequences if varlen else cdiv(tokens, CHUNK) * batch
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    operand = torch.bfloat16 if narrow else torch.float32
    # float16 has the mantissa of tf32: one product is exact. float32 takes three, or units of its own.
    exact = "ieee" if target.arch.name.startswith("gfx") else "tf32x3"
    precision = exact if torch.float32 in (q.dtype, k.dtype, v.dtype) else "tf32"
    length = target.hint(tokens) // (max(1, target.hint(sequences)) if varlen else 1)
    use = _parameters(
        target.arch, per_channel, heads * target.hint(sequences), -(-length // CHUNK), key, value, operand.itemsize
    )
    segments = use["segments"]

    tiles = _scratch(operand, slots, heads, 2, CHUNK, CHUNK)
    inputs: dict[str, Any] = {
        "q_ptr": q, "k_ptr": k, "cu_seqlens_ptr": cu_seqlens and cu_seqlens.whole(), "tiles_ptr": tiles,
        "q_offset": q.offset, "k_offset": k.offset, "tokens": tokens, "sequences": sequences,
        **_strides("q", q), **_strides("k", k),
        "VARLEN": varlen, "HK": key_heads, "HV": heads, "K": key, "BK": padded, "PRECISION": precision,
    }  # fmt: skip
    first: dict[str, Any] = {
        **inputs, "g_ptr": g, "beta_ptr": beta, "a_log_ptr": a_log and a_log.whole(),
        "bias_ptr": dt_bias and dt_bias.whole(), "g_offset": g.offset, "beta_offset": beta.offset,
        **_strides("g", g), **_strides("beta", beta), **_small_strides("A", a_log, per_channel),
        **_small_strides("BIAS", dt_bias, per_channel),
        "SCALE": scale, "NORM": norm_eps is not None, "EPS": norm_eps or 0.0, "GATE": gate, "LOWER_BOUND": lower_bound,
        "SIGMOID": beta_sigmoid is not None, "BETA_FACTOR": beta_sigmoid or 1.0, "SEARCH": 128,
        "SOLVE": "tf32" if narrow else exact, "LEADS": target.arch.pdl,
    }  # fmt: skip
    between: dict[str, Any] = {"factors_ptr": None, "rows_ptr": None, "decay_ptr": None}
    if per_channel:
        between["rows_ptr"] = _scratch(operand, slots, heads, 3, CHUNK, padded)
        between["decay_ptr"] = _scratch(torch.float32, slots, heads, padded)
        kernel = prologue.delta_rule_prologue_per_channel_kernel
    else:
        between["factors_ptr"] = _scratch(torch.float32, slots, heads, 4, CHUNK)
        kernel = prologue.delta_rule_prologue_per_head_kernel
    first |= {name: value for name, value in between.items() if value is not None}
    launches = [Launch(kernel, (slots * heads,), first, use["prologue_warps"])]

    out = _scratch(out_dtype, batch, tokens, heads, value)
    final_shape = (sequences, heads, key, value) if output_final_state else (0,)
    final = _scratch(torch.float32, *final_shape)
    summary: dict[str, Any] = {"maps_ptr": None, "adds_ptr": None}
    if segments > 1:
        summary["maps_ptr"] = _scratch(torch.float32, sequences, heads, segments, padded, padded)
        summary["adds_ptr"] = _scratch(torch.float32, sequences, heads, segments, padded, value)
    scan: dict[str, Any] = {
        **inputs, **between, **summary, "v_ptr": v, "v_offset": v.offset, **_strides("v", v),
        "state_ptr": initial_state and initial_state.whole(), "o_ptr": out,
        "final_ptr": final if output_final_state else None,
        "PER_CHANNEL": per_channel, "SUMMARY": False, "SEGMENTS": segments, "V": value, "BV": use["columns"],
        "EVEN": not varlen and (static(tokens) or 1) % CHUNK == 0, "STAGES": use["stages"],
        "PDL": target.arch.pdl,
    }  # fmt: skip
    columns = value // use["columns"]
    programs = heads * segments * sequences
    if segments > 1:
        args = {**scan, "SUMMARY": True, "state_ptr": None, "o_ptr": None, "final_ptr": None}
        grid = ((columns + padded // use["columns"]) * programs,)
        launches.append(Launch(delta_rule_scan_kernel, grid, args, use["scan_warps"]))
    launches.append(Launch(delta_rule_scan_kernel, (columns * programs,), scan, use["scan_warps"]))
    return Program(tuple(launches), (out, final))
