"""Triton kernel of `index_score` for many queries: one head's product at a time, the sum over heads in registers.

A program keeps a tile of keys on the chip and walks over the heads of its queries. Per head one product

    [queries, D] x [D, keys]

of which relu and the head's weight per query are added up; nothing but finished scores leaves the program. Two small
programs share a multiprocessor, so that one multiplies while the other adds. What limits it on sm_90 is the rate at
which the L2 delivers queries: each program reads those of its rows once, so a wider tile of keys would take less, but
its sums would not fit the registers.

The number of heads is an argument on purpose: with a constant the compiler schedules the loop a fifth slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin
from fusion_passes.ops._index_score_kernel import _hide, _live_rows, _relu, _scaled_keys


@triton.jit
def _load(p_x, m_row, m_column, ROWS_IN: tl.constexpr, COLUMNS_IN: tl.constexpr):
    """A tile; rows and columns that all exist are not asked for."""
    if ROWS_IN and COLUMNS_IN:
        b_x = tl.load(p_x)
    elif COLUMNS_IN:
        b_x = tl.load(p_x, mask=m_row[:, None], other=0.0)
    else:
        b_x = tl.load(p_x, mask=m_row[:, None] & m_column[None, :], other=0.0)
    return b_x


@triton.jit
def _load_row_values(p_x, m_row, ROWS_IN: tl.constexpr):
    """A number per row, as float32."""
    if ROWS_IN:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=m_row, other=0.0)
    return b_x.to(tl.float32)


@triton.jit(do_not_specialize=["queries", "keys", "causal_offset", "heads"])
def index_score_by_head_kernel(
    q_ptr, k_ptr, w_ptr, q_scale_ptr, k_scale_ptr, mask_ptr, out_ptr,
    q_offset, k_offset, w_offset, mask_offset, queries, keys, causal_offset, heads,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_t, w_stride_b, w_stride_s, w_stride_h,
    q_scale_stride_b, q_scale_stride_s, q_scale_stride_h, k_scale_stride_b, k_scale_stride_t,
    mask_stride_b, mask_stride_s, mask_stride_t, out_stride_b, out_stride_s, out_stride_t,
    Q_S: tl.constexpr, Q_H: tl.constexpr, K_T: tl.constexpr, W_S: tl.constexpr, W_H: tl.constexpr,
    MASK_T: tl.constexpr, OUT_T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SCALE: tl.constexpr, FILL: tl.constexpr, INFINITE: tl.constexpr, MASK: tl.constexpr, KEEP_NAN: tl.constexpr,
    SCALE_AFTER: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, ROWS_IN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of KEYS keys * chunks of ROWS queries * batch,), blocks of keys innermost, last chunks first.

    Arguments as of `index_score_kernel`. ROWS_IN: the number of queries is a multiple of ROWS.
    """
    begin(PDL)
    fill: tl.constexpr = FILL * float("inf") if INFINITE else FILL
    blocks = tl.cdiv(keys, KEYS)
    chunks = tl.cdiv(queries, ROWS)
    pid = tl.program_id(0)
    first_key = pid % blocks * KEYS
    first_row = (chunks - 1 - pid // blocks % chunks) * ROWS
    batch = (pid // blocks // chunks).to(tl.int64)
    rows = tl.minimum(queries - first_row, ROWS)
    first = first_row.to(tl.int64)
    o_row = tl.arange(0, ROWS)
    o_key = tl.arange(0, KEYS)
    o_d = tl.arange(0, BD)
    o_t = first_key + o_key
    m_row = o_row < rows
    m_t = o_t < keys
    stride_s = (Q_S if Q_S >= 0 else q_stride_s)
    stride_h = (Q_H if Q_H >= 0 else q_stride_h)
    stride_t = (K_T if K_T >= 0 else k_stride_t)
    stride_w = (W_S if W_S >= 0 else w_stride_s)
    stride_wh = (W_H if W_H >= 0 else w_stride_h)
    stride_m = (MASK_T if MASK_T >= 0 else mask_stride_t)
    p_mask = mask_ptr
    if mask_ptr is not None:
        p_mask += mask_offset + batch * mask_stride_b + first * mask_stride_s
    low, high = _live_rows(
        p_mask, o_row, o_t, rows, first_row, first_key, keys, mask_stride_s, stride_m, causal_offset, ROWS, 1, MASK
    )
    b_score = tl.zeros([ROWS, KEYS], tl.float32)
    b_factor = tl.full([KEYS], SCALE, tl.float32)
    # Scores of a block that its mask hides stay zero.
    if low < high:
        p_k = k_ptr + k_offset + batch * k_stride_b + first_key.to(tl.int64) * stride_t
        b_k = _load(p_k + o_key.to(tl.int64)[:, None] * stride_t + o_d[None, :], m_t, o_d < D, False, D == BD)
        if k_scale_ptr is not None:
            p_k_scale = k_scale_ptr + batch * k_scale_stride_b + o_t.to(tl.int64) * k_scale_stride_t
            b_k, b_k_scale = _scaled_keys(b_k, p_k_scale, m_t, SCALE_AFTER)
            b_factor *= b_k_scale
        b_k = tl.trans(b_k)
        p_q = q_ptr + q_offset + batch * q_stride_b + first * stride_s
        p_w = w_ptr + w_offset + batch * w_stride_b + first * stride_w
        p_q_scale = q_scale_ptr
        if q_scale_ptr is not None:
            p_q_scale += batch * q_scale_stride_b + first * q_scale_stride_s
        # Sums of 64 bits, so that constant strides end up within the instructions.
        o_wide = o_row.to(tl.int64)
        o_q = o_wide[:, None] * stride_s + o_d[None, :]
        for _ in tl.range(0, heads):
            b_q = _load(p_q + o_q, m_row, o_d < D, ROWS_IN, D == BD)
            b_w = _load_row_values(p_w + o_wide * stride_w, m_row, ROWS_IN)
            b_dot = tl.dot(b_q, b_k, input_precision=PRECISION)
            if q_scale_ptr is not None:
                b_dot *= _load_row_values(p_q_scale + o_wide * q_scale_stride_s, m_row, ROWS_IN)[:, None]
                p_q_scale += q_scale_stride_h
            b_score += _relu(b_dot, KEEP_NAN) * b_w[:, None]
            p_q += stride_h
            p_w += stride_wh
    b_score *= b_factor[None, :]
    m_out = m_row[:, None] & m_t[None, :]
    b_score = _hide(
        b_score, p_mask, o_row, o_t, m_out, first_row, mask_stride_s, stride_m, causal_offset, fill, MASK
    )
    p_out = out_ptr + batch * out_stride_b + first * out_stride_s
    p_out += o_row.to(tl.int64)[:, None] * out_stride_s
    p_out += o_t.to(tl.int64)[None, :] * (OUT_T if OUT_T >= 0 else out_stride_t)
    tl.store(p_out, b_score.to(out_ptr.dtype.element_ty), mask=m_out)
