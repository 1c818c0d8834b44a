"""Gate of a (Kimi or gated) delta rule, and its cumulative sum within chunks of tokens.

    c[t, h, k] = s * sum of g[t', h, k] over t' <= t in the chunk of t

    softplus gate   g = -exp(a_log) * softplus(raw + bias; beta, threshold)
    bounded gate    g = lower_bound * sigmoid(exp(a_log) * (raw + bias))

The softplus gate is that of Kimi Linear (arXiv:2510.26692; one value per channel) and of Gated DeltaNet
(arXiv:2412.06464; one value per head, K = 1); the bounded gate is that of flash-linear-attention's `kda_gate` with
`lower_bound`. softplus is `torch.nn.functional.softplus`. Arithmetic and result are float32.

One pass over memory: 6 bytes per element of bfloat16 input. Against float64 the kernel's gate is off by about one
part in a million at worst, and the sums by float32's rounding.

Dims: B batch, T tokens, G groups and R heads of each (H = G * R heads), K channels, C chunk size, N chunks.

Launch parameters:
    rows: tokens that are summed up together: those of a segment (`serial`), or those of a tile.
    lanes: channels of a head, or heads where a gate has one number per head, of a program.
    warps: warps of a program.
    serial: 1 for segments that threads add up one token after the other, 0 for parallel scans of tiles.

Shape classes, by elements of `raw`:
    channel: one gate per channel.
    head: one gate per head, neighbouring heads next to each other in the result.
    head_transposed: one gate per head, neighbouring tokens next to each other in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from fusion_passes.ops._checks import typed
from fusion_passes.ops._gate_cumsum_checks import CHUNK_SIZES, LAYOUT_AXES, check_arguments, check_packing
from fusion_passes.tuning import Complaint, Parameters, TunedTable

Tensor = torch.Tensor

SCHEMA = (
    "(Tensor raw, Tensor a_log, Tensor? bias, SymInt chunks, int chunk_size, float? lower_bound, float scale, "
    "float beta, float threshold, bool pad_gate, str layout, Tensor? cu_seqlens, Tensor? chunk_indices) -> Tensor"
)

TABLE = TunedTable(
    "gate_cumsum",
    Path(__file__).parent / "tuned" / "gate_cumsum.json",
    ("rows", "lanes", "warps", "serial"),
    ("serial",),
)


# --- reference -------------------------------------------------------------------------------------------------------


def gate_reference(
    raw: Tensor, a_log: Tensor, bias: Tensor | None, lower_bound: float | None, beta: float, threshold: float
) -> Tensor:
    """The log decay g, in float64 if any operand is, else in float32. Operands broadcast against raw."""
    operands = [t for t in (raw, a_log, bias) if t is not None]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
    z = raw.to(dtype) if bias is None else raw.to(dtype) + bias.to(dtype)
    rate = a_log.to(dtype).exp()
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate * z)
    return -rate * torch.nn.functional.softplus(z, beta, threshold)


def reference(
    raw: Tensor, a_log: Tensor, bias: Tensor | None, chunks: int, chunk_size: int, lower_bound: float | None,
    scale: float, beta: float, threshold: float, pad_gate: bool, layout: str,
    cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch; arguments as in `SCHEMA`, see `gate_cumsum` for their meaning."""
    batch, tokens, groups, per_group, channels = raw.shape
    if cu_seqlens is None:
        padding = (0, 0) * 3 + (0, chunks * chunk_size - tokens)
        if pad_gate:
            raw = torch.nn.functional.pad(raw, padding)
        gate = gate_reference(raw, a_log, bias, lower_bound, beta, threshold)
        if not pad_gate:
            gate = torch.nn.functional.pad(gate, padding)
        sums = gate.reshape(batch, chunks, chunk_size, groups * per_group, channels).cumsum(2)
    else:
        gate = gate_reference(raw, a_log, bias, lower_bound, beta, threshold)
        bounds = cu_seqlens.tolist()
        pieces = [
            piece.cumsum(1)
            for start, end in zip(bounds, bounds[1:])
            for piece in gate[:, start:end].split(chunk_size, dim=1)
        ]
        sums = torch.cat(pieces or [gate], dim=1).reshape(batch, 1, tokens, groups * per_group, channels)
    return (sums * scale).permute([LAYOUT_AXES.index(axis) for axis in layout]).contiguous()


# --- launch ----------------------------------------------------------------------------------------------------------


def _complaint(parameters: Parameters, arch: Architecture, chunk_size: int, heads: int, channels: int) -> Complaint:
    rows, lanes, warps = parameters["rows"], parameters["lanes"], parameters["warps"]
    if warps * arch.warp_size > arch.max_threads:
        return f"{warps} warps are {warps * arch.warp_size} threads, and a block of {arch.name} has {arch.max_threads}"
    if rows > chunk_size:
        return f"rows={rows} is more than a chunk of {chunk_size} tokens"
    total, of = (channels, "channels") if channels > 1 else (heads, "heads")
    if lanes >= 2 * total and lanes > 1:
        return f"lanes={lanes} is more than there are {of} ({total}) to share out"
    at_once, what = (chunk_size, "chunk size") if parameters["serial"] else (rows, "rows")
    held = at_once * lanes // (warps * arch.warp_size)
    if held > 128:
        return f"a thread would hold {held} values ({what} * lanes / threads), and 128 fit in its registers"
    if not parameters["serial"] and rows * lanes * 4 > arch.shared_memory:
        return f"a tile takes {rows * lanes * 4} bytes, and a block of {arch.name} has {arch.shared_memory} to share"
    return None


def _fit(parameters: Parameters, chunk_size: int, heads: int, channels: int) -> Parameters:
    """A table entry for this shape: no more rows than a chunk, lanes that divide the channels where that is cheap."""
    total = channels if channels > 1 else heads
    lanes = min(parameters["lanes"], 1 << (total - 1).bit_length())
    divisor = total & -total
    if total % lanes and divisor >= 32:
        lanes = min(lanes, divisor)
    return {**parameters, "rows": min(parameters["rows"], chunk_size), "lanes": lanes}


def parameters_for(
    arch: Architecture, layout: str, elements: int, chunk_size: int, heads: int, channels: int
) -> Parameters:
    """The launch parameters (see the kernel) for a shape; `elements` is the size of raw.

    Raises:
        ValueError: parameters that the user forces cannot run; the message says why.
    """
    transposed = layout.index("c") > layout.index("h")
    shape_class = "channel" if channels > 1 else "head_transposed" if transposed else "head"
    return TABLE.choose(
        arch, shape_class, elements,
        fit=lambda p: _fit(p, chunk_size, heads, channels),
        complaint=lambda p: _complaint(p, arch, chunk_size, heads, channels),
    )  # fmt: skip


def _stride_arguments(target: Target, tensor: str, axes: str, strides: Sequence[Size]) -> dict[str, Any]:
    """Strides of the kernel; the one between tokens is compiled in, which puts row addresses into instructions."""
    found: dict[str, Any] = {}
    for axis, stride in zip(axes, strides):
        names = f"{tensor.upper()}_{axis.upper()}", f"{tensor}_stride_{axis}"
        found |= constant_or_argument(target, *names, stride, always=axis in "tc")
    return found


def plan(
    target: Target, raw: Operand, a_log: Operand, bias: Operand | None, chunks: Size, chunk_size: int,
    lower_bound: float | None, scale: float, beta: float, threshold: float, pad_gate: bool, layout: str,
    cu_seqlens: Operand | None, chunk_indices: Operand | None,
) -> Launch:  # fmt: skip
    """The one launch of `gate_cumsum_kernel` that computes the op."""
    from fusion_passes.ops._gate_cumsum_kernel import gate_cumsum_kernel

    batch, tokens = raw.shape[:2]
    groups, per_group, channels = (static(n) for n in raw.shape[2:])
    if groups is None or per_group is None or channels is None:
        raise NotInlinable(f"heads and channels must be known at compile time, raw is {tuple(raw.shape)}")
    heads = groups * per_group
    extents = {
        "b": batch,
        "n": chunks,
        "c": tokens if cu_seqlens is not None else chunk_size,
        "h": heads,
        "k": channels,
    }
    shape = tuple(extents[axis] for axis in layout)
    steps = dict(zip(layout, contiguous_strides(shape)))
    out_strides = {axis: 0 if static(extents[axis]) == 1 else steps[axis] for axis in LAYOUT_AXES}
    elements = target.hint(batch) * target.hint(tokens) * heads * channels
    use = parameters_for(target.arch, layout, elements, chunk_size, heads, channels)
    slots: Size = chunks * batch
    sequences: Size = 0
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        slots = chunk_indices.shape[0] if chunk_indices is not None else cdiv(tokens, chunk_size) + sequences
    lane_blocks = heads * cdiv(channels, use["lanes"]) if channels > 1 else cdiv(heads, use["lanes"])
    small: dict[str, Size] = {}
    for name, operand in (("A", a_log), ("BIAS", bias)):
        strides = operand.used_strides if operand is not None else (0, 0, 0)
        small |= {f"{name}_{axis}": stride for axis, stride in zip("GRK", strides)}
    args: dict[str, Any] = {
        "raw_ptr": raw, "a_log_ptr": a_log.whole(), "bias_ptr": bias and bias.whole(),
        "out_ptr": Output(shape, contiguous_strides(shape), torch.float32),
        "cu_seqlens_ptr": cu_seqlens and cu_seqlens.whole(),
        "chunk_indices_ptr": chunk_indices and chunk_indices.whole(),
        "raw_offset": raw.offset, "tokens": tokens, "chunks": chunks, "sequences": sequences,
        **_stride_arguments(target, "raw", "btgrk", raw.used_strides),
        **_stride_arguments(target, "out", LAYOUT_AXES, [out_strides[axis] for axis in LAYOUT_AXES]), **small,
        "SCALE": scale, "LOWER_BOUND": 0.0 if lower_bound is None else lower_bound,
        "BETA": beta, "THRESHOLD": min(threshold, 1e30), "BOUNDED": lower_bound is not None,
        "PAD_GATE": pad_gate, "VARLEN": 0 if cu_seqlens is None else 1 if chunk_indices is None else 2,
        "G": groups, "R": per_group, "K": channels,
        "CHUNK": chunk_size, "ROWS": use["rows"], "LANES": use["lanes"], "SERIAL": bool(use["serial"]), "SEARCH": 128,
        "PDL": target.arch.pdl,
    }  # fmt: skip
    return Launch(gate_cumsum_kernel, (lane_blocks * slots,), args, use["warps"])


# --- op --------------------------------------------------------------------------------------------------------------


def _fake(
    raw: Tensor, a_log: Tensor, bias: Tensor | None, chunks: int, chunk_size: int, lower_bound: float | None,
    scale: float, beta: float, threshold: float, pad_gate: bool, layout: str,
    cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_arguments(raw, a_log, bias, chunks, chunk_size, lower_bound, scale, beta, threshold, layout, cu_seqlens,
                    chunk_indices)  # fmt: skip
    rows = chunk_size if cu_seqlens is None else raw.shape[1]
    extents = {"b": raw.shape[0], "n": chunks, "c": rows, "h": raw.shape[2] * raw.shape[3], "k": raw.shape[4]}
    return raw.new_empty([extents[axis] for axis in layout], dtype=torch.float32)


def _cpu(
    raw: Tensor, a_log: Tensor, bias: Tensor | None, chunks: int, chunk_size: int, lower_bound: float | None,
    scale: float, beta: float, threshold: float, pad_gate: bool, layout: str,
    cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    args = (raw, a_log, bias, chunks, chunk_size, lower_bound, scale, beta, threshold, pad_gate, layout)
    _fake(*args, cu_seqlens, chunk_indices)
    if cu_seqlens is not None:
        check_packing(cu_seqlens, chunk_indices, raw.shape[1], chunk_size)
    return reference(*args, cu_seqlens, chunk_indices)


OP = define(
    "gate_cumsum",
    SCHEMA,
    reference=_cpu,
    fake=_fake,
    plan=plan,
    backward="gate_cumsum has no gradient: it is for inference. Call it under torch.no_grad(), or compute the gate "
    "with torch.nn.functional.softplus and torch.cumsum where raw, a_log or bias requires one.",
)


@typed
def gate_cumsum(
    raw: Tensor,
    a_log: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_size: int = 64,
    lower_bound: float | None = None,
    scale: float = 1.0,
    beta: float = 1.0,
    threshold: float = 20.0,
    head_first: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """The gate's cumulative sum within chunks: the formula at the top of this module.

    Args:
        raw: [B, T, H, K], or [B, T, H] for one gate per head; bfloat16, float16 or float32, any strides.
        a_log: [H], [H, K], or anything that broadcasts to [H, K].
        bias: likewise, or None for no bias.
        chunk_size: tokens per chunk: 16, 32, 64 or 128.
        lower_bound: the bounded gate with this bound (such as -5.0) in place of the softplus gate.
        scale: factor of the result; 1 / ln 2 gives sums for exp2.
        beta, threshold: as in `torch.nn.functional.softplus`.
        head_first: return [B, H, T, K] in place of [B, T, H, K].
        cu_seqlens: [S + 1] int32 or int64: sequence s of a packed batch is tokens cu_seqlens[s] to
            cu_seqlens[s + 1] of a raw with B = 1. Chunks start anew with every sequence. Nothing is read back to the
            host: on a GPU, values that do not fit T leave part of the result unwritten, without touching other memory.
        chunk_indices: [NC, 2]: (sequence, chunk within it) of every chunk; saves the kernel a search.

    Returns:
        float32, the shape of raw (heads first if asked).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message says what it is
            and what it must be.
        NotImplementedError: a backward pass reaches the op.
    """
    if raw.dim() not in (3, 4):
        raise ValueError(f"raw must be [B, T, H, K] or [B, T, H], got shape {list(raw.shape)}")
    full = raw if raw.dim() == 4 else raw.unsqueeze(-1)
    batch, tokens, heads, channels = full.shape
    small = [_per_lane(name, t, heads, channels) for name, t in (("a_log", a_log), ("bias", bias))]
    if a_log is None:
        raise TypeError("a_log must be a tensor, got None")
    if cu_seqlens is None and chunk_size in CHUNK_SIZES:
        chunks = -(-tokens // chunk_size)
    else:
        chunks = 1
    out = torch.ops.fusion_passes.gate_cumsum(
        full.unsqueeze(2), *small, chunks, chunk_size, lower_bound, scale, beta, threshold, False,
        "bhnck" if head_first else "bnchk", cu_seqlens, chunk_indices,
    )  # fmt: skip
    out = out.flatten(2, 3)[:, :, :tokens] if head_first else out.flatten(1, 2)[:, :tokens]
    return out if raw.dim() == 4 else out.squeeze(-1)


def _per_lane(name: str, value: Tensor | None, heads: int, channels: int) -> Tensor | None:
    if value is None:
        return None
    shaped = value[:, None] if value.dim() == 1 else value
    try:
        return shaped.expand(heads, channels).unsqueeze(0)
    except RuntimeError:
        wanted = f"[{heads}], [{heads}, {channels}] or broadcast to that"
        raise ValueError(f"{name} must be {wanted}, got shape {list(value.shape)}") from None


# --- benchmark cases -------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    """What the op is benchmarked on, a list of `fusion_passes.benchmarking.Case`."""
    from fusion_passes.ops import _gate_cumsum_cases

    return _gate_cumsum_cases.cases()
