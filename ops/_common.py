"""Device functions shared by the kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log2_1p_exp2(b_x):
    """log2(1 + 2^x) in float32, to about one part in a million for every x, without overflow.

    max(x, 0) + log2(1 + e) with e = 2^-|x| in (0, 1]; log2(1 + e) / e is a minimax polynomial of degree 7 (error
    2e-7 on [0, 1]), so that one special-function instruction is enough and small e keeps its digits. +-inf and NaN
    come out as inf, 0 and NaN.
    """
    b_e = tl.exp2(-tl.abs(b_x))
    b_p = tl.fma(b_e, -0.012319479137659073, 0.06360792368650436)
    b_p = tl.fma(b_p, b_e, -0.1553519368171692)
    b_p = tl.fma(b_p, b_e, 0.2560097873210907)
    b_p = tl.fma(b_p, b_e, -0.35339486598968506)
    b_p = tl.fma(b_p, b_e, 0.48006370663642883)
    b_p = tl.fma(b_p, b_e, -0.7213100790977478)
    b_p = tl.fma(b_p, b_e, 1.4426947832107544)
    return tl.fma(b_e, b_p, tl.maximum(b_x, 0.0))


@triton.jit
def log2_1p_exp(b_z):
    """log2(1 + exp(z)) in float32 to one part in 10^5: less work than `log2_1p_exp2`, for results that are rounded."""
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


@triton.jit
def begin(PDL: tl.constexpr):
    """With programmatic dependent launch nothing may be read or written ahead of this; addresses may be computed.

    The kernel may have been started while launches before it still run. It waits for them, and only then lets the
    launch behind it start, so that whoever is waited for has itself seen the end of all before.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start_next(LEADS: tl.constexpr):
    """Let the launch behind this one start, if it is a programmatic dependent one, which waits for this one's end.

    For a kernel that is itself launched as usual, when all before have ended. Nothing is moved over this: what is
    computed behind it takes no registers ahead of it.
    """
    if LEADS:
        tl.extra.cuda.gdc_launch_dependents()
