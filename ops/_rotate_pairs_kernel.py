"""The kernel of `rotate_pairs_`."""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin


@triton.jit
def rotate_pairs_kernel(
    x_ptr, cos_ptr, sin_ptr, x_offset, cos_offset, sin_offset, rows, size_b, size_c, x_a, x_b, x_c,
    cos_a, cos_b, cos_c, sin_a, sin_b, sin_c, N: tl.constexpr, X_PAIR: tl.constexpr, X_LANE: tl.constexpr,
    COS_PAIR: tl.constexpr, COS_LANE: tl.constexpr, SIN_PAIR: tl.constexpr, SIN_LANE: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS rows,); a row is N pairs. Strides and offsets count elements; LANES >= N."""
    begin(PDL)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_lane = tl.arange(0, LANES)
    c = (o_row % size_c).to(tl.int64)
    b = (o_row // size_c % size_b).to(tl.int64)
    a = (o_row // size_c // size_b).to(tl.int64)
    m_row = (o_row < rows)[:, None]
    m_pair = m_row & (o_lane < N)[None, :]
    p_x = x_ptr + x_offset + (a * x_a + b * x_b + c * x_c)[:, None]
    p_cos = cos_ptr + cos_offset + (a * cos_a + b * cos_b + c * cos_c)[:, None] + o_lane[None, :] * COS_LANE
    p_sin = sin_ptr + sin_offset + (a * sin_a + b * sin_b + c * sin_c)[:, None] + o_lane[None, :] * SIN_LANE
    # Neighbours are loaded as they lie and then told apart: two loads of every other element would be half as wide.
    NEIGHBOURS: tl.constexpr = X_PAIR == 1 and X_LANE == 2
    if NEIGHBOURS:
        o_both = tl.arange(0, 2 * LANES)
        m_both = m_row & (o_both < 2 * N)[None, :]
        b_both = tl.load(p_x + o_both[None, :], mask=m_both)
        b_first, b_second = tl.split(tl.reshape(b_both, (ROWS, LANES, 2)))
    else:
        b_first = tl.load(p_x + o_lane[None, :] * X_LANE, mask=m_pair)
        b_second = tl.load(p_x + X_PAIR + o_lane[None, :] * X_LANE, mask=m_pair)
    b_x1, b_x2 = b_first.to(tl.float32), b_second.to(tl.float32)
    b_cos1, b_sin1 = tl.load(p_cos, mask=m_pair).to(tl.float32), tl.load(p_sin, mask=m_pair).to(tl.float32)
    b_cos2, b_sin2 = b_cos1, b_sin1
    if COS_PAIR != 0:
        b_cos2 = tl.load(p_cos + COS_PAIR, mask=m_pair).to(tl.float32)
    if SIN_PAIR != 0:
        b_sin2 = tl.load(p_sin + SIN_PAIR, mask=m_pair).to(tl.float32)
    if INVERSE:
        b_sin1, b_sin2 = -b_sin1, -b_sin2
    b_y1 = (b_x1 * b_cos1 - b_x2 * b_sin1).to(b_first.dtype)
    b_y2 = (b_x2 * b_cos2 + b_x1 * b_sin2).to(b_first.dtype)
    if NEIGHBOURS:
        tl.store(p_x + o_both[None, :], tl.reshape(tl.join(b_y1, b_y2), (ROWS, 2 * LANES)), mask=m_both)
    else:
        tl.store(p_x + o_lane[None, :] * X_LANE, b_y1, mask=m_pair)
        tl.store(p_x + X_PAIR + o_lane[None, :] * X_LANE, b_y2, mask=m_pair)
