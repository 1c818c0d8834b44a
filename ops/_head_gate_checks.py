"""What the arguments of `head_gate` must be, with errors that name the argument, what it was and what it must be."""

from __future__ import annotations

import math

import torch

from fusion_passes.fusion import dtype_name
from fusion_passes.ops._checks import FLOATS, known_different

Tensor = torch.Tensor


def check_arguments(
    x: Tensor, weight: Tensor, q_scale: Tensor | None, scale: float, product_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Check everything but the values of tensors.

    Raises:
        TypeError: a tensor or one of the dtypes is none of bfloat16, float16 and float32.
        ValueError: a shape, a device or the scale is wrong.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, K], got shape {list(x.shape)}")
    if weight.dim() != 2 or known_different(weight.shape[1], x.shape[2]):
        raise ValueError(f"weight must be [H, K] with K = {x.shape[2]} as in x, got shape {list(weight.shape)}")
    if q_scale is not None:
        wanted = [x.shape[0], x.shape[1], weight.shape[0]]
        if q_scale.dim() != 3 or any(map(known_different, q_scale.shape, wanted)):
            raise ValueError(f"q_scale must be [B, T, H] = {wanted}, got shape {list(q_scale.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("q_scale", q_scale)):
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {dtype_name(tensor.dtype)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {tensor.device}")
    for name, given in (("product_dtype", product_dtype), ("dtype", dtype)):
        if given not in FLOATS:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {dtype_name(given)}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
