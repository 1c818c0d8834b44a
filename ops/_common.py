"""Device functions shared by the kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p_exp(b_z):
    """log(1 + exp(z)) in float32, to about one part in a million for every z, without overflow.

    max(z, 0) + log1p(e) with e = exp(-|z|) in (0, 1]; log1p(e) / e is a minimax polynomial of degree 8 (error
    3.3e-8 on [0, 1]), so that one special-function instruction is enough and small e keeps its digits. +-inf and
    NaN come out as inf, 0 and NaN.
    """
    b_e = tl.exp2(tl.abs(b_z) * -1.4426950408889634)
    b_p = tl.fma(b_e, 0.005364816635847092, -0.030065761879086494)
    b_p = tl.fma(b_p, b_e, 0.0792044848203659)
    b_p = tl.fma(b_p, b_e, -0.13753798604011536)
    b_p = tl.fma(b_p, b_e, 0.1915365308523178)
    b_p = tl.fma(b_p, b_e, -0.24857163429260254)
    b_p = tl.fma(b_p, b_e, 0.3332132399082184)
    b_p = tl.fma(b_p, b_e, -0.49999648332595825)
    b_p = tl.fma(b_p, b_e, 1.0)
    return tl.fma(b_e, b_p, tl.maximum(b_z, 0.0))


@triton.jit
def log2_1p_exp(b_z):
    """log2(1 + exp(z)) in float32 to one part in 10^5: half the work of `log1p_exp`, for results that are rounded."""
    b_z *= 1.4426950408889634
    b_e = tl.exp2(-tl.abs(b_z))
    b_p = tl.fma(b_e, -0.034435901790857315, 0.1460328996181488)
    b_p = tl.fma(b_p, b_e, -0.30303624272346497)
    b_p = tl.fma(b_p, b_e, 0.4691740870475769)
    b_p = tl.fma(b_p, b_e, -0.7204262018203735)
    b_p = tl.fma(b_p, b_e, 1.4426828622817993)
    return tl.fma(b_e, b_p, tl.maximum(b_z, 0.0))


@triton.jit
def sigmoid_exp2(b_x):
    """1 / (1 + 2^x): the logistic function of -x / log2(e), for callers that fold log2(e) into a factor."""
    return 1.0 / (1.0 + tl.exp2(b_x))
