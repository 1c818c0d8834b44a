"""Makes Triton's interpreter round as a GPU does.

It truncates float32 to bfloat16, drops the carry of float8 roundings and does not saturate them, and multiplies the bit
patterns of bfloat16 and float8. Casts go through PyTorch here, and such products through float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FLOATS = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_INTEGERS = {
    1: (np.int8, torch.int8, np.uint8),
    2: (np.int16, torch.int16, np.uint16),
    4: (np.int32, torch.int32, np.uint32),
}
_corrected = False


def convert(bits: np.ndarray, source: torch.dtype, target: torch.dtype) -> np.ndarray:
    """The bit patterns of `target` for those of `source`, rounded to nearest even; float8 saturates, NaN stays."""
    signed = _INTEGERS[source.itemsize][0]
    values = torch.from_numpy(np.ascontiguousarray(bits).view(signed).copy()).view(source).float()
    if target in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(target).max
        values = torch.where(values.isnan(), values, values.clamp(-largest, largest))
    _, integer, unsigned = _INTEGERS[target.itemsize]
    return values.to(target).view(integer).numpy().view(unsigned)


def correct_rounding() -> None:
    """Patch the interpreter of this process, once."""
    global _corrected
    if _corrected:
        return
    _corrected = True
    stock_convert: Any = interpreter._convert_float
    builder: Any = interpreter.InterpreterBuilder
    stock_dot = builder.create_dot

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source not in _FLOATS or target not in _FLOATS or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return stock_convert(data, source, target, rounding)
        return convert(data, _FLOATS[source], _FLOATS[target]).reshape(data.shape)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        narrow = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
        wide = [self.create_fp_to_fp(x, tl.float32, None) if x.dtype.scalar in narrow else x for x in (a, b)]
        return stock_dot(self, *wide, *rest)

    stock_mul = builder.create_fmul

    def create_fmul(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return stock_mul(self, a, b)
        product = stock_mul(self, self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32))
        return self.cast_impl(product, a.dtype)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    builder.create_fmul = create_fmul
