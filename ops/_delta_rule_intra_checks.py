"""What the arguments of `delta_rule_intra` must be, with errors that name the argument, what it was and must be."""

from __future__ import annotations

import math

import torch

from fusion_passes.ops._checks import FLOATS, check_shape, known_different

Tensor = torch.Tensor

CHUNKS = (16, 32, 64)
# How u and w are returned: apart, or side by side in one tensor in either order.
RESULTS = ("u,w", "uw", "wu")
MOST_CHANNELS = 256
# The rows of 64 tokens are addressed by 32-bit offsets from the first of them.
MOST_STRIDE = (1 << 25) - 1


def check_arguments(
    k: Tensor, v: Tensor, sums: Tensor, beta: Tensor, q: Tensor | None, scale: float, norm_eps: float | None,
    results: str, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Check everything but the values of tensors.

    Raises:
        TypeError: a tensor or `out_dtype` has the wrong dtype.
        ValueError: a shape, stride, device, number or word is wrong.
    """
    for name, t in (("k", k), ("v", v), ("beta", beta), ("q", q)):
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {t.dtype}")
    if sums.dtype != torch.float32:
        raise TypeError(f"sums must be float32, got {sums.dtype}")
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    for name, t in (("v", v), ("sums", sums), ("beta", beta), ("q", q)):
        if t is not None and t.device != k.device:
            raise ValueError(f"{name} must be on the device of k ({k.device}), got {t.device}")
    _check_rows(k, v, beta, q)
    _check_sums(k, v, sums)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if norm_eps is not None and not 0 <= norm_eps < math.inf:
        raise ValueError(f"norm_eps must be finite and not negative, got {norm_eps}; None leaves q and k as they are")
    if results not in RESULTS:
        raise ValueError(f"results must be one of {', '.join(map(repr, RESULTS))}, got {results!r}")


def _check_rows(k: Tensor, v: Tensor, beta: Tensor, q: Tensor | None) -> None:
    for name, t, wanted in (("k", k, "[B, T, HK, K]"), ("v", v, "[B, T, HV, V]")):
        if t.dim() != 4:
            raise ValueError(f"{name} must be {wanted}, got shape {list(t.shape)}")
        width = t.shape[3]
        if isinstance(width, int) and (width % 16 or not 16 <= width <= MOST_CHANNELS):
            raise ValueError(f"{name} must have 16 to {MOST_CHANNELS} channels, a multiple of 16, got {width}")
    batch, tokens, heads = k.shape[:3]
    value_heads = v.shape[2]
    check_shape("v", v, (batch, tokens, value_heads, v.shape[3]), "[B, T, HV, V] with B and T of k")
    if isinstance(heads, int) and isinstance(value_heads, int) and (heads == 0 or value_heads % heads):
        raise ValueError(f"v must have a multiple of the {heads} heads of k, got {value_heads}")
    check_shape("beta", beta, (batch, tokens, value_heads), "[B, T, HV]")
    if q is not None:
        check_shape("q", q, k.shape, "[B, T, HK, K] as k")
    for name, row in (("k", k), ("v", v), ("q", q)):
        if row is not None and known_different(row.stride(-1), 1):
            raise ValueError(f"{name} must have stride 1 along its last axis, got strides {list(row.stride())}")
    for name, row in (("k", k), ("v", v), ("q", q), ("beta", beta)):
        _check_stride(name, row, 1)


def _check_stride(name: str, t: Tensor | None, axis: int) -> None:
    stride = 0 if t is None else t.stride(axis)
    if isinstance(stride, int) and stride > MOST_STRIDE:
        raise ValueError(f"{name} must have a stride of at most {MOST_STRIDE} along axis {axis}, got {stride}")


def _check_sums(k: Tensor, v: Tensor, sums: Tensor) -> None:
    wanted = "[B, HV, N, C] or [B, HV, N, C, K]"
    if sums.dim() not in (4, 5):
        raise ValueError(f"sums must be {wanted}, got shape {list(sums.shape)}")
    chunks, length = sums.shape[2:4]
    if isinstance(length, int) and length not in CHUNKS:
        raise ValueError(f"sums must have chunks of {', '.join(map(str, CHUNKS))} tokens, got {length}")
    check_shape("sums", sums, (k.shape[0], v.shape[2], chunks, length, *k.shape[3:][: sums.dim() - 4]), wanted)
    if isinstance(chunks, int) and isinstance(k.shape[1], int) and chunks * length < k.shape[1]:
        raise ValueError(f"sums must have chunks for all {k.shape[1]} tokens, got {chunks} of {length}")
    if sums.dim() == 5 and known_different(sums.stride(-1), 1):
        raise ValueError(f"sums must have stride 1 along its last axis, got strides {list(sums.stride())}")
    for axis in (2, 3):
        _check_stride("sums", sums, axis)
