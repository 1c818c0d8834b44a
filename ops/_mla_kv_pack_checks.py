"""What the arguments of `mla_kv_pack` must be, with errors that name the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fusion_passes.ops import _mla_kv_pack_steps as steps_of
from fusion_passes.ops._checks import FLOATS, known_different

Tensor = torch.Tensor

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
# Order of the axes of an output in memory: batch, tokens, heads, columns.
LAYOUTS = ("bthd", "bhtd")
# Columns come in full vectors of 16 bytes, in tiles of up to 1024.
VECTOR, LARGEST_WIDTH = 8, 1024

# scale, steps, dtype and layout of an output
Form = tuple[Tensor | None, str, torch.dtype, str]


def check_arguments(k_nope: Tensor, k_pe: Tensor, v: Tensor | None, forms: Mapping[str, Form]) -> None:
    """Check everything but the values of tensors; `forms` by "k" and, with `v`, "v".

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, stride, device, layout or step is wrong.
    """
    if k_nope.dim() != 4:
        raise ValueError(f"k_nope must be [B, T, H, N], got {_shape(k_nope)}")
    if k_pe.dim() != 3 or any(map(known_different, k_pe.shape[:2], k_nope.shape[:2])):
        raise ValueError(f"k_pe must be [B, T, R] with B, T = {list(k_nope.shape[:2])} of k_nope, got {_shape(k_pe)}")
    if v is not None and (v.dim() != 4 or any(map(known_different, v.shape[:3], k_nope.shape[:3]))):
        raise ValueError(f"v must be [B, T, H, V] with B, T, H = {list(k_nope.shape[:3])} of k_nope, got {_shape(v)}")
    for name, t in (("k_nope", k_nope), ("k_pe", k_pe), ("v", v)):
        if t is not None:
            _check_columns(name, t, k_nope)
    for name, (scale, steps, dtype, layout) in forms.items():
        _check_form(name, scale, steps, dtype, layout, k_nope)


def _check_columns(name: str, t: Tensor, first: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {t.dtype}")
    if t.dtype != first.dtype:
        raise TypeError(f"{name} must have the dtype of k_nope ({first.dtype}), got {t.dtype}")
    if t.device != first.device:
        raise ValueError(f"{name} must be on the device of k_nope ({first.device}), got {t.device}")
    width = t.shape[-1]
    if isinstance(width, int) and (width % VECTOR or not VECTOR <= width <= LARGEST_WIDTH):
        raise ValueError(f"{name} must have a multiple of {VECTOR} columns, up to {LARGEST_WIDTH}, got {width}")
    if known_different(t.stride(-1), 1):
        raise ValueError(f"{name} must have neighbouring columns (last stride 1), got strides {list(t.stride())}")


def _check_form(name: str, scale: Tensor | None, steps: str, dtype: torch.dtype, layout: str, first: Tensor) -> None:
    try:
        parsed = steps_of.parse(steps)
    except ValueError as error:
        raise ValueError(f"{name}_steps cannot be read: {error}") from None
    if layout not in LAYOUTS:
        raise ValueError(f"{name}_layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if dtype not in FLOAT8 and (dtype != first.dtype or steps or name == "v"):
        same = "" if name == "v" else f", or without steps the dtype of k_nope ({first.dtype})"
        raise TypeError(f"{name}_dtype must be torch.float8_e4m3fn or torch.float8_e5m2{same}, got {dtype}")
    if parsed.scaled and scale is None:
        raise ValueError(f"{name}_scale must be a tensor of one element, which {name}_steps {steps!r} use, got None")
    if scale is not None:
        if not parsed.scaled:
            raise ValueError(f"{name}_scale must be None, as {name}_steps {steps!r} use no scale, got {_shape(scale)}")
        if scale.dtype not in FLOATS:
            raise TypeError(f"{name}_scale must be bfloat16, float16 or float32, got {scale.dtype}")
        if any(map(known_different, scale.shape, [1] * scale.dim())):
            raise ValueError(f"{name}_scale must have one element, got {_shape(scale)}")
        if scale.device != first.device:
            raise ValueError(f"{name}_scale must be on the device of k_nope ({first.device}), got {scale.device}")


def _shape(t: Tensor) -> str:
    return f"shape {list(t.shape)}"
