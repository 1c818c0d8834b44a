"""Triton kernel of `index_score`: one launch, for prefill and decode alike.

A program keeps a tile of keys on the chip and walks over queries. Per step one product

    [keys, D] x [D, queries of the step * heads]

gives all heads' dot products; relu, weights and the sum over heads follow in registers, along the product's columns, so
that nothing but scores leaves the program and no sum is carried from step to step. A query's heads are one run of
memory, and so are its weights. Every program reads the queries of its chunk once: the wider the tile of keys, the
less of the L2's rate that takes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin

# What the mask is: none, True where a key is seen, True where it is hidden, a summand, keys up to s + causal_offset.
NO_MASK = tl.constexpr(0)
KEEP = tl.constexpr(1)
DROP = tl.constexpr(2)
ADD = tl.constexpr(3)
CAUSAL = tl.constexpr(4)
# A summand from here down hides its key: no score is large enough to show beside it.
HIDDEN = tl.constexpr(-3e38)


@triton.jit
def _flipped(b_x, b_negative):
    """-x where b_negative: the sign bit of any element type."""
    width: tl.constexpr = b_x.dtype.primitive_bitwidth
    bits: tl.constexpr = tl.uint8 if width == 8 else tl.uint16 if width == 16 else tl.uint32
    b_sign = b_negative.to(bits) << (width - 1)
    return (b_x.to(bits, bitcast=True) ^ b_sign).to(b_x.dtype, bitcast=True)


@triton.jit
def _live_rows(
    p_mask, o_row, o_t, rows, first_row, first_key, keys, mask_stride_s, mask_stride_t, causal_offset,
    ROWS: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """(first, last + 1) of the rows of a chunk that see any key of the tile, in whole steps."""
    if ROWS == STEP:
        # Constant bounds: the compiler removes the loop.
        low = 0
        high = STEP
    elif MASK == NO_MASK:
        low = rows * 0
        high = tl.cdiv(rows, STEP) * STEP
    elif MASK == CAUSAL:
        low = tl.minimum(tl.maximum(first_key - causal_offset - first_row, 0), rows) // STEP * STEP
        high = tl.cdiv(rows, STEP) * STEP
    else:
        m_tile = (o_row < rows)[:, None] & (o_t < keys)[None, :]
        b_mask = tl.load(
            p_mask + o_row[:, None].to(tl.int64) * mask_stride_s + o_t[None, :].to(tl.int64) * mask_stride_t,
            mask=m_tile, other=0,
        )  # fmt: skip
        if MASK == KEEP:
            b_seen = m_tile & (b_mask != 0)
        elif MASK == DROP:
            b_seen = m_tile & (b_mask == 0)
        else:
            # NaN is seen, too.
            b_seen = m_tile & ~(b_mask.to(tl.float32) <= HIDDEN)
        b_live = tl.max(b_seen.to(tl.int32), axis=1) > 0
        low = tl.min(tl.where(b_live, o_row, ROWS), axis=0)
        high = tl.max(tl.where(b_live, o_row + 1, 0), axis=0)
        low = tl.minimum(low, high) // STEP * STEP
        high = tl.cdiv(high, STEP) * STEP
    return low, high


@triton.jit
def _hide(
    b_score, p_mask, b_row, o_t, m_out, first_row, mask_stride_s, mask_stride_t, causal_offset,
    FILL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores [rows, keys] with the mask applied; `b_row` [rows] counts from first_row."""
    if MASK == CAUSAL:
        b_score = tl.where(o_t[None, :] > (b_row + first_row + causal_offset)[:, None], FILL, b_score)
    elif MASK != NO_MASK:
        b_mask = tl.load(
            p_mask + b_row[:, None].to(tl.int64) * mask_stride_s + o_t[None, :].to(tl.int64) * mask_stride_t,
            mask=m_out, other=0,
        )  # fmt: skip
        if MASK == ADD:
            b_score += b_mask.to(tl.float32)
        elif MASK == KEEP:
            b_score = tl.where(b_mask != 0, b_score, FILL)
        else:
            b_score = tl.where(b_mask != 0, FILL, b_score)
    return b_score


@triton.jit
def _store_scores(
    b_score, p_out, p_mask, b_row, o_t, m_out, first_row, mask_stride_s, mask_stride_t, out_stride_s, out_stride_t,
    causal_offset, FILL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores as of `_hide`, with the mask applied, to their places behind `p_out`, that of first_row."""
    b_score = _hide(
        b_score, p_mask, b_row, o_t, m_out, first_row, mask_stride_s, mask_stride_t, causal_offset, FILL, MASK
    )
    p_score = p_out + b_row[:, None].to(tl.int64) * out_stride_s + o_t[None, :].to(tl.int64) * out_stride_t
    tl.store(p_score, b_score.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _scaled_keys(b_k, p_k_scale, b_in, SCALE_AFTER: tl.constexpr):
    """(keys, factors of their scores) for scales of the keys, of which only the sign has to pass the relu."""
    b_k_scale = tl.load(p_k_scale, mask=b_in, other=0.0).to(tl.float32)
    if not SCALE_AFTER:
        # relu(c x) = |c| relu(sign(c) x)
        b_k = _flipped(b_k, (b_k_scale < 0)[:, None])
        b_k_scale = tl.abs(b_k_scale)
    return b_k, b_k_scale


@triton.jit
def _relu(b_dot, KEEP_NAN: tl.constexpr):
    if KEEP_NAN:
        b_dot = tl.maximum(b_dot, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        b_dot = tl.maximum(b_dot, 0.0)
    return b_dot


@triton.jit
def _weighted(b_dot, b_w, b_q_scale, m_head, PADDED: tl.constexpr, SCALED: tl.constexpr, KEEP_NAN: tl.constexpr):
    """w * relu(dot), [keys, columns]; heads that do not exist count nothing."""
    if SCALED:
        b_dot *= b_q_scale[None, :]
    b_dot = _relu(b_dot, KEEP_NAN) * b_w[None, :]
    if PADDED:
        b_dot = tl.where(m_head[None, :], b_dot, 0.0)
    return b_dot


@triton.jit
def _keys(
    p_k, k_scale_ptr, batch, stride_b, stride_t, o_t, o_d, m_k, b_in,
    SCALE: tl.constexpr, SCALE_AFTER: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A tile of keys [KEYS, BD], and the factor of each key's scores."""
    b_k = tl.load(p_k + o_d[None, :], mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)
    b_factor = tl.full([KEYS], SCALE, tl.float32)
    if k_scale_ptr is not None:
        p_k_scale = k_scale_ptr + batch * stride_b + o_t.to(tl.int64) * stride_t
        b_k, b_k_scale = _scaled_keys(b_k, p_k_scale, b_in, SCALE_AFTER)
        b_factor *= b_k_scale
    return b_k, b_factor


@triton.jit
def _store_hidden(
    p_out, p_mask, o_row, o_t, low, high, rows, b_in, first_row, mask_stride_s, stride_m, out_stride_s, stride_o,
    causal_offset, fill: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The scores of a tile's queries outside of low to high, which see none of its keys: no product is needed."""
    m_hidden = ((o_row < rows) & ((o_row < low) | (o_row >= high)))[:, None] & b_in[None, :]
    b_hidden = tl.full([ROWS, KEYS], 0.0 if MASK == ADD else fill, tl.float32)
    _store_scores(
        b_hidden, p_out, p_mask, o_row, o_t, m_hidden, first_row, mask_stride_s, stride_m, out_stride_s, stride_o,
        causal_offset, fill, MASK,
    )  # fmt: skip


# Sizes that vary from call to call must not compile the kernel anew.
@triton.jit(do_not_specialize=["queries", "keys", "causal_offset"])
def index_score_kernel(
    q_ptr, k_ptr, w_ptr, q_scale_ptr, k_scale_ptr, mask_ptr, out_ptr,
    q_offset, k_offset, w_offset, mask_offset, queries, keys, causal_offset,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_t, w_stride_b, w_stride_s, w_stride_h,
    q_scale_stride_b, q_scale_stride_s, q_scale_stride_h, k_scale_stride_b, k_scale_stride_t,
    mask_stride_b, mask_stride_s, mask_stride_t, out_stride_b, out_stride_s, out_stride_t,
    Q_S: tl.constexpr, Q_H: tl.constexpr, K_T: tl.constexpr, W_S: tl.constexpr, W_H: tl.constexpr,
    MASK_T: tl.constexpr, OUT_T: tl.constexpr,
    H: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SCALE: tl.constexpr, FILL: tl.constexpr, INFINITE: tl.constexpr, MASK: tl.constexpr, KEEP_NAN: tl.constexpr,
    SCALE_AFTER: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of KEYS keys * chunks of ROWS queries * batch,), blocks of keys innermost.

    q [B, S, H, D], k [B, T, D], w [B, S, H], q_scale [B, S, H], k_scale [B, T], mask [B, S, T] and out [B, S, T] by
    strides, those of D are 1. A stride comes compiled in (Q_S and so on) or, where that is -1, as an argument.
    STEP queries make one product; BH and BD are H and D rounded up to powers of two. Hidden scores become FILL, or
    where INFINITE an infinity of its sign, which generated code has no name for. The chunks come last ones first:
    later queries see more keys.
    """
    begin(PDL)
    columns: tl.constexpr = STEP * BH
    fill: tl.constexpr = FILL * float("inf") if INFINITE else FILL
    blocks = tl.cdiv(keys, KEYS)
    chunks = tl.cdiv(queries, ROWS)
    pid = tl.program_id(0)
    first_key = pid % blocks * KEYS
    first_row = (chunks - 1 - pid // blocks % chunks) * ROWS
    batch = (pid // blocks // chunks).to(tl.int64)
    rows = tl.minimum(queries - first_row, ROWS)
    o_t = first_key + tl.arange(0, KEYS)
    o_row = tl.arange(0, ROWS)
    o_d = tl.arange(0, BD)
    o_column = tl.arange(0, columns)
    o_head = o_column % BH
    o_step = tl.arange(0, STEP)
    b_in = o_t < keys
    stride_s = (Q_S if Q_S >= 0 else q_stride_s)
    stride_h = (Q_H if Q_H >= 0 else q_stride_h)
    stride_w = (W_S if W_S >= 0 else w_stride_s)
    stride_m = (MASK_T if MASK_T >= 0 else mask_stride_t)
    stride_o = (OUT_T if OUT_T >= 0 else out_stride_t)
    first = first_row.to(tl.int64)
    p_mask = mask_ptr
    if mask_ptr is not None:
        p_mask += mask_offset + batch * mask_stride_b + first * mask_stride_s
    p_out = out_ptr + batch * out_stride_b + first * out_stride_s

    low, high = _live_rows(
        p_mask, o_row, o_t, rows, first_row, first_key, keys, mask_stride_s, stride_m, causal_offset, ROWS, STEP,
        MASK,
    )  # fmt: skip
    if MASK != NO_MASK and ROWS != STEP:
        if (low > 0) | (high < rows):
            _store_hidden(
                p_out, p_mask, o_row, o_t, low, high, rows, b_in, first_row, mask_stride_s, stride_m, out_stride_s,
                stride_o, causal_offset, fill, MASK, KEYS, ROWS,
            )  # fmt: skip

    m_k = o_t < tl.where(low < high, keys, 0)
    p_k = k_ptr + k_offset + batch * k_stride_b + o_t[:, None].to(tl.int64) * (K_T if K_T >= 0 else k_stride_t)
    b_k, b_factor = _keys(
        p_k, k_scale_ptr, batch, k_scale_stride_b, k_scale_stride_t, o_t, o_d, m_k, b_in, SCALE, SCALE_AFTER, KEYS, D
    )
    p_q = q_ptr + q_offset + batch * q_stride_b
    p_q += (o_column // BH * stride_s + o_head * stride_h)[:, None] + o_d[None, :]
    p_w = w_ptr + w_offset + batch * w_stride_b
    p_w += o_column // BH * stride_w + o_head * (W_H if W_H >= 0 else w_stride_h)
    p_q_scale = q_scale_ptr
    if q_scale_ptr is not None:
        p_q_scale += batch * q_scale_stride_b + o_column // BH * q_scale_stride_s + o_head * q_scale_stride_h
    for row in tl.range(low, high, STEP):
        query = first + row
        m_head = (row + o_column // BH < rows) & (o_head < H)
        b_w = tl.load(p_w + query * stride_w, mask=m_head, other=0.0).to(tl.float32)
        b_q_scale = b_w
        if q_scale_ptr is not None:
            b_q_scale = tl.load(p_q_scale + query * q_scale_stride_s, mask=m_head, other=0.0).to(tl.float32)
        b_q = tl.load(p_q + query * stride_s, mask=m_head[:, None] & (o_d < D)[None, :], other=0.0)
        b_dot = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_dot = _weighted(b_dot, b_w, b_q_scale, m_head, H != BH, q_scale_ptr is not None, KEEP_NAN)
        b_score = tl.sum(tl.reshape(b_dot, [KEYS, STEP, BH]), axis=2) * b_factor[:, None]
        b_score = tl.trans(b_score)
        b_row = row + o_step
        m_out = (b_row < rows)[:, None] & b_in[None, :]
        _store_scores(
            b_score, p_out, p_mask, b_row, o_t, m_out, first_row, mask_stride_s, stride_m, out_stride_s, stride_o,
            causal_offset, fill, MASK,
        )  # fmt: skip
