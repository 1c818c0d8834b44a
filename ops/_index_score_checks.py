"""What the arguments of `index_score` must be, with errors that name the argument, what it was and what it must be."""

from __future__ import annotations

from typing import Any

import torch

from fusion_passes.ops._checks import FLOATS, check_shape, known_different

Tensor = torch.Tensor

OPERANDS = (*FLOATS, torch.float8_e4m3fn)
# What a mask says: none, True where a key is seen, True where it is hidden, a summand, keys up to s + causal_offset.
MASKS = ("none", "keep", "drop", "add", "causal")
PRECISIONS = ("ieee", "tf32x3", "tf32")
MOST_HEADS = 128
LEAST_WIDTH, MOST_WIDTH, VECTOR = 16, 256, 8


def check_arguments(
    q: Tensor, k: Tensor, w: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, mask: Tensor | None,
    mask_kind: str, scale: float, fill: float, precision: str, dtype: torch.dtype, layout: str,
) -> None:  # fmt: skip
    """Check everything but the values of tensors.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, stride, device, number or name is wrong.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be [B, S, H, D], got shape {list(q.shape)}")
    batch, queries, heads, width = q.shape
    if k.dim() != 3:
        raise ValueError(f"k must be [B, T, D], got shape {list(k.shape)}")
    keys = k.shape[1]
    for name, t, wanted, axes in (
        ("k", k, (batch, keys, width), "[B, T, D]"),
        ("w", w, (batch, queries, heads), "[B, S, H]"),
        ("q_scale", q_scale, (batch, queries, heads), "[B, S, H]"),
        ("k_scale", k_scale, (batch, keys), "[B, T]"),
        ("mask", mask, (batch, queries, keys), "[B, S, T]"),
    ):
        if t is not None:
            check_shape(name, t, wanted, axes)
            if t.device != q.device:
                raise ValueError(f"{name} must be on the device of q ({q.device}), got {t.device}")
    _check_sizes(heads, width)
    _check_dtypes(q, k, w, q_scale, k_scale, dtype)
    for name, t in (("q", q), ("k", k)):
        if known_different(t.stride(-1), 1):
            raise ValueError(f"{name} must have a last stride of 1, got strides {list(t.stride())}")
    _check_mask(mask, mask_kind)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale}")
    if fill != fill:
        raise ValueError("fill must be a number or an infinity, got nan")
    if sorted(layout) != ["b", "s", "t"]:
        raise ValueError(f"layout must be the letters b, s and t in the order of the result's memory, got {layout!r}")


def _check_sizes(heads: Any, width: Any) -> None:
    if isinstance(heads, int) and not 1 <= heads <= MOST_HEADS:
        raise ValueError(f"q must have 1 to {MOST_HEADS} heads, got {heads}")
    if isinstance(width, int) and (width % VECTOR or not LEAST_WIDTH <= width <= MOST_WIDTH):
        raise ValueError(f"q must have a multiple of {VECTOR} channels from {LEAST_WIDTH} to {MOST_WIDTH}, got {width}")


def _check_dtypes(
    q: Tensor, k: Tensor, w: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, dtype: torch.dtype
) -> None:
    if q.dtype not in OPERANDS:
        raise TypeError(f"q must be bfloat16, float16, float32 or float8_e4m3fn, got {q.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have the dtype of q ({q.dtype}), got {k.dtype}")
    for name, t in (("w", w), ("q_scale", q_scale), ("k_scale", k_scale)):
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {t.dtype}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype}")


def _check_mask(mask: Tensor | None, kind: str) -> None:
    if kind not in MASKS:
        raise ValueError(f"mask_kind must be one of {', '.join(MASKS)}, got {kind!r}")
    if (mask is None) != (kind in ("none", "causal")):
        raise ValueError(f"mask_kind {kind!r} goes {'with' if mask is None else 'without'} a mask")
    if mask is not None and kind == "add" and mask.dtype not in FLOATS:
        raise TypeError(f"a mask that is added must be bfloat16, float16 or float32, got {mask.dtype}")
    if mask is not None and kind != "add" and mask.dtype != torch.bool:
        raise TypeError(f"a mask that keeps or drops keys must be bool, got {mask.dtype}")
