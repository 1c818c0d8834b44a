"""What the arguments of `gate_cumsum` must be, with errors that name the argument, what it was and what it must be."""

from __future__ import annotations

import math
from typing import Any

import torch

from fusion_passes.ops._checks import FLOATS, known_different

Tensor = torch.Tensor

# Batch, chunk, token within the chunk, head, channel: the output's axes by their letters in `layout`.
LAYOUT_AXES = "bnchk"
CHUNK_SIZES = (16, 32, 64, 128)


def _may_hold_bounds(count: Any) -> bool:
    return not isinstance(count, int) or count >= 1


def _shape(t: Tensor) -> str:
    return f"shape {list(t.shape)}"


def check_arguments(
    raw: Tensor, a_log: Tensor, bias: Tensor | None, chunks: int, chunk_size: int, lower_bound: float | None,
    scale: float, beta: float, threshold: float, layout: str, cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
) -> None:  # fmt: skip
    """Check everything but the values of tensors.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, device or number is wrong.
    """
    if raw.dim() != 5:
        raise ValueError(f"raw must be [B, T, G, R, K] (heads as groups x heads per group), got {_shape(raw)}")
    for name, t in (("raw", raw), ("a_log", a_log), ("bias", bias)):
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {t.dtype}")
        if t.device != raw.device:
            raise ValueError(f"{name} must be on the device of raw ({raw.device}), got {t.device}")
        if t is not raw and (t.dim() != 3 or any(map(known_different, t.shape, raw.shape[2:]))):
            raise ValueError(f"{name} must be [G, R, K] = {list(raw.shape[2:])} as in raw, got {_shape(t)}")
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size must be one of {', '.join(map(str, CHUNK_SIZES))}, got {chunk_size}")
    if sorted(layout) != sorted(LAYOUT_AXES):
        raise ValueError(f"layout must order the letters b, n, c, h, k, such as 'bhnck', got {layout!r}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, got nan")
    for name, value in (("scale", scale), ("lower_bound", lower_bound)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if cu_seqlens is None:
        if chunk_indices is not None:
            raise ValueError("chunk_indices needs cu_seqlens: pass both, or neither for sequences of equal length")
        tokens = raw.shape[1]
        if isinstance(chunks, int) and isinstance(tokens, int) and (chunks < 0 or chunks * chunk_size < tokens):
            raise ValueError(
                f"chunks must cover all tokens: chunks * chunk_size >= T, got {chunks} * {chunk_size} < {tokens}"
            )
    else:
        _check_varlen(raw, chunks, chunk_size, cu_seqlens, chunk_indices)


def _check_varlen(raw: Tensor, chunks: int, chunk_size: int, cu_seqlens: Tensor, chunk_indices: Tensor | None) -> None:
    for name, t in (("cu_seqlens", cu_seqlens), ("chunk_indices", chunk_indices)):
        if t is None:
            continue
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {t.dtype}")
        if t.device != raw.device:
            raise ValueError(f"{name} must be on the device of raw ({raw.device}), got {t.device}")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(t.stride())}")
    if known_different(raw.shape[0], 1):
        raise ValueError(f"raw must have B = 1 with cu_seqlens (sequences are packed along T), got {_shape(raw)}")
    if known_different(chunks, 1):
        raise ValueError(f"chunks must be 1 with cu_seqlens: the output's c axis then holds all tokens, got {chunks}")
    if cu_seqlens.dim() != 1 or not _may_hold_bounds(cu_seqlens.shape[0]):
        raise ValueError(f"cu_seqlens must be [S + 1], the bounds of S sequences, got {_shape(cu_seqlens)}")
    tokens, bounds = raw.shape[1], cu_seqlens.shape[0]
    if isinstance(bounds, int) and bounds == 1 and known_different(tokens, 0):
        raise ValueError(f"cu_seqlens must end at T = {tokens}, but holds one bound and therefore no sequence")
    if chunk_indices is not None:
        if chunk_indices.dim() != 2 or known_different(chunk_indices.shape[1], 2):
            raise ValueError(f"chunk_indices must be [NC, 2], (sequence, chunk) pairs, got {_shape(chunk_indices)}")
        count = chunk_indices.shape[0]
        if all(isinstance(n, int) for n in (count, tokens, bounds)):
            fewest, most = -(-tokens // chunk_size), -(-tokens // chunk_size) + bounds - 1
            if not fewest <= count <= most:
                raise ValueError(
                    f"chunk_indices must have {fewest} to {most} rows for {tokens} tokens in {bounds - 1} sequences "
                    f"and chunks of {chunk_size}, got {count}"
                )


def check_packing(cu_seqlens: Tensor, chunk_indices: Tensor | None, tokens: int, chunk_size: int) -> None:
    """Check the values of the packing of sequences, for tensors on the host.

    Raises:
        ValueError: bounds that do not go from 0 to T in order, or chunks that are not all chunks of the sequences.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens must start at 0 and end at T = {tokens}, got {bounds[0]} and {bounds[-1]}")
    for index, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease, got {start}, {end} at positions {index} and {index + 1}")
    if chunk_indices is not None:
        wanted = [
            [sequence, chunk]
            for sequence, (start, end) in enumerate(zip(bounds, bounds[1:]))
            for chunk in range(-(-(end - start) // chunk_size))
        ]
        given = chunk_indices.tolist()
        if sorted(given) != wanted:
            wrong = next((g for g in given if g not in wanted), f"{len(given)} rows")
            raise ValueError(
                f"chunk_indices must list each of the {len(wanted)} chunks of cu_seqlens once as (sequence, chunk), "
                f"got {wrong}"
            )
