"""The kernels of `head_gate`: a skinny matrix product on tensor cores, and dot products for a handful of rows.

The tensor-core kernel computes tiles of [heads, rows], weights on the left, since 64 heads fill an instruction of
Hopper and a few rows may be its short side. Where the tiles are fewer than the GPU has multiprocessors, several
programs share one, each with a part of the depth. All but the last leave their sums in scratch memory, which the last
adds up in a fixed order.

How the last program knows that the others are done. Scratch memory holds anything at first, so a counter cannot live
there. Each of the others has a 64-bit word of its own instead, which it sets to TOKEN, with release semantics, after
its sums. The last waits until all words are TOKEN, with acquire semantics, and clears them. So no word holds TOKEN
before its writer sets it, but for other data that happen to be this number, one in 2^64. The programs that wait have
the highest numbers of the grid, and are fewer than a GPU can hold: the others run before them or beside them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin

# "headgate"
TOKEN = tl.constexpr(0x6865616467617465)


@triton.jit
def _bfloat16_parts(b_value):
    """A float32 block as the exact sum of three bfloat16 blocks: 3 x 8 bits hold all 24."""
    b_high = b_value.to(tl.bfloat16)
    b_rest = b_value - b_high.to(tl.float32)
    b_middle = b_rest.to(tl.bfloat16)
    b_low = (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)
    return b_high, b_middle, b_low


@triton.jit
def _without_specials(b_sum):
    """Zeros for infinities and NaN: what the small parts make of them says nothing, the high part has them too."""
    return tl.where(tl.abs(b_sum) < float("inf"), b_sum, 0.0)


@triton.jit
def _add_product(b_acc, b_w, b_x, FORM: tl.constexpr, PRECISION: tl.constexpr):
    """acc + w @ x for w [heads, depth], x [depth, rows].

    Tensor cores round every sum towards zero. Only results that are rounded to 16 bits anyway ("rounded") add up
    there; for the others each step is a sum of its own, which is added in float32.
    """
    if FORM == "rounded":
        b_acc = tl.dot(b_w, b_x, b_acc)
    elif FORM == "exact":
        # An addition would be folded into the dot.
        b_acc = tl.fma(tl.dot(b_w, b_x), 1.0, b_acc)
    elif FORM == "split_weight":
        b_high, b_middle, b_low = _bfloat16_parts(b_w)
        b_small = _without_specials(tl.dot(b_middle, b_x, tl.dot(b_low, b_x)))
        b_acc += tl.dot(b_high, b_x, b_small)
    elif FORM == "split_x":
        b_high, b_middle, b_low = _bfloat16_parts(b_x)
        b_small = _without_specials(tl.dot(b_w, b_middle, tl.dot(b_w, b_low)))
        b_acc += tl.dot(b_w, b_high, b_small)
    else:
        b_acc = tl.fma(tl.dot(b_w.to(tl.float32), b_x.to(tl.float32), input_precision=PRECISION), 1.0, b_acc)
    return b_acc


@triton.jit
def _row_offsets(o_row, tokens, stride_b, stride_t, BATCHED: tl.constexpr):
    """Where rows, counted through all batches, begin."""
    if BATCHED:
        return (o_row // tokens).to(tl.int64) * stride_b + (o_row % tokens).to(tl.int64) * stride_t
    return o_row.to(tl.int64) * stride_t


@triton.jit
def _finish(
    b_sum, q_ptr, out_ptr, o_head, o_row, rows, tokens, q_stride_b, q_stride_t, q_stride_h,
    SCALE: tl.constexpr, ROUND_TO: tl.constexpr, BATCHED: tl.constexpr, HEAD_FIRST: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Round the product as the graph does, scale it and store it; offsets broadcast against each other."""
    if ROUND_TO == "bfloat16":
        b_sum = b_sum.to(tl.bfloat16).to(tl.float32)
    elif ROUND_TO == "float16":
        b_sum = b_sum.to(tl.float16).to(tl.float32)
    b_out = b_sum * SCALE
    m_out = (o_head < H) & (o_row < rows)
    if q_ptr is not None:
        o_q = _row_offsets(o_row, tokens, q_stride_b, q_stride_t, BATCHED) + o_head * q_stride_h
        b_out *= tl.load(q_ptr + o_q, mask=m_out, other=0.0).to(tl.float32)
    o_out = o_row.to(tl.int64) * H + o_head
    if HEAD_FIRST:
        o_out = (o_row // tokens * H + o_head).to(tl.int64) * tokens + o_row % tokens
    tl.store(out_ptr + o_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _gather(b_acc, p_part, p_flag, parts, PART: tl.constexpr, MOST_PARTS: tl.constexpr, SLOTS: tl.constexpr):
    """Wait for the other programs of the tile and add their sums, always in the same order."""
    o_slot = tl.arange(0, SLOTS)
    m_slot = o_slot < parts
    ready = 0
    while ready < parts:
        b_flag = tl.atomic_add(p_flag + o_slot, 0, mask=m_slot, sem="acquire")
        ready = tl.sum(((b_flag == TOKEN) & m_slot).to(tl.int32))
    tl.debug_barrier()
    b_parts = tl.zeros(b_acc.shape, tl.int32) + parts
    # A sum of its own, so that all loads are under way before it meets the layout of b_acc.
    b_sum = tl.zeros(b_acc.shape, tl.float32)
    for part in tl.static_range(MOST_PARTS):
        # Past the L1 cache, which knows nothing of other multiprocessors.
        b_sum += tl.load(p_part + part * PART, mask=b_parts > part, other=0.0, cache_modifier=".cg")
    tl.store(p_flag + o_slot, tl.zeros((SLOTS,), tl.int64), mask=m_slot)
    return b_acc + b_sum


@triton.jit
def head_gate_kernel(
    x_ptr, w_ptr, q_ptr, out_ptr, part_ptr, flag_ptr, x_offset, rows, tokens,
    x_stride_b, x_stride_t, q_stride_b, q_stride_t, q_stride_h,
    X_T: tl.constexpr, X_K: tl.constexpr, W_H: tl.constexpr, W_K: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, ROUND_TO: tl.constexpr,
    BATCHED: tl.constexpr, HEAD_FIRST: tl.constexpr,
    FORM: tl.constexpr, PRECISION: tl.constexpr, MOST_SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[r, h] = round(sum of x[r, k] * w[h, k]) * SCALE * q[r, h]; grid (tiles, splits of the depth).

    x [B, T, K], q [B, T, H] and w [H, K] by strides, out [B, T, H] or if HEAD_FIRST [B, H, T]. X_T is -1 where the
    stride between tokens is a run-time argument. part_ptr float32 [tiles * splits, HEADS, ROWS] and flag_ptr int64
    [tiles * splits] are scratch memory, with any content.
    """
    begin(PDL)
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    o_head = tile % blocks * HEADS + tl.arange(0, HEADS)
    o_row = tile // blocks * ROWS + tl.arange(0, ROWS)
    o_depth = tl.arange(0, DEPTH)
    m_head, m_row = o_head < H, o_row < rows
    stride_t = x_stride_t if X_T == -1 else X_T
    p_x = x_ptr + x_offset + _row_offsets(o_row, tokens, x_stride_b, stride_t, BATCHED)[:, None] + o_depth * X_K
    p_w = w_ptr + o_head[:, None].to(tl.int64) * W_H + o_depth * W_K

    steps: tl.constexpr = (K + DEPTH - 1) // DEPTH
    share = (steps + splits - 1) // splits * DEPTH if MOST_SPLITS > 1 else steps * DEPTH
    start = split * share
    b_acc = tl.zeros((HEADS, ROWS), tl.float32)
    for k in tl.range(start, tl.minimum(start + share, K), DEPTH):
        m_depth = o_depth < K - k
        m_w, m_x = m_head[:, None], m_row[:, None]
        if K % DEPTH != 0:
            m_w, m_x = m_w & m_depth, m_x & m_depth
        b_w = tl.load(p_w + k * W_K, mask=m_w, other=0.0)
        b_x = tl.load(p_x + k * X_K, mask=m_x, other=0.0)
        b_acc = _add_product(b_acc, b_w, tl.trans(b_x), FORM, PRECISION)

    if MOST_SPLITS > 1:
        part: tl.constexpr = HEADS * ROWS
        o_part = tl.arange(0, HEADS)[:, None] * ROWS + tl.arange(0, ROWS)
        first = tile * splits
        if split < splits - 1:
            tl.store(part_ptr + (first + split).to(tl.int64) * part + o_part, b_acc)
            tl.debug_barrier()
            tl.atomic_xchg(flag_ptr + first + split, TOKEN, sem="release")
        else:
            p_part = part_ptr + first.to(tl.int64) * part + o_part
            b_acc = _gather(b_acc, p_part, flag_ptr + first, splits - 1, part, MOST_SPLITS - 1, SLOTS)
            _finish(
                b_acc, q_ptr, out_ptr, o_head[:, None], o_row[None, :], rows, tokens, q_stride_b, q_stride_t,
                q_stride_h, SCALE, ROUND_TO, BATCHED, HEAD_FIRST, H,
            )  # fmt: skip
    else:
        _finish(
            b_acc, q_ptr, out_ptr, o_head[:, None], o_row[None, :], rows, tokens, q_stride_b, q_stride_t,
            q_stride_h, SCALE, ROUND_TO, BATCHED, HEAD_FIRST, H,
        )  # fmt: skip


@triton.jit
def head_gate_row_kernel(
    x_ptr, w_ptr, q_ptr, out_ptr, x_offset, rows, tokens, x_stride_b, x_stride_t, q_stride_b, q_stride_t, q_stride_h,
    X_T: tl.constexpr, X_K: tl.constexpr, W_H: tl.constexpr, W_K: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, ROUND_TO: tl.constexpr,
    BATCHED: tl.constexpr, HEAD_FIRST: tl.constexpr,
    DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same for a handful of rows, in float32 arithmetic: one program for each element of out, grid (rows * H,)."""
    begin(PDL)
    head, row = tl.program_id(0) % H, tl.program_id(0) // H
    o_depth = tl.arange(0, DEPTH)
    stride_t = x_stride_t if X_T == -1 else X_T
    p_x = x_ptr + x_offset + _row_offsets(row, tokens, x_stride_b, stride_t, BATCHED) + o_depth * X_K
    p_w = w_ptr + head.to(tl.int64) * W_H + o_depth * W_K
    b_acc = tl.zeros((DEPTH,), tl.float32)
    # Unrolled, so that all loads are under way at once.
    for k in tl.static_range(0, K, DEPTH):
        m_depth = o_depth < K - k
        b_x = tl.load(p_x + k * X_K, mask=m_depth, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + k * W_K, mask=m_depth, other=0.0).to(tl.float32)
        b_acc += b_x * b_w
    _finish(
        tl.sum(b_acc, 0), q_ptr, out_ptr, head, row, rows, tokens, q_stride_b, q_stride_t, q_stride_h,
        SCALE, ROUND_TO, BATCHED, HEAD_FIRST, H,
    )  # fmt: skip
