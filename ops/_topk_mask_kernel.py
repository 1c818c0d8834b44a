"""The kernel of `topk_mask`: one program finds the k greatest entries of a row that it holds in registers.

Floating-point numbers become integers of the same order, and the k-th greatest of those is found by halving an
interval: count how many are at or above its middle, and keep the half in which the count passes k. Nothing is sorted
and nothing moves. The interval begins as narrow as the row's own least and greatest number, and the search is over as
soon as a count is k, when the middle falls between the k-th and the next: after some 20 rounds among 8,192 normal
numbers. Only where those two are equal does it go on to the last bit, 32 rounds or, for 16-bit numbers, 16; then the
place of the last of the equal ones is found in the same way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin


@triton.jit
def _ordered(b_x, LARGEST: tl.constexpr):
    """int32 numbers in the order of b_x: both zeros are 0 and NaN is above infinity; in reverse unless LARGEST.

    A positive number's bits are in order as they are, and a negative one's are when all but the sign are inverted. No
    number becomes -2^31.
    """
    WIDE: tl.constexpr = b_x.dtype == tl.float32
    MAGNITUDE: tl.constexpr = 0x7FFFFFFF if WIDE else 0x7FFF
    INFINITY: tl.constexpr = 0x7F800000 if WIDE else 0x7F80 if b_x.dtype == tl.bfloat16 else 0x7C00
    if WIDE:
        b_bits = b_x.to(tl.int32, bitcast=True)
    else:
        b_bits = b_x.to(tl.int16, bitcast=True).to(tl.int32)
    b_key = b_bits ^ ((b_bits >> 31) & MAGNITUDE)
    b_key = tl.where(b_key == -1, 0, b_key)
    b_key = tl.where((b_key > INFINITY) | (b_key < -INFINITY - 1), INFINITY + 1, b_key)
    if not LARGEST:
        b_key = ~b_key
    return b_key


@triton.jit
def _count(b_key, limit):
    """How many are at or above the limit."""
    return tl.sum((b_key >= limit).to(tl.int32), 0)


@triton.jit
def _limit(b_key, least, greatest, length, k):
    """A limit, and how many are at or above it: k, or more where only a limit that is greater by one has fewer.

    `least` and `greatest` are those of the row. With many at the least, as behind a mask of minus infinity, that is the
    limit of rows with fewer than k others: it is tried first.
    """
    low, high, from_low = least, greatest + 1, tl.zeros([], tl.int32) + length
    middle = low + 1
    while (from_low != k) & (middle != low):
        count = _count(b_key, middle)
        enough = count >= k
        low, from_low = tl.where(enough, middle, low), tl.where(enough, count, from_low)
        high = tl.where(enough, high, middle)
        # (low + high) // 2 without overflow: low itself once they are neighbours.
        middle = (low & high) + ((low ^ high) >> 1)
    return low, from_low


@triton.jit
def _behind(b_place, k, known, BLOCK: tl.constexpr):
    """The least number that is above at least k of the places, unless it is known to be BLOCK."""
    most, step = tl.where(known, BLOCK - 1, 0), tl.where(known, 0, BLOCK // 2)
    # The greatest number that is above fewer.
    while step > 0:
        fewer = tl.sum((b_place < most + step).to(tl.int32), 0) < k
        most = tl.where(fewer, most + step, most)
        step = step // 2
    return most + 1


@triton.jit(do_not_specialize=["k", "row_count"])
def topk_mask_kernel(
    x_ptr, out_ptr, length, k, row_count, x_stride_b, x_stride_r,
    LENGTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, X_B: tl.constexpr, X_R: tl.constexpr,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,). x [B, R, T] with neighbouring entries of a row next to each other, out [B, R, T] contiguous.

    Row length T, k, R and the strides of B and R come either compiled in, LENGTH and so on, or, where that is -1, as a
    run-time argument. ROWS is 0 where the rows lie at one stride. BLOCK is the power of two that holds a row.
    """
    begin(PDL)
    n = LENGTH if LENGTH >= 0 else length
    most = K if K >= 0 else k
    row = tl.program_id(0).to(tl.int64)
    stride_r = X_R if X_R >= 0 else x_stride_r
    if ROWS == 0:
        p_x = x_ptr + row * stride_r
    else:
        rows = ROWS if ROWS > 0 else row_count
        stride_b = X_B if X_B >= 0 else x_stride_b
        p_x = x_ptr + row // rows * stride_b + row % rows * stride_r
    o_entry = tl.arange(0, BLOCK)
    m_entry = o_entry < n
    b_key = _ordered(tl.load(p_x + o_entry, mask=m_entry, other=0.0), LARGEST)
    least = tl.min(tl.where(m_entry, b_key, 0x7FFFFFFF), 0)
    # What is not there is below all that is.
    b_key = tl.where(m_entry, b_key, -0x80000000)
    limit, from_limit = _limit(b_key, least, tl.max(b_key, 0), n, most)
    # Of those at the limit as many as are wanted, in the order of the row. The numbers are not needed any more: places
    # take their registers.
    b_place = tl.where(b_key > limit, -1, tl.where(b_key == limit, o_entry, BLOCK))
    b_mask = b_place < _behind(b_place, most, from_limit == most, BLOCK)
    tl.store(out_ptr + row * n + o_entry, b_mask, mask=m_entry)
